from __future__ import annotations

import pytest
import torch
from model_helpers import hybrid

from seqmodels.models import Sampling, TextGenerator
from seqmodels.models.text_generation import TextStream
from seqmodels.tasks.tokenizer import ByteTokenizer


def stream(content: bytes, *stop: str) -> tuple[list[str], bool]:
    text = TextStream(ByteTokenizer(), stop)
    pieces = [text.push(byte) for byte in content]
    return [*pieces, text.finish()], text.stopped


def test_ascii_comes_at_once() -> None:
    assert stream(b"abc") == (["a", "b", "c", ""], False)


def test_characters_of_several_bytes_come_whole() -> None:
    pieces, _ = stream("aé漢🙂z".encode())
    assert pieces == ["a", "", "é", "", "", "漢", "", "", "", "🙂", "z", ""]


@pytest.mark.parametrize(
    "content",
    [
        b"a\xff\xff\xff\xff\xff\xffb\xe6",
        b"\xff\xff\xff" + "漢".encode() + b"\xff\xf0\x9f" + "🙂é".encode(),
        bytes(torch.randint(128, 256, (400,), generator=torch.Generator().manual_seed(0)).tolist()),
    ],
)
def test_bytes_that_are_no_text_do_not_hold_back_the_rest(content: bytes) -> None:
    pieces, _ = stream(content)
    assert "".join(pieces) == content.decode("utf-8", errors="replace")
    for end in range(4, len(content)):
        so_far = "".join(pieces[:end])
        assert len(content[: end - 3].decode("utf-8", errors="replace")) - 1 <= len(so_far)


@pytest.mark.parametrize("stop", [("END",), ("xyz", "END"), ("NDs", "END"), ("D", "END")])
def test_text_ends_before_the_first_stop_string(stop: tuple[str, ...]) -> None:
    pieces, stopped = stream(b"some ENEND more END", *stop)
    expected = "some ENEND more END"
    expected = expected[: min(expected.find(each) for each in stop if each in expected)]
    assert "".join(pieces) == expected
    assert stopped


def test_a_beginning_of_a_stop_string_is_only_held_back() -> None:
    pieces, stopped = stream(b"a EN EN", "END")
    assert "".join(pieces) == "a EN EN"
    assert pieces[-1] == "EN"
    assert not stopped


def generator() -> TextGenerator:
    return TextGenerator(hybrid(vocab_size=256, dtype=torch.float32), ByteTokenizer())


def test_streaming_and_batches_give_the_same_text() -> None:
    options = {"max_new_tokens": 40, "sampling": Sampling(0.9), "seed": 3}
    prompts = ["def f(", "x", "a longer prompt é"]
    texts = generator().generate(prompts, **options)
    assert texts == generator().generate(prompts, **options)
    for row, prompt in enumerate(prompts):
        pieces = [piece for (piece,) in generator().stream([prompt], **{**options, "seed": 3 + row})]
        assert "".join(pieces) == texts[row]


def test_stop_strings_end_a_row_and_not_the_others() -> None:
    options = {"max_new_tokens": 40, "sampling": Sampling(0.9), "seed": 3}
    plain = generator().generate(["ab", "cd"], **options)
    stop = plain[0][10:12]
    assert stop not in plain[1]
    assert generator().generate(["ab", "cd"], stop=(stop,), **options) == [plain[0][: plain[0].index(stop)], plain[1]]


def test_the_separator_ends_a_text() -> None:
    model = hybrid(vocab_size=256, dtype=torch.float32, tie_head=False, norm="layer")
    with torch.no_grad():  # the separator, id 0, is by far the likeliest
        model.head.weight.zero_()
        model.backbone.norm.bias.fill_(1.0)
        model.head.weight[0] = 10.0
    assert TextGenerator(model, ByteTokenizer()).generate(["ab"], max_new_tokens=9) == [""]


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generator().generate(["a", ""], max_new_tokens=3)
    with pytest.raises(ValueError, match="a stop string is empty"):
        generator().generate(["a"], max_new_tokens=3, stop=("",))
    with pytest.raises(ValueError, match="the tokenizer has 256 ids, the model vocab_size=50"):
        TextGenerator(hybrid(), ByteTokenizer())
