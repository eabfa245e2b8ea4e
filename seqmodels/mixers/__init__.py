"""Sequence layers. ``MIXERS`` maps registry names to classes; ``seqmodels.mixers.Name`` imports on use."""

from __future__ import annotations

from typing import Any

from seqmodels.mixers.base import Mixer, MixerOutput, ParameterHint, Registry

MIXERS = Registry(
    "mixer",
    {
        "attention": "seqmodels.mixers.attention:Attention",
        "sparse_global_attention": "seqmodels.mixers.sparse_global_attention:SparseGlobalAttention",
        "kv_shift_attention": "seqmodels.mixers.kv_shift_attention:KVShiftAttention",
        "linear_attention": "seqmodels.mixers.linear_attention:LinearAttention",
        "prefix_linear_attention": "seqmodels.mixers.prefix_linear_attention:PrefixLinearAttention",
        "based": "seqmodels.mixers.based:Based",
        "hedgehog": "seqmodels.mixers.hedgehog:Hedgehog",
        "hedgehog_window": "seqmodels.mixers.hedgehog_window:HedgehogWindow",
        "gated_conv": "seqmodels.mixers.gated_conv:GatedConv",
        "mamba2": "seqmodels.mixers.mamba2:Mamba2",
        "mamba3": "seqmodels.mixers.mamba3:Mamba3",
        "s4d": "seqmodels.mixers.s4d:S4D",
        "s4_ptd": "seqmodels.mixers.s4_ptd:S4PTD",
        "s4_dplr": "seqmodels.mixers.s4_dplr:S4DPLR",
        "s5": "seqmodels.mixers.s5:S5",
        "workspace": "seqmodels.mixers.workspace:Workspace",
        "hydra_diag": "seqmodels.mixers.hydra_diagonal:HydraDiagonal",
    },
)
register_mixer = MIXERS.register

_CLASSES = {path.partition(":")[2]: name for name, path in MIXERS._paths.items()}
__all__ = ["MIXERS", "Mixer", "MixerOutput", "ParameterHint", "register_mixer", *_CLASSES]


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return MIXERS[_CLASSES[name]]
    raise AttributeError(f"module 'seqmodels.mixers' has no attribute {name!r}")
