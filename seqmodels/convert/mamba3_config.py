"""Configurations of released Mamba-3 checkpoints and of this library, into each other."""

from __future__ import annotations

from typing import Any

from seqmodels.channel import SwiGLU
from seqmodels.convert.files import ConversionError
from seqmodels.mixers.mamba3 import A_FLOOR, Mamba3
from seqmodels.models import ModelConfig
from seqmodels.models.arguments import default_arguments
from seqmodels.models.config import LayerSpec

MLP_MULTIPLE = 128  # released code rounds the MLP's width up to it
# ssm_cfg's names for the layer's arguments; mimo_rank, is_mimo and the three below are dealt with apart.
ARGUMENTS = {
    "d_state": "d_state",
    "expand": "expand",
    "headdim": "head_dim",
    "ngroups": "num_groups",
    "rope_fraction": "rope_fraction",
    "dt_min": "dt_min",
    "dt_max": "dt_max",
    "dt_init_floor": "dt_init_floor",
    "is_outproj_norm": "out_norm",
}
SPEED_ONLY = ("chunk_size",)
MODEL_KEYS = {"d_model", "d_intermediate", "n_layer", "vocab_size", "ssm_cfg", "attn_layer_idx", "attn_cfg", "rms_norm",
              "residual_in_fp32", "fused_add_norm", "pad_vocab_size_multiple", "tie_embeddings"}  # fmt: skip
# What hubs add; no output depends on it.
REMARKS = {"architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path"}
EPSILON = 1e-5  # of the norms in front of the blocks; released code has no other


