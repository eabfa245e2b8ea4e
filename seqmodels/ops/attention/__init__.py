"""Softmax attention, causal or both ways: whole sequences, documents, windows, carried caches and decode steps."""

from seqmodels.ops.attention.cache import append_to_cache, check_fits, empty_cache
from seqmodels.ops.attention.op import attention, attention_step

__all__ = ["append_to_cache", "attention", "attention_step", "check_fits", "empty_cache"]
