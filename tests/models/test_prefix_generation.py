"""Generating with a prefix model: every way to read a short prompt is a full forward at every step."""

from __future__ import annotations

import msgspec
import pytest
import torch

from seqmodels import Layout
from seqmodels.commands.generate import command as generate_command
from seqmodels.models import LanguageModel, ModelConfig, generate
from seqmodels.models.generation import Decoder
from seqmodels.models.loading import save_model
from seqmodels.models.text_generation import TextGenerator
from seqmodels.tasks.tokenizer import ByteTokenizer

M = 6
PROMPTS = {"shorter": [3, 1, 4], "equal": [1, 5, 9, 2, 6, 5], "longer": [3, 5, 8, 9, 7, 9, 3, 2, 3, 8]}


def model(vocab_size=20, **changes) -> LanguageModel:
    torch.manual_seed(0)
    config = {
        "vocab_size": vocab_size, "d_model": 16, "objective": "prefix", "prefix_length": M,
        "pattern": "gated_conv window prefix_linear_attention swiglu",
        "layers": {
            "prefix_linear_attention": {"num_heads": 2, "feature_dim": 4},
            "window": {"layer": "attention", "num_heads": 2, "window": 4},
        },
        # Large weights, so that greedy tokens vary and depend on what was read.
        "tie_head": False, "initialization": {"embedding_std": 1.0, "linear_std": 0.6},
    }  # fmt: skip
    return LanguageModel(msgspec.convert({**config, **changes}, ModelConfig)).double().eval()


@torch.no_grad()
def by_forward(network, prompt, steps, prefix):
    """Greedy tokens from a whole forward at each step; ``prefix`` of the text so far is read both ways."""
    text, result = list(prompt), []
    for _ in range(steps):
        layout = Layout.full(1, len(text), prefix_lengths=[prefix(len(text))])
        result.append(int(network(torch.tensor([text]), layout=layout).logits[0, -1].argmax()))
        text.append(result[-1])
    return result


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_the_prefix_is_at_most_the_trained_one(name, chunk):
    network, prompt = model(), PROMPTS[name]
    expected = by_forward(network, prompt, 8, lambda length: min(M, len(prompt)))
    assert len(set(expected)) > 2
    assert Decoder(network, prefill_chunk=chunk).generate([prompt], max_new_tokens=8) == [expected]


def test_without_a_prefix_length_the_whole_prompt_is_the_prefix():
    network, prompt = model(prefix_length=None), PROMPTS["longer"]
    expected = by_forward(network, prompt, 5, lambda length: len(prompt))
    assert generate(network, [prompt], max_new_tokens=5) == [expected]


@pytest.mark.parametrize("name", PROMPTS)
def test_reencode_reads_the_text_anew_while_it_fits_the_prefix(name):
    network, prompt = model(), PROMPTS[name]
    expected = by_forward(network, prompt, 9, lambda length: min(M, length) if len(prompt) < M else M)
    assert Decoder(network, short_prompts="reencode").generate([prompt], max_new_tokens=9) == [expected]


def test_repeat_reads_short_prompts_twice():
    network = model()
    twice = PROMPTS["shorter"] * 2
    expected = [by_forward(network, twice, 6, lambda length: M)]
    expected += [by_forward(network, PROMPTS[name], 6, lambda length: M) for name in ("equal", "longer")]
    decoder = Decoder(network, short_prompts="repeat")
    assert [decoder.generate([prompt], max_new_tokens=6)[0] for prompt in PROMPTS.values()] == expected


@torch.no_grad()
def test_compat_pad_reads_pads_as_released_checkpoints_do():
    """Pads are tokens of all layers; prefix linear attention takes their keys for zero, and M counts them."""
    network, prompt, pad = model(), PROMPTS["shorter"], 7
    text = [pad] * (M - len(prompt)) + prompt
    mask = torch.tensor([[index < M - len(prompt) for index in range(M)]])
    layout = Layout.full(1, M, prefix_lengths=[M]).with_compat_mask(mask)
    expected = network(torch.tensor([text]), layout=layout).logits[:, -1]
    decoder = Decoder(network, compat_pad=pad)
    logits, _ = decoder.prefill([prompt], max_length=20)
    torch.testing.assert_close(logits, expected)
    plain, _ = Decoder(network).prefill([prompt], max_length=20)
    assert (plain - expected).abs().max() > 1e-3
    assert decoder.generate([PROMPTS["longer"]], max_new_tokens=4) == generate(
        network, [PROMPTS["longer"]], max_new_tokens=4
    )


