"""Released Mamba-3 folders into this library's format and back, on random checkpoints of the released layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from seqmodels.cli import app
from seqmodels.convert.files import ConversionError
from seqmodels.convert.mamba3 import from_released, to_released
from seqmodels.mixers import Mamba3
from seqmodels.models import LanguageModel, ModelConfig
from seqmodels.models.loading import load_model, save_model

CHOICES = {"pairing": "adjacent", "a_activation": "heavy_tail"}
SIZES = {"180m": (768, 1536, 1264), "440m": (1024, 2048, 1792), "880m": (1536, 3072, 2800), "1.5b": (2048, 4096, 3824)}


def released_tensors(config: dict, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random tensors by the published names and shapes (written from the specification, not from this library)."""
    d, ssm = config["d_model"], config["ssm_cfg"]
    N, P, G = ssm.get("d_state", 128), ssm.get("headdim", 64), ssm.get("ngroups", 1)
    R = ssm["mimo_rank"] if ssm.get("is_mimo") else 1
    E = ssm.get("expand", 2) * d
    H, A = E // P, int(N * ssm.get("rope_fraction", 0.5)) // 2
    width = -(-config["d_intermediate"] // 128) * 128
    shapes = {"backbone.embedding.weight": (config["vocab_size"], d), "backbone.norm_f.weight": (d,)}
    for i in range(config["n_layer"]):
        layer = f"backbone.layers.{i}"
        shapes |= {
            f"{layer}.norm.weight": (d,),
            f"{layer}.norm2.weight": (d,),
            f"{layer}.mlp.fc1.weight": (2 * width, d),
            f"{layer}.mlp.fc2.weight": (d, width),
            f"{layer}.mixer.in_proj.weight": (2 * E + 2 * R * G * N + 3 * H + A, d),
            f"{layer}.mixer.dt_bias": (H,),
            f"{layer}.mixer.B_bias": (H, R, N),
            f"{layer}.mixer.C_bias": (H, R, N),
            f"{layer}.mixer.B_norm.weight": (N,),
            f"{layer}.mixer.C_norm.weight": (N,),
            f"{layer}.mixer.D": (H,),
            f"{layer}.mixer.out_proj.weight": (d, E),
        }
        if ssm.get("is_mimo"):
            shapes |= {f"{layer}.mixer.{name}": (H, R, P) for name in ("mimo_x", "mimo_z", "mimo_o")}
        if ssm.get("is_outproj_norm"):
            shapes[f"{layer}.mixer.norm.weight"] = (E,)
    float32 = ("dt_bias", "B_bias", "C_bias", ".D", "mimo_x", "mimo_z", "mimo_o")
    tensors = {}
    for name, shape in shapes.items():
        values = torch.rand(shape, dtype=torch.float32 if name.endswith(float32) else dtype)
        tensors[name] = (values - 0.5) * (2 / shape[-1] ** 0.5 if len(shape) == 2 else 2)
    tensors["lm_head.weight"] = tensors["backbone.embedding.weight"].clone()
    return tensors


def small_config(**ssm: object) -> dict:
    return {
        "d_model": 32, "d_intermediate": 100, "n_layer": 2, "vocab_size": 24, "attn_layer_idx": [], "attn_cfg": {},
        "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8,
        "tie_embeddings": True, "ssm_cfg": {"layer": "Mamba3", "d_state": 12, "headdim": 16, "chunk_size": 64, **ssm},
    }  # fmt: skip


def write_released(
    folder: Path, config: dict, tensors: dict[str, Tensor], *, safetensors: bool = False, shards: int = 1
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    whole = "model.safetensors" if safetensors else "pytorch_model.bin"
    stem, _, suffix = whole.partition(".")
    places = {}
    for shard in range(shards):
        file = whole if shards == 1 else f"{stem}-{shard + 1:05}-of-{shards:05}.{suffix}"
        part = {name: tensor for index, (name, tensor) in enumerate(tensors.items()) if index % shards == shard}
        save_file(part, folder / file) if safetensors else torch.save(part, folder / file)
        places |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / f"{whole}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def released_logits(config: dict, tensors: dict[str, Tensor], tokens: Tensor, **options: object) -> Tensor:
    """The released block in plain PyTorch; the mixers take their tensors with strict=True."""

    def norm(h: Tensor, name: str) -> Tensor:
        return F.rms_norm(h, h.shape[-1:], tensors[f"backbone.{name}.weight"], 1e-5)

    ssm = config["ssm_cfg"]
    h = F.embedding(tokens, tensors["backbone.embedding.weight"])
    for i in range(config["n_layer"]):
        mixer = Mamba3(
            config["d_model"], d_state=ssm["d_state"], head_dim=ssm["headdim"], num_groups=ssm.get("ngroups", 1),
            mimo_rank=ssm.get("mimo_rank"), rope_fraction=ssm.get("rope_fraction", 0.5),
            out_norm=ssm.get("is_outproj_norm", False), **options,
        )  # fmt: skip
        prefix = f"backbone.layers.{i}.mixer."
        mixer.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, strict=True
        )
        h = h + mixer(norm(h, f"layers.{i}.norm")).y
        value, gate = (norm(h, f"layers.{i}.norm2") @ tensors[f"backbone.layers.{i}.mlp.fc1.weight"].T).chunk(2, dim=-1)
        h = h + (value * F.silu(gate)) @ tensors[f"backbone.layers.{i}.mlp.fc2.weight"].T
    return norm(h, "norm_f") @ tensors["lm_head.weight"].T


VARIANTS = {
    "siso": dict(),
    "mimo": dict(is_mimo=True, mimo_rank=3, ngroups=2),
    "norm-full-rope": dict(is_outproj_norm=True, rope_fraction=1.0),
}


@pytest.mark.parametrize("safetensors", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_there_and_back(tmp_path: Path, variant: str, safetensors: bool) -> None:
    config = small_config(**VARIANTS[variant])
    tensors = released_tensors(config)
    pairing = "half" if variant == "mimo" else "adjacent"
    source = write_released(tmp_path / "released", config, tensors, safetensors=safetensors)
    report = from_released(source, tmp_path / "ours", pairing=pairing, a_activation="softplus")
    assert sorted(entry.source for entry in report) == sorted(tensors)

    tokens = torch.randint(0, 24, (2, 19))
    model = load_model(tmp_path / "ours").model
    with torch.no_grad():
        expected = released_logits(config, tensors, tokens, pairing=pairing, a_activation="softplus")
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)

    to_released(tmp_path / "ours", tmp_path / "back")
    back = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(back[name], tensor), name
    # The sidecar answers both questions.
    from_released(tmp_path / "back", tmp_path / "again")
    again = load_model(tmp_path / "again").model
    assert again.config == model.config


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mimo", [False, True])
def test_published_sizes_at_one_layer(tmp_path: Path, size: str, mimo: bool) -> None:
    d, siso_width, mimo_width = SIZES[size]
    config = small_config(**({"is_mimo": True, "mimo_rank": 4} if mimo else {}))
    config |= {"d_model": d, "n_layer": 1, "d_intermediate": mimo_width if mimo else siso_width, "vocab_size": 16}
    config["ssm_cfg"] |= {"d_state": 128, "headdim": 64}
    tensors = released_tensors(config, torch.bfloat16)
    source = write_released(tmp_path / "released", config, tensors)
    report = from_released(source, tmp_path / "ours", pairing="half" if mimo else "adjacent", a_activation="heavy_tail")
    assert len(report) == len(tensors)
    state = load_model(tmp_path / "ours").model.state_dict()
    assert state["backbone.blocks.0.layer.in_proj.weight"].dtype == torch.bfloat16
    assert state["backbone.blocks.0.layer.dt_bias"].dtype == torch.float32
    assert torch.equal(
        state["backbone.blocks.0.layer.in_proj.weight"], tensors["backbone.layers.0.mixer.in_proj.weight"]
    )


@pytest.mark.parametrize("rank", [None, 2])
def test_other_pairing_is_permuted_on_the_way_out(tmp_path: Path, rank: int | None) -> None:
    """A SISO model with the half pairing becomes the adjacent one that released code computes; outputs stay."""
    ours = "half" if rank is None else "adjacent"
    mixer = {"d_state": 10, "head_dim": 8, "num_groups": 2, "mimo_rank": rank, "pairing": ours}
    config = ModelConfig(
        vocab_size=16, d_model=16, pattern="2x(mamba3 swiglu)", layers={"mamba3": mixer, "swiglu": {"d_hidden": 128}}
    )
    model = LanguageModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name or "norm" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
    save_model(model, tmp_path / "model")
    report = to_released(tmp_path / "model", tmp_path / "released")
    assert {entry.change for entry in report} == {"copied", "halves swapped", "lanes permuted", "tied"}
    from_released(tmp_path / "released", tmp_path / "again")
    again = load_model(tmp_path / "again").model
    assert again.config.layers["mamba3"]["pairing"] != ours
    tokens = torch.randint(0, 16, (2, 11))
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-5)