def config_from_released(released: dict[str, Any], chosen: dict[str, str]) -> ModelConfig:
    unknown = sorted(released.keys() - MODEL_KEYS - REMARKS)
    if unknown:
        raise ConversionError(
            f"config.json has unknown keys {', '.join(unknown)}; known: {', '.join(sorted(MODEL_KEYS))}"
        )
    missing = sorted({"d_model", "n_layer", "vocab_size", "ssm_cfg"} - released.keys())
    if missing:
        raise ConversionError(f"config.json lacks {', '.join(missing)}")
    d_model, n_layer, vocab_size = (_integer(released, name, 1) for name in ("d_model", "n_layer", "vocab_size"))
    d_intermediate = _integer(released, "d_intermediate", 0, default=0)
    multiple = _integer(released, "pad_vocab_size_multiple", 1, default=8)
    if not isinstance(released["ssm_cfg"], dict):
        raise ConversionError(f"config.json: ssm_cfg is {released['ssm_cfg']!r}; expected an object")
    ssm = dict(released["ssm_cfg"])
    if ssm.pop("layer", None) != "Mamba3":
        raise ConversionError(f"config.json: ssm_cfg.layer is {released['ssm_cfg'].get('layer')!r}; expected 'Mamba3'")
    if released.get("attn_layer_idx"):
        raise ConversionError(
            f"config.json: attn_layer_idx is {released['attn_layer_idx']}; attention layers are not converted, "
            "and no released Mamba-3 checkpoint has any"
        )
    if not released.get("rms_norm", True):
        raise ConversionError("config.json: rms_norm is false; Mamba-3 checkpoints are normed by RMSNorm")
    arguments: dict[str, Any] = {ours: ssm.pop(theirs) for theirs, ours in ARGUMENTS.items() if theirs in ssm}
    rank = ssm.pop("mimo_rank", 4)
    arguments["mimo_rank"] = rank if ssm.pop("is_mimo", False) else None
    if ssm.pop("A_floor", A_FLOOR) != A_FLOOR:
        raise ConversionError(f"config.json: ssm_cfg.A_floor is not {A_FLOOR}")
    rest = sorted(ssm.keys() - set(SPEED_ONLY))
    if rest:
        raise ConversionError(f"config.json: ssm_cfg has unknown keys {', '.join(rest)}")
    hidden = -(-d_intermediate // MLP_MULTIPLE) * MLP_MULTIPLE
    return ModelConfig(
        vocab_size=-(-vocab_size // multiple) * multiple,
        d_model=d_model,
        pattern=f"{n_layer}x(mamba3{' swiglu' if hidden else ''})",
        layers={"mamba3": default_arguments(Mamba3) | arguments | chosen}
        | ({"swiglu": {"d_hidden": hidden}} if hidden else {}),
        residual_in_float32=released.get("residual_in_fp32", True),
        tie_head=released.get("tie_embeddings", True),
    )


def _integer(released: dict[str, Any], name: str, least: int, default: int | None = None) -> int:
    value = released.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConversionError(f"config.json: {name} is {value!r}; expected an integer of at least {least}")
    return value


def uniform_stack(config: ModelConfig) -> tuple[dict[str, Any], int]:
    """The arguments of every mixer and the width of every MLP (0: none), or an error that names the odd block."""
    if config.norm != "rms" or config.norm_place != "pre":
        raise ConversionError(f"released models have an RMSNorm in front of each block; norm is {config.norm!r}, "
                              f"norm_place {config.norm_place!r}")  # fmt: skip
    if config.norm_epsilon != EPSILON:
        raise ConversionError(
            f"norm_epsilon is {config.norm_epsilon}; released code has {EPSILON} and no option for it"
        )
    if config.meta_tokens:
        raise ConversionError(f"meta_tokens is {config.meta_tokens}; released models have none")
    blocks = config.block_specs()
    expected = [blocks[0].layers, *([blocks[1].layers] if len(blocks) > 1 and _name(blocks[1]) != "mamba3" else [])]
    for index, block in enumerate(blocks):
        if block.layers != expected[index % len(expected)] or block.share is not None or not block.is_plain:
            raise ConversionError(f"{block.where}: released models repeat one block; this one is another")
    if len(blocks) % len(expected) or [_name(blocks[i]) for i in range(len(expected))] not in (
        ["mamba3"],
        ["mamba3", "swiglu"],
    ):
        raise ConversionError("released models are mamba3, or mamba3 and swiglu in turn; this model is not")
    arguments = default_arguments(Mamba3) | blocks[0].layers[0].arguments
    for name, value in (("rotation", "data_dependent"), ("trapezoid", True)):
        if arguments[name] != value:
            raise ConversionError(f"mamba3: {name} is {arguments[name]!r}, which released code does not know")
    if len(expected) == 1:
        return arguments, 0
    hidden = _hidden_width(config, blocks[1].layers[0])
    if hidden % MLP_MULTIPLE:
        raise ConversionError(
            f"swiglu: d_hidden is {hidden}; released code rounds it up to a multiple of {MLP_MULTIPLE}"
        )
    return arguments, hidden


def _name(block: Any) -> str:
    return block.layers[0].name if len(block.layers) == 1 else ">".join(layer.name for layer in block.layers)


def _hidden_width(config: ModelConfig, spec: LayerSpec) -> int:
    layer = SwiGLU(config.d_model, **spec.arguments, device="meta")
    if any(name.endswith("bias") for name in layer.state_dict()):
        raise ConversionError("swiglu: released models have no bias")
    return layer.d_hidden


def config_to_released(config: ModelConfig, arguments: dict[str, Any], d_intermediate: int) -> dict[str, Any]:
    rank = arguments["mimo_rank"]
    ssm = {"layer": "Mamba3", **{theirs: arguments[ours] for theirs, ours in ARGUMENTS.items()}}
    ssm |= {"is_mimo": rank is not None, **({} if rank is None else {"mimo_rank": rank})}
    return {
        "d_model": config.d_model,
        "d_intermediate": d_intermediate,
        "n_layer": sum(_name(block) == "mamba3" for block in config.block_specs()),
        "vocab_size": config.vocab_size,
        "ssm_cfg": ssm,
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_float32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": config.tie_head,
    }
