"""Channel modules: what sits between mixers. ``CHANNELS`` maps registry names to classes.

They obey the mixers' contract, so that a model treats both alike; one that treats every
token alone carries :class:`~seqmodels.state.EmptyState`.
"""

from __future__ import annotations

from typing import Any

from seqmodels.channel.base import TokenwiseChannel
from seqmodels.mixers.base import Registry

CHANNELS = Registry(
    "channel module",
    {
        "swiglu": "seqmodels.channel.swiglu:SwiGLU",
        "mlp": "seqmodels.channel.mlp:MLP",
        "chunk_moe": "seqmodels.channel.chunk_moe:ChunkMoE",
        "product_key_memory": "seqmodels.channel.product_key_memory:ProductKeyMemory",
        "glu": "seqmodels.channel.glu:GLU",
    },
)
register_channel = CHANNELS.register

_CLASSES = {path.partition(":")[2]: name for name, path in CHANNELS._paths.items()}
__all__ = ["CHANNELS", "TokenwiseChannel", "register_channel", *_CLASSES]


def __getattr__(name: str) -> Any:
    if name in _CLASSES:
        return CHANNELS[_CLASSES[name]]
    raise AttributeError(f"module 'seqmodels.channel' has no attribute {name!r}")
