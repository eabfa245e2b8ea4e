"""Product-key memory: a table of values looked up by exact nearest keys."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import dropout, embedding_bag, rms_norm, silu

from seqmodels.channel.base import TokenwiseChannel
from seqmodels.layout import Layout
from seqmodels.mixers.base import MixerOutput, ParameterHint, check_positive
from seqmodels.ops.registration import state_dtype
from seqmodels.state import EmptyState


class ProductKeyMemory(TokenwiseChannel):
    r"""A memory of n^2 values behind pairs of sub-keys (Lample et al., arXiv:1907.05242, section 3).

    .. code-block:: text

        q = N(W_q x), for each head two halves;   s1 = K1 q1,  s2 = K2 q2          n scores each
        top = the k largest of s1[i] + s2[j],     w = softmax over them            in float32
        o = sum over heads and top of w V[i n + j]
        y = sigmoid(w_g . x - 2) W_out (o * silu(W_s x))

    with N a root mean square norm over a head's query. The k best sums are found exactly from the k best of each
    half, since both halves of a best pair are among these: 2 n products instead of n^2. The gate and
    the output follow Memory+ (arXiv:2412.09764, section 3).

    Args:
        d_model: width.
        num_heads: queries of a token.
        top_k: values that a query reads, at most n.
        query_dim: width of a head's query, even.
        num_subkeys: n, sub-keys a half; the table has n^2 rows.
        value_dim: width of a value; d_model when omitted.
        dropout: on the output, in training.
        value_learning_rate: an upper bound for the table's own (1e-3 in Memory+). The table is not decayed.
        sparse: the table's gradient is a sparse tensor with each row read once, and the training loop takes Adam's step
            on those rows alone (``torch.optim.SparseAdam``'s equations); AdamW also moves rows that were not read,
            by their decaying moments. It pays while a step reads less than about half of the rows; the two
            moments are as large as the table either way. FSDP2 and torch.compile make no sparse gradients.

    ``aux``: ``touched``, share of the rows read in this call; ``usage_divergence``, KL of the rows' weights from
    uniform (nats; 0 is even, 2 log n is one row alone); ``gate``, its mean.

    Raises:
        ValueError: sizes below 1, an odd query width, top_k above n, a dropout outside [0, 1).
    """

    residual_outputs: ClassVar[tuple[str, ...]] = ("out_proj.weight",)

    def __init__(
        self,
        d_model: int,
        *,
        num_heads: int = 4,
        top_k: int = 32,
        query_dim: int = 256,
        num_subkeys: int = 512,
        value_dim: int | None = None,
        dropout: float = 0.05,
        value_learning_rate: float = 1e-3,
        sparse: bool = False,
    ) -> None:
        super().__init__(d_model)
        name = type(self).__name__
        value_dim = d_model if value_dim is None else value_dim
        check_positive(
            name, num_heads=num_heads, top_k=top_k, query_dim=query_dim, num_subkeys=num_subkeys, value_dim=value_dim
        )
        if query_dim % 2:
            raise ValueError(f"{name}: query_dim is {query_dim}; expected an even number, one half for each sub-key")
        if top_k > num_subkeys:
            raise ValueError(
                f"{name}: top_k is {top_k} of num_subkeys={num_subkeys}; expected at most num_subkeys, from which "
                "each half's best are taken"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"{name}: dropout is {dropout}; expected a share in [0, 1)")
        self.num_heads, self.top_k, self.num_subkeys = num_heads, top_k, num_subkeys
        self.dropout, self.sparse = dropout, sparse
        self.query_proj = nn.Linear(d_model, num_heads * query_dim, bias=False)
        self.query_norm = nn.Parameter(torch.empty(query_dim))
        self.subkeys = nn.Parameter(torch.empty(2, num_heads, num_subkeys, query_dim // 2))
        self.values = nn.Parameter(torch.empty(num_subkeys**2, value_dim))
        self.swish_proj = nn.Linear(d_model, value_dim, bias=False)
        self.out_proj = nn.Linear(value_dim, d_model, bias=False)
        self.gate_proj = nn.Linear(d_model, 1, bias=False)
        self.parameter_hints = {  # type: ignore[misc]
            "values": ParameterHint(weight_decay=0.0, learning_rate=value_learning_rate, sparse_gradient=sparse),
            "subkeys": ParameterHint(weight_decay=0.0),
        }
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Sub-keys uniform within 1 / sqrt(query_dim / 2), values N(0, 1 / value_dim)."""
        self.query_norm.fill_(1.0)
        bound = 1 / math.sqrt(self.subkeys.shape[-1])
        self.subkeys.uniform_(-bound, bound)
        self.values.normal_(std=1 / math.sqrt(self.values.shape[1]))

    def forward(
        self, x: Tensor, state: Any = None, *, layout: Layout | None = None, return_state: bool = False
    ) -> MixerOutput:
        self.check_input(x, state, layout)
        self.check_empty(state)
        y, rows, weights, gate = self._read(x)
        with torch.no_grad():
            aux = self._usage(rows, weights, gate, None if layout is None else layout.valid)
        return MixerOutput(y, EmptyState() if return_state else None, aux)

    def transform(self, x: Tensor) -> Tensor:
        return self._read(x)[0]

    def _read(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """y, and the rows, weights and gates behind it."""
        rows, weights = self.lookup(x)
        bags, share = rows.flatten(0, -3).flatten(1), weights.flatten(0, -3).flatten(1).to(self.values.dtype)
        table = self.values.detach() if self.sparse else self.values
        read = embedding_bag(bags, table, mode="sum", per_sample_weights=share)
        if self.sparse:
            read = _SparseGradient.apply(read, self.values, bags, share.detach())
        read = read.view(*x.shape[:-1], -1)
        out = self.out_proj(read.to(x.dtype) * silu(self.swish_proj(x)))
        gate = torch.sigmoid(self.gate_proj(x) - 2)
        return gate * dropout(out, self.dropout, self.training), rows, weights, gate.squeeze(-1)

    def lookup(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rows that each token reads and their weights, (..., num_heads, top_k), the best first.

        x is (..., d_model). The weights are float32 (float64) and carry the gradient.
        """
        query = self.query_proj(x).unflatten(-1, (self.num_heads, -1)).to(state_dtype(x.dtype))
        query = rms_norm(query, query.shape[-1:], self.query_norm.to(query.dtype))
        halves = query.unflatten(-1, (2, -1)).movedim(-2, 0)  # (2, ..., heads, half)
        with torch.autocast(x.device.type, enabled=False):
            scores = torch.einsum("z...hd,zhnd->z...hn", halves, self.subkeys.to(query.dtype))
        best, index = scores.topk(self.top_k, dim=-1)
        first, second = self._best_pairs(best)
        top = best[0].gather(-1, first) + best[1].gather(-1, second)
        rows = index[0].gather(-1, first) * self.num_subkeys + index[1].gather(-1, second)
        return rows, top.softmax(-1)

    @torch.no_grad()
    def _best_pairs(self, best: Tensor) -> tuple[Tensor, Tensor]:
        """Places in both halves' descending scores (2, ..., top_k) of the top_k largest sums.

        The pair of places (i, j) has (i + 1)(j + 1) - 1 others that are at least as large, so only those with
        (i + 1)(j + 1) <= top_k can be among the best: 119 of 1024 for a top_k of 32.
        """
        place = torch.arange(self.top_k, device=best.device)
        counts = torch.div(self.top_k, place + 1, rounding_mode="floor")  # of second places for each first one
        total = self._num_pairs
        first = place.repeat_interleave(counts, output_size=total)
        second = torch.arange(total, device=best.device) - (counts.cumsum(0) - counts)[first]
        sums = best[0].index_select(-1, first) + best[1].index_select(-1, second)
        chosen = sums.topk(self.top_k, dim=-1).indices
        return first[chosen], second[chosen]

    @property
    def _num_pairs(self) -> int:
        """Pairs of places that can be among the best."""
        return sum(self.top_k // (i + 1) for i in range(self.top_k))

    def flops(self, length: int) -> int:
        heads, k, half = self.num_heads, self.top_k, self.subkeys.shape[-1]
        scores = 2 * heads * 2 * half * self.num_subkeys
        read = 2 * heads * k * self.values.shape[1]
        return super().flops(length) + length * (scores + heads * self._num_pairs + read)

    def _usage(self, rows: Tensor, weights: Tensor, gate: Tensor, valid: Tensor | None) -> dict[str, Tensor]:
        table = self.values.shape[0]
        if valid is not None:
            weights, gate = torch.where(valid[..., None, None], weights, 0), torch.where(valid, gate, 0)
        mass = torch.zeros(table, dtype=weights.dtype, device=weights.device)
        mass = mass.index_add(0, rows.flatten(), weights.flatten())
        share = mass / mass.sum().clamp_min(torch.finfo(mass.dtype).tiny)
        tokens = gate.numel() if valid is None else valid.sum().clamp_min(1)
        return {
            "touched": (mass > 0).sum() / table,
            "usage_divergence": math.log(table) - torch.special.entr(share).sum(),
            "gate": gate.sum() / tokens,
        }

    def extra_repr(self) -> str:
        return (
            f"{self.d_model}, num_heads={self.num_heads}, top_k={self.top_k}, num_subkeys={self.num_subkeys}, "
            f"value_dim={self.values.shape[1]}"
        )


class _SparseGradient(torch.autograd.Function):
    """read unchanged, where read = sum_j share[:, j] table[bags[:, j]]; the table's gradient has each row read once.

    PyTorch's own sparse gradient has an entry for each read: larger than the table where tokens x heads x top_k are
    more than its rows. The gradient of a bag of rows is a bag of tokens: those that read row r, each times its share.
    """

    @staticmethod
    def forward(ctx: Any, read: Tensor, table: Tensor, bags: Tensor, share: Tensor) -> Tensor:
        ctx.save_for_backward(bags, share)
        ctx.shape = table.shape
        return read.view_as(read)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        bags, share = ctx.saved_tensors
        chosen, order = bags.flatten().sort(stable=True)
        rows, counts = torch.unique_consecutive(chosen, return_counts=True)
        values = embedding_bag(
            order // bags.shape[1], gradient.contiguous(), counts.cumsum(0) - counts, mode="sum",
            per_sample_weights=share.flatten()[order],
        )  # fmt: skip
        # Rows are in order and there once: nothing to check, and later nothing to coalesce.
        table = torch.sparse_coo_tensor(rows[None], values, ctx.shape, is_coalesced=True, check_invariants=False)
        return gradient, table, None, None
