"""silu(gate) * up, one pass over memory each way on the CPU."""

from seqmodels.ops.swiglu.op import swiglu

__all__ = ["swiglu"]
