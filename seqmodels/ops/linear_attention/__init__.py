"""Linear attention with per-head scalar decay: the core op of most layers."""

from seqmodels.ops.linear_attention.op import linear_attention, linear_attention_state, linear_attention_step

__all__ = ["linear_attention", "linear_attention_state", "linear_attention_step"]
