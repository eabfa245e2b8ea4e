"""Hugging Face models behind the protocol: equal to their own forward pass one text at a time."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from seqmodels.evaluation.text_model import open_text_model

transformers = pytest.importorskip("transformers", reason="Hugging Face models need the transformers package")

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dogs", "and", "a", "hen"]
PROMPTS = ["a hen", "the quick brown fox", "lazy dogs and a hen jumps over", "fox", "quick hen", "brown dogs jumps"]


def saved_tokenizer(folder, *, bos):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    specials = ["<s>", "</s>"] if bos else []
    vocabulary = {word: index for index, word in enumerate([*specials, "?", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    options = {"bos_token": "<s>", "eos_token": "</s>"} if bos else {}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", **options).save_pretrained(folder)
    return len(vocabulary)


def saved(folder, kind, *, bos):
    size = saved_tokenizer(folder, bos=bos)
    torch.manual_seed(0)
    ends = {"bos_token_id": 0, "eos_token_id": 1} if bos else {"bos_token_id": None, "eos_token_id": None}
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=size, n_positions=24, n_embd=16, n_layer=2, n_head=2, **ends)
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.MambaConfig(
            vocab_size=size, hidden_size=16, state_size=4, num_hidden_layers=2, pad_token_id=0, **ends
        )
        model = transformers.MambaForCausalLM(config)
    with torch.no_grad():  # clear choices
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.generation_config.do_sample = True  # a model's own settings must not matter
    model.generation_config.temperature = 9.0
    model.double().save_pretrained(folder)
    return f"hf:{folder}"


@pytest.fixture(scope="module", params=[("gpt2", True), ("gpt2", False), ("mamba", False)], ids=str)
def name(request, tmp_path_factory):
    kind, bos = request.param
    return saved(tmp_path_factory.mktemp(kind), kind, bos=bos)


def greedy(model, tokens, count):
    """By the forward pass alone, a token at a time."""
    found = []
    for _ in range(count):
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([[*tokens, *found]]), use_cache=False).logits[0, -1]
        found.append(int(logits.argmax()))
        if found[-1] == model.tokenizer.eos_token_id:
            return found[:-1]
    return found


@pytest.mark.parametrize("batch_size", [1, 4])
def test_generation_is_the_greedy_one_of_each_prompt_alone(name, batch_size):
    model = open_text_model(name, batch_size=batch_size)
    front = [] if model.tokenizer.bos_token_id is None else [0]
    expected = [model.decode(greedy(model, [*front, *model.encode(prompt)], 5)) for prompt in PROMPTS]
    assert model.generate(PROMPTS, max_new_tokens=5) == expected
    assert len(set(expected)) > 1


def test_stop_strings_cut_the_text(name):
    model = open_text_model(name)
    whole = model.generate(PROMPTS, max_new_tokens=8)
    stops = [word for text in whole for word in text.split()[1:2]]
    assert stops
    cut = model.generate(PROMPTS, max_new_tokens=8, stop=stops[:1])
    assert cut == [text.partition(stops[0])[0] for text in whole]
    assert cut != whole


def test_a_long_prompt_keeps_its_end_and_what_the_tokenizer_puts_in_front(name):
    model = open_text_model(name)
    words = (WORDS * 6)[:50]
    for window in (12, 2048):
        front = [] if model.tokenizer.bos_token_id is None else [0]
        room = min(window, model.max_length or window) - 5 - len(front)
        expected = greedy(model, [*front, *model.encode(" ".join(words))[-room:]], 5)
        assert model.generate([" ".join(words)], max_new_tokens=5, window=window) == [model.decode(expected)]


def test_log_likelihoods_are_those_of_each_text_alone(name):
    model = open_text_model(name, batch_size=4)
    pairs = [(model.encode(text), model.encode(rest)) for text, rest in zip(PROMPTS, PROMPTS[::-1], strict=True)]
    for (context, rest), scores in zip(pairs, model.log_likelihoods(pairs), strict=True):
        with torch.no_grad():
            logits = model.model(input_ids=torch.tensor([[*context, *rest]])[:, :-1], use_cache=False).logits[0]
        logits = logits[len(context) - 1 :]
        expected = logits.log_softmax(1).gather(1, torch.tensor(rest)[:, None])[:, 0]
        # Mamba rounds its logits to float32, half a unit in the last place; so do a few operations on them.
        bound = 1e-9 if logits.dtype == torch.float64 else 8 * float(logits.abs().max()) * 2.0**-24
        np.testing.assert_allclose(scores.log_probs, expected, rtol=0, atol=bound)
        np.testing.assert_array_equal(scores.greedy, logits.argmax(1) == torch.tensor(rest))


def test_refusals(name):
    model = open_text_model(name)
    if model.max_length is not None:
        with pytest.raises(ValueError, match="reads 24 at most"):
            model.log_likelihoods([(model.encode("a " * 24), [1, 2])])
    if model.prefix_token is None:
        with pytest.raises(ValueError, match="a prompt has no token"):
            model.generate([""], max_new_tokens=5)


def test_identity_is_of_weights_and_tokenizer_wherever_they_lie(name, tmp_path):
    folder, copy = Path(name.removeprefix("hf:")), tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert open_text_model(f"hf:{copy}").identity == open_text_model(name).identity
    settings = (copy / "tokenizer.json").read_text()
    (copy / "tokenizer.json").write_text(settings.replace("WhitespaceSplit", "Whitespace"))
    assert open_text_model(f"hf:{copy}").identity != open_text_model(name).identity


def test_what_is_no_model_is_one_clear_error(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"cannot load the tokenizer '.*empty' .*expected a folder, or a name"):
        open_text_model(f"hf:{tmp_path / 'empty'}")
    saved_tokenizer(tmp_path / "words", bos=True)  # a tokenizer without a model
    with pytest.raises(ValueError, match=r"cannot load the causal language model '.*words' .*expected a folder"):
        open_text_model(f"hf:{tmp_path / 'words'}")

    def unreachable(*_args, **_options):
        raise OSError("We couldn't connect to the hub\nand more lines")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(ValueError, match=r"'gpt2' \(OSError: We couldn't connect to the hub\); expected .* reachable"):
        open_text_model("hf:gpt2")


def test_the_adapter_agrees_with_the_one_of_lm_eval(tmp_path):
    pytest.importorskip("lm_eval", reason="the adapter needs lm-eval: pip install 'seqmodels[eval]'")
    pytest.importorskip("accelerate", reason="lm-eval's own adapter needs accelerate")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from seqmodels.evaluation.harness import SeqmodelsLM

    name = saved(tmp_path / "m", "gpt2", bos=True)
    theirs = HFLM(pretrained=str(tmp_path / "m"), dtype="float64", device="cpu", batch_size=3)
    ours = SeqmodelsLM(name, batch_size=3)

    def ask(kind, arguments):
        requests = [Instance(request_type=kind, doc={}, arguments=item, idx=0) for item in arguments]
        return [getattr(lm, kind)(requests, disable_tqdm=True) for lm in (theirs, ours)]

    pairs = [(text, f" {rest}") for text, rest in zip(PROMPTS, PROMPTS[::-1], strict=True)]
    pairs += [("a hen " * 30, " fox"), ("a hen ", "fox")]  # beyond the model's 24 tokens; a space that moves
    expected, found = ask("loglikelihood", pairs)
    for (total, greedy), (own, own_greedy) in zip(expected, found, strict=True):
        assert own == pytest.approx(total, rel=1e-9)
        assert own_greedy == greedy
    settings = {"until": [" fox", "\n"], "max_gen_toks": 6}
    expected, found = ask("generate_until", [(text, settings) for text in [*PROMPTS, "a hen jumps " * 12]])
    assert found == expected
    # Not so loglikelihood_rolling: lm-eval's own scores the bos token too where the tokenizer puts one before a text.
