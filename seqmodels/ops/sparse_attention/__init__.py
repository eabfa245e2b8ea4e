"""Sparse global attention: a local window and the best-scored tokens of earlier blocks."""

from seqmodels.ops.sparse_attention.advance import advance
from seqmodels.ops.sparse_attention.op import sparse_attention, sparse_attention_step
from seqmodels.ops.sparse_attention.selection import select_globals
from seqmodels.ops.sparse_attention.state import SparseCache, empty

__all__ = ["SparseCache", "advance", "empty", "select_globals", "sparse_attention", "sparse_attention_step"]
