"""Inputs of the linear attention tests, and the error bound of low-precision implementations."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import seqmodels
from seqmodels import Layout
from seqmodels.ops.linear_attention import linear_attention

NAMES = ("q", "k", "v", "log_decay", "past_weight", "diagonal_weight", "initial_state")
FLOOR = 2.0**-23  # two roundings of float32: what a bound is never below


@dataclass(frozen=True)
class Case:
    """Sizes and options; ``absent`` names the optional inputs that are None."""

    batch: int = 2
    length: int = 13
    ranks: int = 1
    query_groups: int = 2
    key_groups: int = 2
    heads: int = 2
    key_dim: int = 5
    value_dim: int = 3
    normalize: bool = False
    absent: tuple[str, ...] = ()
    layout: Layout | None = None

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
        """Values exact in ``dtype`` (weights and states in float32), held in float64; NaN on padding."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, generator=generator).to(of).double()

        tokens = (self.batch, self.length)
        documents = self.batch if self.layout is None else self.layout.num_documents
        q = draw(*tokens, self.ranks, self.query_groups, self.key_dim, of=dtype)
        k = draw(*tokens, self.ranks, self.key_groups, self.key_dim, of=dtype)
        v = draw(*tokens, self.ranks, self.heads, self.value_dim, of=dtype)
        log_decay = -draw(*tokens, self.heads).abs() * 0.25
        past, diagonal = 1 + draw(*tokens, self.heads) / 4, draw(*tokens, self.heads)
        state = draw(documents, self.heads, self.key_dim, self.value_dim + self.normalize)
        if self.normalize:  # a mean: all weights positive, none near zero
            q, k, past, diagonal, state = q.abs(), k.abs(), past.abs(), 1 + diagonal.abs(), state.abs()
        inputs = [q, k, v, log_decay, past, diagonal, state]
        if self.layout is not None:
            for tensor in inputs[:6]:
                tensor[~self.layout.valid] = float("nan")
        return [None if name in self.absent else x for name, x in zip(NAMES, inputs, strict=True)]

    def with_layout(self, layout: Layout) -> Case:
        return replace(self, layout=layout, batch=layout.batch_size, length=layout.length)


def cast(inputs: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """q, k, v in ``dtype``; weights and states in float32 (float64)."""
    rest = torch.float64 if dtype == torch.float64 else torch.float32
    return [None if x is None else x.to(dtype if index < 3 else rest) for index, x in enumerate(inputs)]


def call(inputs: list, case: Case, chunk_size: int = 64) -> tuple[Tensor, Tensor]:
    q, k, v, log_decay, past, diagonal, state = inputs
    return linear_attention(
        q, k, v, log_decay, past_weight=past, diagonal_weight=diagonal, initial_state=state,
        normalize=case.normalize, layout=case.layout, chunk_size=chunk_size,
    )  # fmt: skip


def run(case: Case, backend: str, dtype: torch.dtype = torch.float64, chunk_size: int = 64) -> dict[str, Tensor]:
    """Outputs and the gradients of all inputs, in float64, under random output gradients."""
    return run_on(case.inputs(dtype if dtype != torch.float64 else torch.float32), case, backend, dtype, chunk_size)


def run_on(
    inputs: list[Tensor | None], case: Case, backend: str, dtype: torch.dtype, chunk_size: int = 64
) -> dict[str, Tensor]:
    leaves = [None if x is None else x.clone().requires_grad_() for x in cast(inputs, dtype)]
    generator = torch.Generator().manual_seed(1)
    with seqmodels.backend(backend):
        y, state = call(leaves, case, chunk_size)
        grads = [torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype) for out in (y, state)]
        present = [x for x in leaves if x is not None]
        found = iter(torch.autograd.grad([y, state], present, grads))
    result = {"y": y.detach().double(), "final_state": state.detach().double()}
    result |= {f"d {name}": next(found).double() for name, x in zip(NAMES, leaves, strict=True) if x is not None}
    return result


def error(found: Tensor, truth: Tensor) -> float:
    return ((found - truth).norm() / truth.norm().clamp_min(1e-30)).item()


def rounded_mean_gradients(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The gradients of a normalised op, in float64, when the only rounding is that of the kept y.

    The divisor's gradient is -dY . y / divisor with y as it was handed out, in ``dtype``; that
    rounding is the op's own (its memory is half of a float32 copy's), so it belongs to the bound.
    """
    inputs = case.inputs(dtype)
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    ones = replace(case, normalize=False)
    assert leaves[2] is not None
    with seqmodels.backend("torch"):
        wide = torch.cat([leaves[2], torch.ones_like(leaves[2][..., :1])], dim=-1)
        sums, state = call([*leaves[:2], wide, *leaves[3:]], ones)
        divisor = sums[..., -1:].detach() + 1e-6
        y = (sums[..., :-1].detach() / divisor).to(dtype).double()
        generator = torch.Generator().manual_seed(1)
        grad_y, grad_state = (torch.randn(out.shape, generator=generator).bfloat16().double() for out in (y, state))
        grad_sums = torch.cat([grad_y / divisor, -(grad_y * y).sum(-1, keepdim=True) / divisor], dim=-1)
        present = [x for x in leaves if x is not None]
        found = iter(torch.autograd.grad([sums, state], present, [grad_sums, grad_state]))
    return {f"d {name}": next(found) for name, x in zip(NAMES, leaves, strict=True) if x is not None}


def check(case: Case, backend: str, dtype: torch.dtype) -> None:
    """Twice the error of the chunked form in float32, at most, for outputs and all gradients."""
    inputs = case.inputs(dtype)
    truth = run_on(inputs, case, "torch", torch.float64)
    chunked, found = (run_on(inputs, case, name, dtype) for name in ("torch", backend))
    kept = rounded_mean_gradients(case, dtype) if case.normalize and dtype != torch.float32 else {}
    for name, value in truth.items():
        bound = 2 * error(chunked[name], value) + FLOOR
        if name in kept:
            bound += 2 * error(kept[name], value)
        assert error(found[name], value) <= bound, f"{name}: {error(found[name], value):.2e} exceeds {bound:.2e}"
