"""What a conversion is judged by: held-out loss, and how near the student's attention is to the teacher's."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from seqmodels.convert.hedgehog.data import IGNORED, Batch
from seqmodels.convert.hedgehog.models import HedgehogModel
from seqmodels.convert.hedgehog.runtime import AttentionCall
from seqmodels.convert.hedgehog.softmax import softmax_weights, visible

_SMALL = 1e-12
_LARGEST_EXPONENT = 709.0  # math.exp raises above
_RANKED_QUERIES = 16  # of each row, evenly spread: every one is sorted
_RANKED_KEYS = 8  # fewest keys that a rank correlation is taken of


class Score(NamedTuple):
    """Mean loss over predicted tokens, in nats, and how many there were."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < _LARGEST_EXPONENT else math.inf


def task_loss(model: nn.Module, batch: Batch, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy of the batch's targets."""
    logits = model(input_ids=batch.tokens, use_cache=False).logits
    return cross_entropy(
        logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=IGNORED, reduction=reduction
    )


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> Score:
    """Held-out loss of ``model`` in evaluation mode."""
    model.eval()
    total, tokens = torch.zeros((), dtype=torch.float64, device=device), 0
    for batch in batches:
        total += task_loss(model, batch.to(device), reduction="sum").double()
        tokens += int((batch.targets != IGNORED).sum())
    return Score(float(total) / tokens, tokens)


class Fidelity:
    """Observer that compares weights: sums over layers, read with :meth:`table`.

    For each query (padding left out), with P the teacher's and A the student's weights:
    KL(P || A) = sum_j P_ij log(P_ij / A_ij) and the entropies of both, in nats; and Spearman's rank
    correlation of q_i . k_j with A_ij over the keys it sees, 1 where the student is monotone in the
    teacher's scores.
    """

    def __init__(self) -> None:
        self._sums: dict[int, dict[str, tuple[float, int]]] = {}

    def __call__(self, layer: int, core: Any, call: AttentionCall, teacher: Tensor) -> None:
        for index in range(call.q.shape[0]):
            self._add(layer, core, call.row(index))

    def _add(self, layer: int, core: Any, call: AttentionCall) -> None:
        target, student = softmax_weights(call), core.attention_weights(call.q, call.k, call.layout()).float()
        length = target.shape[-1]
        keep = torch.ones_like(target[..., 0], dtype=torch.bool)
        if call.key_mask is not None:
            keep = keep & call.key_mask[:, None]
        values = {
            "kl": (target * ((target + _SMALL) / (student + _SMALL)).log()).sum(-1),
            "teacher_entropy": _entropy(target),
            "student_entropy": _entropy(student),
        }
        for name, value in values.items():
            self._count(layer, name, value[keep])
        seen = visible(call)[:, None].expand_as(target)
        chosen = torch.zeros_like(keep)
        chosen[..., :: max(1, length // _RANKED_QUERIES)] = True
        rows = keep & chosen & (seen.sum(-1) >= _RANKED_KEYS)
        if rows.any():
            self._count(layer, "spearman", spearman(target[rows], student[rows], seen[rows]))

    def _count(self, layer: int, name: str, values: Tensor) -> None:
        total, count = self._sums.setdefault(layer, {}).get(name, (0.0, 0))
        self._sums[layer][name] = (total + float(values.double().sum()), count + values.numel())

    def table(self) -> list[dict[str, float]]:
        """Means, one mapping a layer."""
        return [
            {"layer": layer, **{name: total / count for name, (total, count) in sums.items()}}
            for layer, sums in sorted(self._sums.items())
        ]


@torch.no_grad()
def fidelity(model: HedgehogModel, batches: Iterable[Batch], device: torch.device) -> list[dict[str, float]]:
    """:class:`Fidelity` of every layer over ``batches``, the teacher's attention passed on."""
    observer = Fidelity()
    model.eval()
    with model.runtime.observed(observer):
        for batch in batches:
            model(input_ids=batch.tokens.to(device), use_cache=False)
    return observer.table()


def spearman(a: Tensor, b: Tensor, seen: Tensor) -> Tensor:
    """Rank correlation of each row of ``a`` with that of ``b`` (rows, entries) over the entries ``seen``.

    Equal entries share their mean rank. A row that is constant has no order; it counts as 0.
    """
    a, b = (_ranks(values, seen) for values in (a, b))
    count = seen.sum(-1, keepdim=True)
    a, b = (torch.where(seen, ranks - ranks.sum(-1, keepdim=True) / count, 0.0) for ranks in (a, b))
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt().clamp_min(_SMALL)


def _ranks(values: Tensor, seen: Tensor) -> Tensor:
    """Mean ranks among the seen entries; 0 elsewhere."""
    values = values.double().masked_fill(~seen, float("inf"))
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values)
    upto = torch.searchsorted(ordered, values, right=True)
    return torch.where(seen, (below + upto - 1).double() / 2, 0.0)


def _entropy(weights: Tensor) -> Tensor:
    return -(weights * weights.clamp_min(_SMALL).log()).sum(-1)
