"""One matrix for each group of rows: the product that a mixture of experts is made of."""

from seqmodels.ops.grouped_linear.op import grouped_linear

__all__ = ["grouped_linear"]
