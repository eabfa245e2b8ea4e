"""Convolution over time with kernels as long as the sequence."""

from seqmodels.ops.long_conv.op import long_conv

__all__ = ["long_conv"]
