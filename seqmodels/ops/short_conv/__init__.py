"""Short causal depthwise convolution with carried state."""

from seqmodels.ops.short_conv.op import short_conv, short_conv_step

__all__ = ["short_conv", "short_conv_step"]