def test_asks_for_what_the_checkpoint_does_not_say(tmp_path: Path) -> None:
    config = small_config()
    source = write_released(tmp_path / "released", config, released_tensors(config))
    with pytest.raises(ConversionError, match=r"does not say its pairing.*--pairing adjacent or half"):
        from_released(source, tmp_path / "ours", a_activation="softplus")
    with pytest.raises(ConversionError, match=r"does not say its a_activation.*--a-activation heavy_tail or softplus"):
        from_released(source, tmp_path / "ours", pairing="adjacent")
    with pytest.raises(ConversionError, match="pairing is 'both'"):
        from_released(source, tmp_path / "ours", pairing="both", a_activation="softplus")
    (source / "seqmodels.json").write_text(json.dumps(CHOICES))
    with pytest.raises(ConversionError, match=r"seqmodels.json says 'heavy_tail'"):
        from_released(source, tmp_path / "ours", a_activation="softplus")
    assert not (tmp_path / "ours").exists()


def test_refuses_mismatches_by_name(tmp_path: Path) -> None:
    config = small_config()
    tensors = released_tensors(config)
    missing = "backbone.layers.1.mixer.dt_bias"
    wrong = "backbone.layers.0.mlp.fc2.weight"
    broken = {name: tensor for name, tensor in tensors.items() if name != missing}
    broken |= {wrong: tensors[wrong][:, :100].clone(), "backbone.layers.0.mixer.conv1d.weight": torch.ones(1)}
    source = write_released(tmp_path / "released", config, broken)
    with pytest.raises(ConversionError) as error:
        from_released(source, tmp_path / "ours", **CHOICES)
    assert f"{missing} is missing; expected (4,)" in str(error.value)
    assert f"{wrong} is (32, 100); expected (32, 128)" in str(error.value)
    assert "backbone.layers.0.mixer.conv1d.weight (1,) is not known" in str(error.value)
    untied = {**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1}
    with pytest.raises(ConversionError, match=r"lm_head.weight differs"):
        from_released(write_released(tmp_path / "untied", config, untied), tmp_path / "ours", **CHOICES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_layer_idx": [3]}, r"attn_layer_idx is \[3\]"),
        ({"rms_norm": False}, "rms_norm is false"),
        ({"dropout": 0.1}, "unknown keys dropout"),
        ({"ssm_cfg": {"layer": "Mamba2"}}, "ssm_cfg.layer is 'Mamba2'"),
        ({"ssm_cfg": {"layer": "Mamba3", "d_conv": 4}}, "ssm_cfg has unknown keys d_conv"),
    ],
)
def test_refuses_other_models(tmp_path: Path, change: dict, message: str) -> None:
    config = small_config()
    source = write_released(tmp_path / "released", config | change, released_tensors(config))
    with pytest.raises(ConversionError, match=message):
        from_released(source, tmp_path / "ours", **CHOICES)


