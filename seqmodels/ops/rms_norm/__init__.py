"""RMSNorm over the last dimension, one pass over memory each way on the CPU."""

from seqmodels.ops.rms_norm.op import rms_norm

__all__ = ["rms_norm"]
