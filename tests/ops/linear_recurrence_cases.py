"""Inputs of the tests of the linear recurrence."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import seqmodels
from seqmodels import Layout
from seqmodels.ops.linear_recurrence import linear_recurrence

GRIDS: dict[str, tuple[int, int, Layout | None]] = {
    "one token": (2, 1, None),
    "two tokens": (2, 2, None),
    "prime": (1, 37, None),
    "over a tile": (1, 131, None),
    "packed": (3, 40, Layout.packed([[3, 1, 30], [2], [17, 23]], 40, capacity=8)),
    "short packed": (2, 9, Layout.packed([[3, 1, 4], [2]], 9, capacity=5)),
    "left padded": (3, 20, Layout.left_padded([3, 20, 1])),
}


@dataclass
class Case:
    """``tensors`` are decay, x and initial state; ``grads`` belong to states and final state."""

    name: str
    tensors: list[Tensor | None]
    grads: list[Tensor]
    layout: Layout | None


def cases(channels: int, dtype: torch.dtype, grids: tuple[str, ...] = tuple(GRIDS)) -> Iterator[Case]:
    """Every grid, real and complex, constant and varying, with and without state; NaN in padding."""
    for name, pairs, varying, initial in itertools.product(grids, (False, True), (False, True), (False, True)):
        batch, length, layout = GRIDS[name]
        documents = batch if layout is None else layout.num_documents
        tail = (channels, 2) if pairs else (channels,)
        decay = 0.7 * torch.randn(*((batch, length) if varying else ()), *tail, dtype=dtype).clamp(-1, 1)
        x = torch.randn(batch, length, *tail, dtype=dtype)
        if layout is not None:
            x[~layout.valid] = float("nan")
            if varying:
                decay[~layout.valid] = float("nan")
        state = torch.randn(documents, *tail, dtype=dtype) if initial else None
        grads = [torch.randn(batch, length, *tail, dtype=dtype), torch.randn(documents, *tail, dtype=dtype)]
        label = f"{name}, {'complex' if pairs else 'real'}, {varying=}, {initial=}"
        yield Case(label, [decay, x, state], grads, layout)


def run(case: Case, backend: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs and gradients by name, from inputs converted to ``dtype`` first."""
    leaves = [None if t is None else t.to(dtype or t.dtype).clone().requires_grad_() for t in case.tensors]
    decay, x, state = leaves
    assert decay is not None
    assert x is not None
    with seqmodels.backend(backend):
        h, final = linear_recurrence(decay, x, initial_state=state, layout=case.layout)
        wanted = {name: t for name, t in zip(("decay", "x", "state"), leaves, strict=True) if t is not None}
        found = torch.autograd.grad([h, final], list(wanted.values()), [grad.to(h.dtype) for grad in case.grads])
    result = {"h": h.detach(), "final_state": final.detach()}
    return result | {f"grad_{name}": grad for name, grad in zip(wanted, found, strict=True)}