@pytest.mark.parametrize(
    ("pattern", "layers", "message"),
    [
        ("mamba3 swiglu mamba2 swiglu", {"mamba2": {"head_dim": 8}}, "block 2"),
        ("mamba3 swiglu", {"swiglu": {"d_hidden": 100}}, "d_hidden is 100"),
        ("mamba3", {"mamba3": {"head_dim": 8, "rotation": "none"}}, "rotation is 'none'"),
    ],
)
def test_refuses_what_released_code_cannot_build(tmp_path: Path, pattern: str, layers: dict, message: str) -> None:
    config = ModelConfig(
        vocab_size=16,
        d_model=16,
        pattern=pattern,
        layers={"mamba3": {"head_dim": 8}, "swiglu": {"d_hidden": 128}} | layers,
    )
    save_model(LanguageModel(config), tmp_path / "model")
    with pytest.raises(ConversionError, match=message):
        to_released(tmp_path / "model", tmp_path / "released")


def test_command(tmp_path: Path) -> None:
    config = small_config()
    source = write_released(tmp_path / "released", config, released_tensors(config))
    options = ["--pairing", "adjacent", "--a-activation", "heavy_tail", "--tokenizer", "bytes"]
    result = CliRunner().invoke(app, ["convert", "mamba3", str(source), str(tmp_path / "ours"), *options])
    assert result.exit_code == 0, result.output
    assert "halves swapped" in result.output
    result = CliRunner().invoke(app, ["convert", "mamba3", str(tmp_path / "ours"), str(tmp_path / "back")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "back" / "seqmodels.json").is_file()


# ---- folders


@pytest.mark.parametrize("safetensors", [False, True])
def test_shards_are_the_whole(tmp_path: Path, safetensors: bool) -> None:
    config = small_config()
    tensors = released_tensors(config)
    whole = write_released(tmp_path / "whole", config, tensors, safetensors=safetensors)
    sharded = write_released(tmp_path / "sharded", config, tensors, safetensors=safetensors, shards=3)
    assert from_released(whole, tmp_path / "a", **CHOICES) == from_released(sharded, tmp_path / "b", **CHOICES)
    expected = load_model(tmp_path / "a").model.state_dict()
    for name, tensor in load_model(tmp_path / "b").model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    shard = next(sharded.glob("*-00002-of-00003.*"))
    shard.unlink()
    with pytest.raises(ConversionError, match=rf"names the shard '{shard.name}', which is not in"):
        from_released(sharded, tmp_path / "c", **CHOICES)
    assert not (tmp_path / "c").exists()


def test_index_and_shards_that_differ(tmp_path: Path) -> None:
    config = small_config()
    source = write_released(tmp_path / "released", config, released_tensors(config), shards=2)
    index = source / "pytorch_model.bin.index.json"
    places = json.loads(index.read_text())["weight_map"]
    other = {name: file for name, file in places.items() if name != "backbone.norm_f.weight"}
    index.write_text(json.dumps({"weight_map": other}))
    with pytest.raises(ConversionError, match=r"differ in backbone\.norm_f\.weight"):
        from_released(source, tmp_path / "ours", **CHOICES)
    index.write_text(json.dumps({"weight_map": {**places, "backbone.norm_f.weight": "../elsewhere.bin"}}))
    with pytest.raises(ConversionError, match=r"names the shard '\.\./elsewhere\.bin'"):
        from_released(source, tmp_path / "ours", **CHOICES)


def test_padded_vocabulary_untied_head_and_remarks(tmp_path: Path) -> None:
    config = small_config() | {"vocab_size": 19, "tie_embeddings": False, "architectures": ["MambaLMHeadModel"]}
    tensors = released_tensors(config | {"vocab_size": 24})
    tensors["lm_head.weight"] = tensors["lm_head.weight"].flip(0)
    source = write_released(tmp_path / "released", config, tensors)
    from_released(source, tmp_path / "ours", **CHOICES)
    model = load_model(tmp_path / "ours").model
    assert model.config.vocab_size == 24
    assert not model.config.tie_head
    tokens = torch.randint(0, 24, (2, 5))
    with torch.no_grad():
        expected = released_logits(config, tensors, tokens, **CHOICES)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    to_released(tmp_path / "ours", tmp_path / "back")
    back = torch.load(tmp_path / "back" / "pytorch_model.bin", weights_only=True)
    assert torch.equal(back["lm_head.weight"], tensors["lm_head.weight"])


class _NotATensor:
    pass


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({"backbone.norm_f.weight": _NotATensor()}, "damaged or holds more than tensors"),
        ({"model": {"backbone.norm_f.weight": torch.ones(2)}}, "'model' is a dict; expected a tensor"),
        ([torch.ones(2)], "holds a list; expected a mapping"),
        (b"", r"cannot read .*pytorch_model\.bin \(0 bytes\)"),
        (b"not a checkpoint", "damaged or holds more than tensors"),
    ],
)
def test_refuses_other_files(tmp_path: Path, contents: object, message: str) -> None:
    source = write_released(tmp_path / "released", small_config(), {})
    file = source / "pytorch_model.bin"
    file.write_bytes(contents) if isinstance(contents, bytes) else torch.save(contents, file)
    with pytest.raises(ConversionError, match=message):
        from_released(source, tmp_path / "ours", **CHOICES)