@pytest.mark.parametrize("options", [{}, {"short_prompts": "repeat"}, {"short_prompts": "reencode"}, {"compat_pad": 7}])
@pytest.mark.parametrize("chunk", [1, 100])
def test_prompts_of_all_lengths_in_a_batch_are_each_alone(options, chunk):
    network = model()
    decoder = Decoder(network, prefill_chunk=chunk, **options)
    prompts = list(PROMPTS.values())
    alone = [decoder.generate([prompt], max_new_tokens=8)[0] for prompt in prompts]
    assert decoder.generate(prompts, max_new_tokens=8) == alone


def test_the_ways_differ():
    """Otherwise the tests above could not tell them apart."""
    network, prompt = model(), PROMPTS["shorter"]
    prefills = [
        Decoder(network, **options).prefill([prompt], max_length=20)[0]
        for options in ({}, {"short_prompts": "repeat"}, {"compat_pad": 7}, {"compat_pad": 8})
    ]
    for index, one in enumerate(prefills):
        for other in prefills[:index]:
            assert (one - other).abs().max() > 1e-6
    texts = [Decoder(network, short_prompts=way).generate([prompt], max_new_tokens=12) for way in ("pad", "reencode")]
    assert texts[0] != texts[1]


def test_text_is_repeated_behind_a_new_line():
    network, tokenizer = model(vocab_size=256), ByteTokenizer()
    generator = TextGenerator(network, tokenizer, short_prompts="repeat")
    expected = generate(network, [[0, *b"ab\nab"]], max_new_tokens=5)[0]
    found = []
    original = generator.decoder.stream

    def spy(ids, **options):
        found.extend(ids)
        return original(ids, **options)

    generator.decoder.stream = spy
    generator.generate(["ab", "long enough"], max_new_tokens=5)
    assert found == [[0, *b"ab\nab"], [0, *b"long enough"]]
    assert Decoder(network).generate([found[0]], max_new_tokens=5)[0] == expected


def test_bad_choices_are_named():
    with pytest.raises(ValueError, match="short_prompts is 'fill'; expected one of 'pad', 'repeat', 'reencode'"):
        Decoder(model(), short_prompts="fill")
    with pytest.raises(ValueError, match=r"short_prompts='repeat' is about prompts shorter than.*which is null"):
        Decoder(model(prefix_length=None), short_prompts="repeat")
    causal = LanguageModel(ModelConfig(vocab_size=8, d_model=8, pattern="gated_conv"))
    with pytest.raises(ValueError, match=r"compat_pad=3 is about prompts.*objective 'next_token'"):
        Decoder(causal, compat_pad=3)
    with pytest.raises(ValueError, match="compat_pad is 20; expected 0 <= id < vocab_size=20"):
        Decoder(model(), compat_pad=20)
    with pytest.raises(ValueError, match="short_prompts is 'repeat', not 'pad'"):
        Decoder(model(), compat_pad=1, short_prompts="repeat")


def test_the_command_reads_twice(tmp_path, monkeypatch):
    """Any model, without training: the prompt, a new line, the prompt again."""
    causal = LanguageModel(ModelConfig(vocab_size=256, d_model=16, pattern="gated_conv swiglu"))
    save_model(causal, tmp_path)
    asked = []
    original = TextGenerator.stream

    def spy(self, prompts, **options):
        asked.append(list(prompts))
        return original(self, prompts, **options)

    monkeypatch.setattr(TextGenerator, "stream", spy)
    options = {"max_new_tokens": 2, "prompt": ["ab", "c"], "device": "cpu"}
    generate_command(tmp_path, **options, read_twice=True)
    generate_command(tmp_path, **options)
    assert asked == [["ab\nab", "c\nc"], ["ab", "c"]]
    with pytest.raises(ValueError, match="short_prompts='repeat' is about prompts"):
        generate_command(tmp_path, **options, short_prompts="repeat")
