"""Pretrained softmax transformers into linear attention (Hedgehog) or its hybrid with a window (LoLCATs)."""

from __future__ import annotations

try:
    from transformers import __version__ as _version
except ImportError as error:
    raise ImportError(
        "converting and loading converted models needs transformers: pip install 'transformers>=5.20,<6' peft"
    ) from error
if not (5, 20) <= tuple(int(part) for part in _version.split(".")[:2]) < (6, 0):
    raise ImportError(
        f"transformers {_version} is installed; conversion is tested with 5.20 and 5.23, and attention and caches "
        "differ from version to version: pip install 'transformers>=5.20,<6'"
    )

from seqmodels.convert.hedgehog.cache import HedgehogCache
from seqmodels.convert.hedgehog.models import HedgehogModel, load, swap_attention
from seqmodels.convert.hedgehog.settings import AttentionSettings, ConversionSettings

__all__ = ["AttentionSettings", "ConversionSettings", "HedgehogCache", "HedgehogModel", "load", "swap_attention"]
