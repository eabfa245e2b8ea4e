"""Cross-entropy of a linear head without whole logits; see :func:`.op.linear_cross_entropy`."""

from seqmodels.ops.linear_cross_entropy.op import IGNORE_INDEX, linear_cross_entropy

__all__ = ["IGNORE_INDEX", "linear_cross_entropy"]
