"""Linear maps of a decode step: a few rows, the weights read once."""

from seqmodels.ops.token_linear.op import apply_linear, token_linear

__all__ = ["apply_linear", "token_linear"]
