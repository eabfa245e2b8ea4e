"""The conversion itself: distillation, fine-tuning, going on after a kill, the report, errors."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")

from seqmodels.commands.convert import app
from seqmodels.configuration import ConfigError
from seqmodels.convert.files import ConversionError
from seqmodels.convert.hedgehog import AttentionSettings, ConversionSettings, load, swap_attention
from seqmodels.convert.hedgehog.cores import ablated
from seqmodels.convert.hedgehog.data import IGNORED, Batch, ConversionData
from seqmodels.convert.hedgehog.distillation import Distillation
from seqmodels.convert.hedgehog.measures import Score, fidelity, spearman
from seqmodels.convert.hedgehog.models import load_original
from seqmodels.convert.hedgehog.progress import Progress
from seqmodels.convert.hedgehog.report import recovered
from seqmodels.convert.hedgehog.run import Conversion, convert_model
from seqmodels.convert.hedgehog.settings import DistillationSettings, FinetuningSettings
from seqmodels.training.config import DataConfig
from tests.convert.hedgehog_models import perturb, tiny, tokens

LENGTH = 32


class Killed(Exception):
    pass


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(6):
        (folder / f"{index}.txt").write_text("".join(f"{index * number % 17} and " for number in range(80)))
    return folder


def settings(tmp_path: Path, text: Path, family: str = "gpt2", **changes: Any) -> ConversionSettings:
    """A conversion of a few steps of a model of bytes, which is written on the first call."""
    model = tmp_path / family
    if not model.exists():
        tiny(family, vocab_size=260).float().save_pretrained(model)
    data = DataConfig(
        source=str(text), tokenizer="bytes", sequence_length=LENGTH, validation_fraction=0.3,
        cache=str(tmp_path / "cache"),
    )  # fmt: skip
    made = ConversionSettings(
        model=str(model), data=data, batch_size=4, evaluation_rows=6, checkpoint_every=2, device="cpu",
        distillation=DistillationSettings(steps=5), finetuning=FinetuningSettings(steps=5, learning_rate=1e-3),
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


@pytest.mark.parametrize(
    ("family", "attention", "loss", "method"),
    [
        ("llama", AttentionSettings(), "cross_entropy", "lora"),
        ("gpt2", AttentionSettings(kind="hedgehog_window", window=5), "output", "lora"),
        ("bert", AttentionSettings(feature_map="hedgehog_split", feature_dim=4), "cross_entropy", "full"),
        ("mistral", AttentionSettings(kind="softmax"), "output", "lora"),
    ],
)
def test_end_to_end(
    family: str, attention: AttentionSettings, loss: Any, method: Any, tmp_path: Path, text: Path
) -> None:
    given = settings(
        tmp_path, text, family, attention=attention, mask_token=257,
        distillation=DistillationSettings(steps=6, loss=loss),
        finetuning=FinetuningSettings(steps=3, method=method, learning_rate=1e-3),
    )  # fmt: skip
    out = tmp_path / "out"
    found = convert_model(given, out)
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(found))
    page = (out / "report.md").read_text()
    stages = ["teacher", "swapped", "finetuned"]
    if attention.kind != "softmax":
        stages.insert(2, "distilled")
        history = found["history"]["1"]
        assert all(last < first for first, last in zip(history[0]["layers"], history[-1]["layers"], strict=True))
        assert (out / "attention.png").stat().st_size > 1000
        assert set(found["fidelity"]) == {"swapped", "distilled", "finetuned"}
        assert len(found["fidelity"]["swapped"]) == found["layers"] == 2
        assert "Spearman" in page
    else:
        assert found["scores"]["swapped"] == found["scores"]["teacher"]
    if attention.kind == "hedgehog_window":
        stages += ["without_window", "without_linear"]
        assert "Without the linear part the held-out loss changes by" in page
    assert list(found["scores"]) == stages
    assert not (tmp_path / "out.partial").exists()
    model = load(out)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert model.config.hedgehog == msgspec.to_builtins(attention)
    with torch.no_grad():
        assert model(tokens(1, 8)).logits.isfinite().all()


def test_under_autocast(tmp_path: Path, text: Path) -> None:
    attention = AttentionSettings(kind="hedgehog_window", window=5)
    given = settings(tmp_path, text, "llama", attention=attention, precision="bfloat16")
    scores = convert_model(given, tmp_path / "out")["scores"]
    exact = convert_model(msgspec.structs.replace(given, precision="float32"), tmp_path / "exact")["scores"]
    assert scores["swapped"] == exact["swapped"]
    assert scores["finetuned"] != exact["finetuned"]
    # Ten steps from one start; a gradient in bfloat16 has three digits, and the loss moved by about 0.1.
    assert scores["finetuned"]["loss"] == pytest.approx(exact["finetuned"]["loss"], abs=0.02)
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in kept.values())


@pytest.mark.parametrize("loss", ["cross_entropy", "output"])
def test_streamed_gradients_are_those_of_the_mean_loss(loss: str) -> None:
    model = perturb(swap_attention(tiny("llama"), AttentionSettings())).requires_grad_(False)
    for parameter in model.maps().values():
        parameter.requires_grad_(True)
    ids = tokens(2, 10)
    observer = Distillation(loss, 2)
    with torch.no_grad(), model.runtime.observed(observer):
        model(ids, use_cache=False)
    streamed = {name: parameter.grad.clone() for name, parameter in model.maps().items()}
    losses: list[torch.Tensor] = []

    def reference(layer: int, core: Any, call: Any, teacher: torch.Tensor) -> None:
        """The definition with every pair of tokens, from exponentials as they stand."""
        groups = call.q.shape[2] // call.k.shape[2]
        q, (k, v) = call.q, (x.repeat_interleave(groups, dim=2) for x in (call.k, call.v))
        causal = torch.ones(10, 10, dtype=torch.bool).tril()
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        target = scores.masked_fill(~causal, -torch.inf).softmax(-1)
        uq = torch.einsum("bihd,hdf->bihf", q, core.query_map.weight)
        uk = torch.einsum("bjhd,hdf->bjhf", k, core.key_map.weight)
        phi_q, phi_k = (torch.cat([u.exp(), (-u).exp()], -1) for u in (uq, uk))
        weights = torch.einsum("bihf,bjhf->bhij", phi_q, phi_k) * causal
        weights = weights / weights.sum(-1, keepdim=True)
        if loss == "cross_entropy":
            losses.append(-(target * weights.clamp_min(1e-12).log()).sum(-1).mean())
        else:
            difference = torch.einsum("bhij,bjhd->bihd", weights - target, v)
            losses.append(1000 * difference.square().mean())

    with model.runtime.observed(reference):
        model(ids, use_cache=False)
    wanted = torch.autograd.grad(torch.stack(losses).mean(), list(model.maps().values()))
    for gradient, other in zip(streamed.values(), wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-10)
    for layer, value in enumerate(losses):
        torch.testing.assert_close(observer.losses[layer].double(), value, rtol=1e-6, atol=0)


def test_stage_one_moves_maps_only_and_lora_the_projections_only(tmp_path: Path, text: Path) -> None:
    given = settings(tmp_path, text)
    before = load_file(tmp_path / "gpt2" / "model.safetensors")
    convert_model(msgspec.structs.replace(given, finetuning=FinetuningSettings(method="none")), tmp_path / "one")
    first = load_file(tmp_path / "one" / "model.safetensors")
    convert_model(given, tmp_path / "two")
    second = load_file(tmp_path / "two" / "model.safetensors")
    for name, tensor in before.items():
        assert torch.equal(first[name], tensor), name
        projection = "attn.c_" in name and name.endswith("weight")
        assert torch.equal(second[name], tensor) != projection, name
    maps = [name for name in first if ".linear_core." in name]
    assert len(maps) == 4
    for name in maps:
        assert not torch.equal(first[name], torch.eye(8).expand(4, 8, 8)), name
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize(("method", "stage", "step"), [("lora", 1, 3), ("full", 1, 5), ("lora", 2, 4), ("full", 2, 4)])
def test_a_killed_conversion_goes_on_bit_for_bit(
    method: Any, stage: int, step: int, tmp_path: Path, text: Path
) -> None:
    given = settings(tmp_path, text, finetuning=FinetuningSettings(steps=5, method=method, learning_rate=1e-3))

    class Kill(Progress):
        def stage(self, number: int, steps: int, done: int) -> Any:
            def show(now: int, loss: float) -> None:
                if (number, now) == (stage, step):
                    raise Killed

            return contextlib.nullcontext(show)

    whole = convert_model(given, tmp_path / "whole")
    with pytest.raises(Killed):
        convert_model(given, tmp_path / "out", progress=Kill(None))
    assert not (tmp_path / "out").exists()
    seen: list[str] = []

    class Listen(Progress):
        def message(self, text: str) -> None:
            seen.append(text)

    again = convert_model(given, tmp_path / "out", resume=True, progress=Listen(None))
    assert "going on from" in seen[0]
    assert again == whole
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_models_own_tokenizer(tmp_path: Path, text: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    given = settings(tmp_path, text, "bert", finetuning=FinetuningSettings(method="none"))
    words = {
        word: index for index, word in enumerate(["[PAD]", "[UNK]", "[SEP]", "[MASK]", "and", *map(str, range(20))])
    }
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(given.model)
    given = msgspec.structs.replace(given, data=msgspec.structs.replace(given.data, tokenizer="model"))
    data = ConversionData(given, load_original(given.model).config)
    batch, again = data.train(3), data.train(3)
    assert torch.equal(batch.tokens, again.tokens)
    predicted = batch.targets != IGNORED
    assert 0.05 < predicted.float().mean() < 0.3
    assert (batch.tokens[predicted] == words["[MASK]"]).float().mean() > 0.5
    assert not torch.equal(batch.tokens, data.train(4).tokens)
    convert_model(given, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token_id == words["[MASK]"]


def test_what_is_there_is_not_overwritten(tmp_path: Path, text: Path) -> None:
    given = settings(tmp_path, text)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    with pytest.raises(ConversionError, match="a folder that is not empty, and nothing is overwritten"):
        convert_model(given, taken)
    work = tmp_path / "out.partial"
    (work / "step_00000002").mkdir(parents=True)
    (work / "settings.yaml").write_text(f"model: {given.model}\nbatch_size: 3\n")
    with pytest.raises(ConversionError, match=r"out\.partial holds an unfinished conversion; go on with it \(--resume"):
        convert_model(given, tmp_path / "out")
    with pytest.raises(ConversionError, match=r"other settings; in it,.*\n(.|\n)*batch_size: 3 != 4"):
        convert_model(given, tmp_path / "out", resume=True)


def test_a_diverging_stage_says_what_to_lower(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original: Callable[..., Any] = Distillation.__call__

    def broken(self: Distillation, layer: int, *rest: Any) -> None:
        original(self, layer, *rest)
        self.losses[layer] = self.losses[layer] * float("nan")

    monkeypatch.setattr(Distillation, "__call__", broken)
    with pytest.raises(ConversionError, match=r"stage 1 diverged at step 0(.|\n)*lower distillation\.learning_rate"):
        convert_model(settings(tmp_path, text), tmp_path / "out")


def test_a_stage_that_diverged_unseen_is_named(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(tmp_path, text)
    monkeypatch.setattr(Conversion, "_distil", lambda self: self.model.maps().popitem()[1].detach().fill_(float("nan")))
    with pytest.raises(ConversionError, match=r"stage 1 diverged unnoticed(.|\n)*lower distillation\.learning_rate"):
        convert_model(given, tmp_path / "out")


def test_a_perplexity_beyond_float64_is_infinite() -> None:
    assert Score(800.0, 1).perplexity == math.inf


def test_settings_that_cannot_work(tmp_path: Path, text: Path) -> None:
    given = settings(tmp_path, text)

    def refuse(match: str, kind: type[Exception] = ConfigError, family: str = "gpt2", **changes: Any) -> None:
        with pytest.raises(kind, match=match):
            convert_model(settings(tmp_path, text, family, **changes), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists(), "it would be in the way of the next attempt"

    replace = msgspec.structs.replace
    refuse("sequence_length=65 is more than the model's 64 positions", data=replace(given.data, sequence_length=65))
    refuse("has no tokenizer with it; name one", data=replace(given.data, tokenizer="model"))
    refuse("there is no held-out text", data=replace(given.data, validation_fraction=0.0))
    refuse("has no mask token; give its id as mask_token", family="bert")
    refuse("mask_token=900 is beyond the model's 260 ids", family="bert", mask_token=900)
    refuse("last 32 tokens only", ConversionError, "mistral", data=replace(given.data, sequence_length=40))
    refuse("hub name, since there is no such folder, '/nowhere'", ConversionError, model="/nowhere")
    refuse("hedgehog_split", ConversionError,
           attention=AttentionSettings(kind="hedgehog_window", feature_map="hedgehog_exp"))  # fmt: skip
    refuse(r"feature_dim=64 is more than the head", ConversionError, attention=AttentionSettings(feature_dim=64))
    refuse("device='gpu' is no device", device="gpu")
    if not torch.cuda.is_available():
        refuse("device='cuda', but PyTorch .* finds no CUDA", device="cuda")
    refuse("unknown feature map 'softmaxx'", ValueError, attention=AttentionSettings(feature_map="softmaxx"))


def test_the_command(tmp_path: Path, text: Path) -> None:
    given = settings(tmp_path, text)
    run, out = CliRunner(), tmp_path / "out"
    common = ["hedgehog", given.model, str(out)]
    result = run.invoke(app, common)
    assert "no text to learn from; give --data" in str(result.exception)
    result = run.invoke(app, [*common, "--data", str(text), "--kind", "linear"])
    assert "--kind is 'linear'; expected one of hedgehog, hedgehog_window, softmax" in str(result.exception)
    result = run.invoke(app, [*common, "--data", str(text), "distilation.steps=3"])
    assert "distilation" in str(result.exception)
    assert "distillation" in str(result.exception)
    options = [
        "data.tokenizer=bytes", f"data.sequence_length={LENGTH}", f"data.cache={tmp_path / 'cache'}",
        "distillation.steps=2", "finetuning.method=none", "batch_size=2", "evaluation_rows=2", "device=cpu",
        "data.validation_fraction=0.3",
    ]  # fmt: skip
    result = run.invoke(app, [*common, "--data", str(text), "--kind", "hedgehog_window", *options])
    assert result.exit_code == 0, result.output
    assert "stage 1: feature maps, step 2 of 2" in result.output
    assert load(out).config.hedgehog["kind"] == "hedgehog_window"


def test_the_command_goes_on(tmp_path: Path, text: Path) -> None:
    class Kill(Progress):
        def message(self, text: str) -> None:
            if "distilled" in text:
                raise Killed

    given, out = settings(tmp_path, text), tmp_path / "out"
    result = CliRunner().invoke(app, ["hedgehog", given.model, str(out), "--resume"])
    assert "out.partial holds no conversion to go on with" in str(result.exception)
    with pytest.raises(Killed):
        convert_model(given, out, progress=Kill(None))
    result = CliRunner().invoke(app, ["hedgehog", "another-model", str(out), "--resume"])
    assert "'another-model'" in str(result.exception), "it would go on with a model that was not named"
    result = CliRunner().invoke(app, ["hedgehog", given.model, str(out), "--resume"])
    assert result.exit_code == 0, result.output
    assert "going on from" in result.output
    assert "stage 1:" not in result.output
    assert (out / "report.md").exists()


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_window_over_everything_is_the_teacher(family: str) -> None:
    options = {"scale_attn_by_inverse_layer_idx": True} if family == "gpt2" else {}
    model, ids = tiny(family, **options), tokens(2, 20)
    expected = model(ids).logits
    wide = perturb(swap_attention(model, AttentionSettings(kind="hedgehog_window", window=20))).double()
    torch.testing.assert_close(wide(ids).logits, expected, rtol=1e-9, atol=1e-9)
    with ablated(wide, "linear"):
        torch.testing.assert_close(wide(ids).logits, expected, rtol=1e-9, atol=1e-9)
    with ablated(wide, "window"):
        assert not torch.allclose(wide(ids).logits, expected, atol=1e-3)


@torch.no_grad()
def test_ablations_leave_one_part_and_come_back() -> None:
    model, ids = tiny("llama"), tokens(1, 20)
    hybrid = perturb(swap_attention(model, AttentionSettings(kind="hedgehog_window", window=4))).double()
    whole = hybrid(ids).logits
    found = {}
    for branch in ("window", "linear"):
        with ablated(hybrid, branch):
            found[branch] = hybrid(ids).logits
    assert not torch.allclose(found["window"], whole, atol=1e-4)
    assert not torch.allclose(found["linear"], whole, atol=1e-4)
    changed = ids.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 50 + 2
    with ablated(hybrid, "linear"):  # two layers of a window of 4 reach 6 tokens back
        torch.testing.assert_close(hybrid(changed).logits[:, 7:], found["linear"][:, 7:])
    assert torch.equal(hybrid(ids).logits, whole)


def test_rank_correlation_against_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 6, (5, 12), generator=generator).double()
    b = torch.randint(0, 6, (5, 12), generator=generator).double()
    seen = torch.ones(5, 12, dtype=torch.bool)
    seen[2, 9:] = False
    found = spearman(a, b, seen)

    def ranks(values: list[float]) -> list[float]:
        return [
            sum(other < value for other in values) + (sum(other == value for other in values) - 1) / 2
            for value in values
        ]

    for row in range(5):
        x, y = (torch.tensor(ranks(values[row][seen[row]].tolist())).double() for values in (a, b))
        expected = torch.corrcoef(torch.stack([x, y]))[0, 1]
        torch.testing.assert_close(found[row], expected, rtol=1e-12, atol=1e-12)
    assert spearman(a[:1], a[:1] ** 3, seen[:1]).item() == pytest.approx(1)
    assert spearman(a[:1], torch.ones_like(a[:1]), seen[:1]).item() == 0


def test_fidelity_of_softmax_with_itself() -> None:
    """A window over everything is softmax: no divergence, one entropy, perfect order."""
    model = swap_attention(tiny("gpt2"), AttentionSettings(kind="hedgehog_window", window=30))
    ids = tokens(2, 20)
    for row in fidelity(model, [Batch(ids, ids)], torch.device("cpu")):
        assert abs(row["kl"]) < 1e-6
        assert row["student_entropy"] == pytest.approx(row["teacher_entropy"], abs=1e-6)
        assert row["spearman"] > 0.99  # equal up to rounding, which may swap two neighbours
    linear = swap_attention(tiny("gpt2"), AttentionSettings())
    for row in fidelity(linear, [Batch(ids, ids)], torch.device("cpu")):
        assert row["kl"] > 0.1
        assert row["student_entropy"] > row["teacher_entropy"]


def test_the_recovered_share() -> None:
    assert recovered(1.0, 3.0, 1.5) == 0.75
    assert recovered(1.0, 1.0, 0.9) is None


def test_a_corpus_that_changed_is_noticed(tmp_path: Path, text: Path) -> None:
    given = settings(tmp_path, text)

    class Kill(Progress):
        def message(self, text: str) -> None:
            if "distilled" in text:
                raise Killed

    with pytest.raises(Killed):
        convert_model(given, tmp_path / "out", progress=Kill(None))
    (text / "0.txt").write_text("other words " * 60)
    with pytest.raises(RuntimeError, match="made from another text"):
        convert_model(given, tmp_path / "out", resume=True)
