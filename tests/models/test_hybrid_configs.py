"""Stacks like published hybrids: the order of their layers and their parameters, counted from the published layouts."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from seqmodels.models import LanguageModel, ModelConfig, load_config

FOLDER = Path(__file__).parents[2] / "configs" / "models"


def build(name: str) -> LanguageModel:
    return LanguageModel(load_config(FOLDER / f"{name}.yaml"), device="meta")


def kinds(model: LanguageModel) -> list[str]:
    return [spec.name for spec, _, _ in model.backbone.named_layers()]


def mamba2(d: int, state: int, groups: int = 1, head: int = 64, kernel: int = 4) -> int:
    inner, heads = 2 * d, 2 * d // head
    conv = inner + 2 * groups * state
    return d * (inner + conv + heads) + conv * (kernel + 1) + 3 * heads + inner + inner * d


def attention(d: int, heads: int, key_heads: int, head: int) -> int:
    return d * head * (heads + 2 * key_heads) + heads * head * d


def test_jamba() -> None:
    model, d = build("jamba-like-52b"), 4096
    assert kinds(model)[::2] == ["attention" if i % 8 == 4 else "mamba2" for i in range(32)]
    assert kinds(model)[1::2] == ["chunk_moe" if i % 2 == 1 else "swiglu" for i in range(32)]
    mlp = 3 * d * 14336
    count = 28 * mamba2(d, 16) + 4 * attention(d, 32, 8, 128) + 16 * mlp + 16 * (16 * mlp + 16 * d)
    count += 2 * 65536 * d + 65 * d
    assert model.num_parameters() == count
    assert abs(count / 52e9 - 1) < 0.02
    unused = 16 * 14 * mlp
    assert abs((count - unused) / 12e9 - 1) < 0.02  # 12 billion take part in a token
    cache = model.state_bytes(256 * 1024) - model.state_bytes(1)
    assert cache == 4 * 2 * 8 * 128 * (256 * 1024 - 1) * 4  # 8 GiB in float32: the 4 GB at 16 bits


def test_zamba2() -> None:
    model, d = build("zamba2-like-2.7b"), 2560
    sequence, sites = kinds(model), []
    for index, kind in enumerate(sequence):
        if kind == "attention":
            assert sequence[index + 1] == "mlp"
            sites.append(sequence[:index].count("mamba2"))
    assert sites == [6, 12, 18, 24, 30, 36, 42, 47, 51]
    assert sequence.count("mamba2") == 54
    shares = [spec.share for spec in model.backbone.specs if spec.share is not None]
    assert shares[::2] == ["attention_a", "attention_b"] * 4 + ["attention_a"]
    assert shares[1::2] == ["mlp_a", "mlp_b"] * 4 + ["mlp_a"]
    shared = attention(d, 32, 32, 80) + 3 * d * 10240 + 2 * d
    assert model.num_parameters() == 54 * (mamba2(d, 64) + d) + 2 * shared + 32000 * d + d
    # One set of weights, a cache a site.
    assert model.state_bytes(1001) - model.state_bytes(1000) == 9 * 2 * 32 * 80 * 4


def test_samba() -> None:
    model, d = build("samba-like-421m"), 1536
    assert kinds(model) == ["mamba2", "swiglu", "attention", "swiglu"] * 6
    count = 6 * (mamba2(d, 16) + attention(d, 12, 12, 128) + 2 * 3 * d * 4096) + 32000 * d + 25 * d
    assert model.num_parameters() == count
    assert abs(count / 421e6 - 1) < 0.02
    assert model.state_bytes(4096) == model.state_bytes(1_000_000)


def test_griffin() -> None:
    model, d = build("griffin-like-7b"), 4096
    mixers = kinds(model)[::2]
    assert mixers == ["hydra_diag", "hydra_diag", "attention"] * 10 + ["hydra_diag"] * 2
    assert kinds(model)[1::2] == ["mlp"] * 32
    rotations = {spec.layers[0].arguments.get("rotary_fraction") for spec in model.backbone.specs[4::6]}
    assert rotations == {0.5}
    count = 22 * (5 * d * d + d) + 10 * attention(d, 32, 1, 128) + 32 * 3 * d * 3 * d + 256000 * d + 65 * d
    assert model.num_parameters() == count
    assert model.state_bytes(2048) == model.state_bytes(1_000_000)


def test_nemotron_h() -> None:
    model, d = build("nemotron-h-like-8b"), 4096
    letters = {"mamba2": "M", "attention": "*", "mlp": "-"}
    assert "".join(letters[kind] for kind in kinds(model)) == "M-M-M-M*-" + 3 * "M-M-M-M-M*-" + "M-M-M-M-M-"
    count = 24 * mamba2(d, 128, groups=8) + 4 * attention(d, 32, 8, 128) + 24 * 2 * d * 21504
    count += 2 * 131072 * d + 53 * d
    assert model.num_parameters() == count
    assert abs(count / 8e9 - 1) < 0.02


def test_mamba3_hybrid() -> None:
    model = build("mamba3-1.5b-hybrid")
    assert kinds(model)[::2] == (["mamba3"] * 5 + ["attention"]) * 4
    assert all(spec.layers[0].arguments["rotary_fraction"] == 0.0 for spec in model.backbone.specs[10::12])
    assert all(layer.norm is not None for spec, layer, _ in model.backbone.named_layers() if spec.name == "mamba3")
    d, inner, state, heads, angles = 2048, 4096, 128, 64, 32
    # z, x, B, C, step, decay, trapezoid, angles; biases of B and C and skips by head, norms of B and C, the norm before
    # the gate, and the way out
    mamba3 = d * (2 * inner + 2 * state + 3 * heads + angles) + 2 * heads * state + 2 * heads + 2 * state + inner
    mamba3 += inner * d
    count = 20 * mamba3 + 4 * 4 * d * d + 24 * 3 * d * 4096 + 128256 * d + 49 * d
    assert model.num_parameters() == count


def test_hymba() -> None:
    model, d = build("hymba-like-1.5b"), 1600
    specs = model.backbone.specs
    windows = [spec.paths[1].layers[0].arguments.get("window") for spec in specs[::2]]
    assert [site for site, window in enumerate(windows) if window is None] == [0, 15, 31]
    assert set(windows) == {None, 1024}
    assert kinds(model) == ["mamba2", "attention", "swiglu"] * 32
    count = 32 * (mamba2(d, 16) + attention(d, 25, 5, 64) + 3 * d * 5504 + 2 * d) + 32001 * d + d + 128 * d
    assert model.num_parameters() == count
    assert abs(count / 1.52e9 - 1) < 0.06  # the original shares the way out of its two paths
    # Beyond the windows only the three global layers grow; each windowed cache keeps 1024 tokens and the 128.
    assert model.state_bytes(10_001) - model.state_bytes(10_000) == 3 * 2 * 5 * 64 * 4
    inner = 2 * d
    recurrent = 32 * 4 * (3 * (inner + 2 * 16) + inner * 16)
    caches = 2 * 5 * 64 * 4 * (29 * (1024 + 128) + 3 * (10_000 + 128)) + 32 * 8
    assert model.state_bytes(10_000) == recurrent + caches


def test_every_layer_has_its_own_positions() -> None:
    """None, half and full rotation in one model: only what has none is blind to the order of earlier tokens."""
    words = {"none": 0.0, "half": 0.5, "full": 1.0}
    layers = {word: {"layer": "attention", "num_heads": 2, "rotary_fraction": part} for word, part in words.items()}
    together = LanguageModel(ModelConfig(vocab_size=9, d_model=16, pattern="none half full", layers=layers))
    assert [layer.rotary_dim for layer in together.backbone.layers()] == [0, 4, 8]
    order = torch.tensor([[2, 0, 3, 1, 4]])
    ids = torch.tensor([[5, 1, 7, 2, 3]])
    for word in words:
        torch.manual_seed(0)
        model = LanguageModel(ModelConfig(vocab_size=9, d_model=16, pattern=word, layers=layers), dtype=torch.float64)
        last, other = (model(text).logits[0, -1] for text in (ids, ids.gather(1, order)))
        assert torch.allclose(last, other, rtol=1e-12, atol=1e-14) == (word == "none")


@pytest.mark.parametrize(
    "name", ["hymba-like-1.5b", "jamba-like-52b", "griffin-like-7b", "samba-like-421m", "zamba2-like-2.7b"]
)
def test_files_say_what_differs(name: str) -> None:
    assert "# Other than the original: " in (FOLDER / f"{name}.yaml").read_text()


def test_the_page_lists_every_stack_with_its_parameters() -> None:
    text = (FOLDER.parents[1] / "docs" / "hybrids.md").read_text(encoding="utf-8")
    listed = {}
    for names, counts in re.findall(r"^\| (`[^|]*`) \| ([\d, ]+) \|", text, re.MULTILINE):
        listed |= dict(zip(re.findall(r"`(.*?)`", names), re.findall(r"[\d,]*\d", counts), strict=True))
    found = {name: f"{build(name).num_parameters():,}" for name in listed}
    assert listed == found
    stacks = {path.stem for path in FOLDER.glob("*.yaml") if re.search("like|jrt|based|1.5b-hybrid", path.stem)}
    assert set(listed) == stacks