@pytest.mark.parametrize("safetensors", [False, True])
def test_refuses_a_truncated_file(tmp_path: Path, safetensors: bool) -> None:
    config = small_config()
    source = write_released(tmp_path / "released", config, released_tensors(config), safetensors=safetensors)
    file = source / ("model.safetensors" if safetensors else "pytorch_model.bin")
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ConversionError, match=r"cannot read .* It is truncated"):
        from_released(source, tmp_path / "ours", **CHOICES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": "32"}, "d_model is '32'; expected an integer of at least 1"),
        ({"d_intermediate": None}, "d_intermediate is None"),
        ({"pad_vocab_size_multiple": 0}, "pad_vocab_size_multiple is 0"),
        ({"ssm_cfg": None}, "ssm_cfg is None; expected an object"),
    ],
)
def test_refuses_other_values(tmp_path: Path, change: dict, message: str) -> None:
    source = write_released(tmp_path / "released", small_config() | change, {})
    with pytest.raises(ConversionError, match=message):
        from_released(source, tmp_path / "ours", **CHOICES)
    (source / "config.json").write_text("[1]")
    with pytest.raises(ConversionError, match=r"config\.json holds a list"):
        from_released(source, tmp_path / "ours", **CHOICES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_epsilon": 1e-6}, r"norm_epsilon is 1e-06; released code has 1e-05"),
        ({"meta_tokens": 2}, r"meta_tokens is 2; released models have none"),
    ],
)
def test_refuses_what_released_code_does_not_know(tmp_path: Path, change: dict, message: str) -> None:
    config = ModelConfig(vocab_size=16, d_model=16, pattern="mamba3", layers={"mamba3": {"head_dim": 8}}, **change)
    save_model(LanguageModel(config), tmp_path / "model")
    with pytest.raises(ConversionError, match=message):
        to_released(tmp_path / "model", tmp_path / "released")


