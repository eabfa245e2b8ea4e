"""Problems of the diagonal SSM, and what a backend makes of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

import seqmodels
from seqmodels import Layout
from seqmodels.ops.diagonal_ssm import diagonal_ssm

GRIDS: dict[str, tuple[int, int, Layout | None]] = {
    "one token": (2, 1, None),
    "below a chunk": (2, 37, None),
    "a chunk": (1, 64, None),
    "over two chunks": (1, 131, None),
    "packed": (3, 150, Layout.packed([[3, 1, 146], [64, 2], [17, 65, 60]], 150, capacity=9)),
    "left padded": (3, 70, Layout.left_padded([3, 70, 1])),
}
Tensors = dict[str, torch.Tensor]


def problem(grid: str, heads: int, modes: int, rows: int | None, kind: str) -> tuple[Tensors, Tensors, Layout | None]:
    """Leaves and gradients in float64, NaN in padding; half-lives from one token to hundreds, many turns a token."""
    batch, length, layout = GRIDS[grid]
    documents = batch if layout is None else layout.num_documents
    tail = () if rows is None else (rows,)
    u = torch.randn(batch, length, heads, dtype=torch.float64)
    if layout is not None:
        u[~layout.valid] = float("nan")
    decay = -torch.exp(torch.empty(heads, modes, dtype=torch.float64).uniform_(-7, 0))
    leaves = {
        "u": u,
        "z": torch.stack((decay, 9 * torch.randn(heads, modes, dtype=torch.float64)), -1),
        "b": torch.randn(heads, modes, 2, dtype=torch.float64),
        "c": torch.randn(*tail, heads, modes, 2, dtype=torch.float64),
    }
    grads = {"y": torch.randn(batch, length, *tail, heads, dtype=torch.float64)}
    if kind != "reverse":
        leaves["skip"] = torch.randn(*tail, heads, dtype=torch.float64)
        grads["final_state"] = torch.randn(documents, heads, modes, 2, dtype=torch.float64)
    if kind == "initial state":
        leaves["initial_state"] = torch.randn(documents, heads, modes, 2, dtype=torch.float64)
    return leaves, grads, layout


KINDS = ("zero state", "initial state", "reverse")


def problems(heads: int, modes: int) -> Iterator[tuple[str, str, tuple[Tensors, Tensors, Layout | None]]]:
    for grid, kind in itertools.product(GRIDS, KINDS):
        rows = 2 if grid == "packed" else None
        yield f"{grid}, {kind}", kind, problem(grid, heads, modes, rows, kind)


def run(case: tuple[Tensors, Tensors, Layout | None], kind: str, backend: str, dtype: torch.dtype) -> Tensors:
    leaves, grads, layout = case
    # z stays in float64: its rounding is no part of an implementation's error
    made = {
        name: value.to(torch.float32 if name != "z" and dtype == torch.float32 else torch.float64)
        .clone()
        .requires_grad_()
        for name, value in leaves.items()
    }
    with seqmodels.backend(backend):
        y, final = diagonal_ssm(**made, layout=layout, reverse=kind == "reverse")
        outputs = {"y": y} if final is None else {"y": y, "final_state": final}
        cotangents = [grads[name].to(value.dtype) for name, value in outputs.items()]
        found = torch.autograd.grad(list(outputs.values()), list(made.values()), cotangents)
    result = {name: value.detach() for name, value in outputs.items()}
    return result | {f"grad_{name}": value for name, value in zip(made, found, strict=True)}


def rounded(case: tuple[Tensors, Tensors, Layout | None]) -> tuple[Tensors, Tensors, Layout | None]:
    """All but z as float32 holds them."""
    leaves, grads, layout = case
    return (
        {name: value if name == "z" else value.float().double() for name, value in leaves.items()},
        {name: value.float().double() for name, value in grads.items()},
        layout,
    )
