"""Pretrained softmax transformers into linear attention (Hedgehog) or its hybrid with a window (LoLCATs)."""

from __future__ import annotations

try:
    import transformers  # noqa: F401 - asked for by name, so that the error says what to install
except ImportError as error:
    raise ImportError(
        "converting and loading converted models needs transformers >= 5.23: pip install 'transformers>=5.23,<6' peft"
    ) from error

from seqmodels.convert.hedgehog.cache import HedgehogCache
from seqmodels.convert.hedgehog.models import HedgehogModel, load, swap_attention
from seqmodels.convert.hedgehog.settings import AttentionSettings, ConversionSettings

__all__ = ["AttentionSettings", "ConversionSettings", "HedgehogCache", "HedgehogModel", "load", "swap_attention"]