def test_never_writes_over_anything(tmp_path: Path) -> None:
    config = small_config()
    source = write_released(tmp_path / "released", config, released_tensors(config))
    with pytest.raises(ConversionError, match="is a folder that is not empty"):
        from_released(source, source, **CHOICES)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConversionError, match="is a file"):
        from_released(source, tmp_path / "file", **CHOICES)
    (tmp_path / "empty").mkdir()
    from_released(source, tmp_path / "empty", **CHOICES)
    with pytest.raises(ConversionError, match="is a folder that is not empty"):
        to_released(tmp_path / "empty", source)
    assert sorted(path.name for path in source.iterdir()) == ["config.json", "pytorch_model.bin"]
    assert (tmp_path / "file").read_text() == "mine"


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    """Files may not grow beyond 16 KiB here: both directions fail in the middle of their weights."""
    resource = pytest.importorskip("resource")
    config = small_config()
    source = write_released(tmp_path / "released", config, released_tensors(config))
    from_released(source, tmp_path / "ours", **CHOICES)
    before = sorted(tmp_path.iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for convert in (
        lambda: from_released(source, tmp_path / "out", **CHOICES),
        lambda: to_released(tmp_path / "ours", tmp_path / "out"),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
        try:
            with pytest.raises(ConversionError, match=r"cannot write .*out: .*nothing was left there"):
                convert()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert sorted(tmp_path.iterdir()) == before
