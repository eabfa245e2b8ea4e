"""A softmax window and what a linear attention remembers of the tokens before it, under one normaliser."""

from seqmodels.ops.window_linear_attention.eviction import evicted_tokens
from seqmodels.ops.window_linear_attention.op import window_linear_attention, window_linear_attention_step

__all__ = ["evicted_tokens", "window_linear_attention", "window_linear_attention_step"]
