"""S4 with its exact state matrix, diagonal plus low rank: the baseline of the robustness figures."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqmodels.init import legs_low_rank, legs_normal
from seqmodels.layout import Layout
from seqmodels.mixers.discretization import STEPS, Positive, RealPart
from seqmodels.mixers.s4d import S4D, S4DState
from seqmodels.mixers.state_space import eigenvalues_of
from seqmodels.ops.registration import state_dtype

_BLOCK_BITS = 6
_BLOCK = 2**_BLOCK_BITS  # powers A^l are A^(64 a) A^b
_BITS = 18  # sequences are shorter than 2^18 tokens


class DenseRecurrence(NamedTuple):
    """x[t] = A x[t-1] + b u[t], y = c x in real coordinates, N = 2 modes (Re, Im alternating), all float64.

    a (heads, N, N), b (heads, N), c (rows, heads, N).
    """

    a: Tensor
    b: Tensor
    c: Tensor


class S4DPLR(S4D):
    r"""The S4 layer: x' = (Lambda - P P^*) x + B u, y = 2 Re(C x) + D u, discretised by the bilinear rule:

    .. code-block:: text

        A' = (I - dt A / 2)^-1 (I + dt A / 2),   B' = dt (I - dt A / 2)^-1 B
        K[l] = C A'^l B',   y = K * u + D u

    with d_state / 2 modes, one of each conjugate pair, from LegS: Lambda and V of its normal part, P = V^H P_LegS,
    B = V^H B_LegS (:func:`seqmodels.init.legs_normal`), C complex normal. At the start this is LegS itself, not an
    approximation of it. Sections 3 of Gu, Goel and Ré, "Efficiently modeling long sequences with structured state
    spaces" (there the kernel comes from Cauchy sums; the values are the same).

    Powers of A' are dense matrix products in float64, heads x (d_state^3 log L + d_state^2 L / 64)
    multiplications: exact, and much slower than :class:`~seqmodels.mixers.s4d.S4D`.

    Args: those of :class:`~seqmodels.mixers.s4d.S4D`; LegS is the only init, bilinear the only rule.

    Raises:
        ValueError: see S4D; also for sequences of 2^18 tokens and more.
    """

    slow_parameters = (*S4D.slow_parameters, "P")

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        real_part: RealPart = "exp",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_activation: Positive = "exp",
        n_ssm: int = 1,
        channels: int = 1,
        bidirectional: bool = False,
        rate: float = 1.0,
        learning_rates: dict[str, float | None] | None = None,
        weight_decays: dict[str, float | None] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model,
            d_state=d_state,
            init="legs",
            b_clip=None,
            discretization="bilinear",
            real_part=real_part,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_activation=dt_activation,
            n_ssm=n_ssm,
            channels=channels,
            bidirectional=bidirectional,
            rate=rate,
            learning_rates=learning_rates,
            weight_decays=weight_decays,
            device=device,
            dtype=dtype,
        )

    def _add_parameters(self, modes: int, made: dict[str, Any]) -> None:
        self.P = nn.Parameter(torch.empty(self.n_ssm, modes, 2, **made))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        vectors = legs_normal(self.d_state).vectors
        low_rank = vectors.mH @ legs_low_rank(self.d_state).to(vectors.dtype)
        self.P.copy_(torch.view_as_real(low_rank).expand_as(self.P))

    def _system_parameters(self) -> list[Tensor]:
        return [*super()._system_parameters(), self.P]

    def recurrence(self) -> DenseRecurrence:  # type: ignore[override]
        """The discrete system from the parameters, differentiable.

        P P^* x, with x and its conjugate both present, is P 2 Re(P^* x): real-linear in (Re x, Im x). So with h
        half a step and p = (Re P, Im P)

            M = I - h A = D + 2 h p p^T,  D = 1 - h Lambda,   M^-1 = D^-1 - 2 h D^-1 p p^T D^-1 / (1 + 2 h p^T D^-1 p)

        and the bilinear map is M^-1 (I + h A) = 2 M^-1 - I. Sherman and Morrison's form needs no factorisation,
        which a CUDA graph could not hold; D^-1 has a positive real part, so that the divisor is at least 1.
        """
        copies = self.d_model // self.n_ssm
        dt = STEPS[self.dt_activation][0](self.log_dt.double()) * self.rate
        half = dt[:, None] / 2
        eigenvalues = eigenvalues_of(self.A_real, self.A_imag, self.real_part).repeat(copies, 1, 1)
        real, imaginary = (half[..., None] * eigenvalues).unbind(-1)
        norm = (1 - real).square() + imaginary.square()
        along, across = (1 - real) / norm, imaginary / norm  # of D^-1, pairs as complex numbers
        blocks = torch.stack((along, -across, across, along), -1).unflatten(-1, (2, 2))
        p = self.P.double().repeat(copies, 1, 1)
        right, left = ((block @ p[..., None]).flatten(1) for block in (blocks, blocks.mT))
        weight = 2 * half / (1 + 2 * half * (p.flatten(1) * right).sum(-1, keepdim=True))
        eye = torch.eye(real.shape[-1], dtype=real.dtype, device=real.device)
        inverse = (eye[:, None, :, None] * blocks[:, :, :, None]).flatten(3).flatten(1, 2)
        inverse = inverse - (weight * right)[:, :, None] * left[:, None]
        assert self.B is not None
        b = self.B.double().flatten(-2).repeat(copies, 1) * dt[:, None]
        a = 2 * inverse - torch.eye(2 * real.shape[-1], dtype=real.dtype, device=real.device)
        c = torch.stack((self.C[..., 0], -self.C[..., 1]), -1).double() * 2
        return DenseRecurrence(a, (inverse @ b[..., None])[..., 0], c.flatten(-2))

    def _scans(self, u: Tensor, layout: Layout | None) -> bool:
        return False  # the recurrence is dense

    def _kernel(self, system: DenseRecurrence, length: int, dtype: torch.dtype) -> Tensor:  # type: ignore[override]
        powers = _powers(system.a, length)
        inner = _block(powers, system.b[:, None])[:, 0]
        kernel = _times_outer(powers, system.c, inner[None], length).to(dtype)
        return self._with_skip(kernel, dtype)

    def _response(self, system: Any, before: Tensor, length: int, layout: Layout | None) -> Tensor:
        """c A^(p + 1) s for position p of each document: (batch, length, channels, d_model)."""
        _check_length(length)
        powers = _powers(system.a, length)
        state = before.double().flatten(-2).transpose(0, 1)  # (heads, documents, N)
        inner = _block(powers, state @ system.a.mT)
        rows = [_times_outer(powers, row[None], inner.transpose(0, 1), length) for row in system.c]
        values = torch.stack(rows, -1).to(before.dtype)  # (documents, heads, length, rows)
        if layout is None:
            return values.permute(0, 2, 3, 1)
        seen = values[layout.document.clamp_min(0), :, layout.position]
        return torch.where(layout.valid[..., None, None], seen, 0).transpose(2, 3)

    def _final(self, system: Any, u: Tensor, before: Tensor | None, layout: Layout | None) -> Tensor:
        """A^n s + sum_j A^j b u[n - 1 - j], n tokens in the document."""
        length = u.shape[1]
        _check_length(length)
        powers = _powers(system.a, length)
        if layout is None:
            recent = u.flip(1)
            sizes = torch.full((u.shape[0],), length, device=u.device)
        else:
            age = torch.arange(length, device=u.device)
            token = (layout.starts + layout.lengths - 1)[:, None] - age
            inside = age < layout.lengths[:, None]
            recent = torch.where(inside[..., None], u.flatten(0, 1)[torch.where(inside, token, 0)], 0)
            sizes = layout.lengths
        blocks = (length + _BLOCK - 1) // _BLOCK
        padded = nn.functional.pad(recent.double(), (0, 0, 0, blocks * _BLOCK - length))
        inner = _block(powers, system.b[:, None])[:, 0]  # (heads, block, N)
        parts = torch.einsum("dabh,hbn->hadn", padded.unflatten(1, (blocks, _BLOCK)), inner)
        index = torch.arange(blocks, device=u.device)
        final = _raised(powers[_BLOCK_BITS:], parts.flatten(1, 2), index.repeat_interleave(recent.shape[0]))
        final = final.unflatten(1, (blocks, -1)).sum(1)
        if before is not None:
            final = final + _raised(powers, before.double().flatten(-2).transpose(0, 1), sizes)
        return final.transpose(0, 1).unflatten(-1, (-1, 2)).to(state_dtype(u.dtype)).contiguous()

    @torch.no_grad()
    def step(self, x_t: Tensor, state: S4DState) -> Tensor:
        if self.bidirectional:
            self._refuse_state("take single steps")
        u = x_t.to(state_dtype(x_t.dtype))

        def compute() -> tuple[Tensor, Tensor, Tensor]:
            a, b, c = self.recurrence()
            return a.to(u.dtype), b.to(u.dtype), c.to(u.dtype)

        a, b, c = self._cache.get("step", self._system_parameters(), (u.dtype, self.rate), compute)
        after = torch.einsum("hmn,bhn->bhm", a, state.ssm.flatten(-2)) + b * u[..., None]
        state.ssm.copy_(after.view_as(state.ssm))
        y = torch.einsum("bhn,rhn->brh", after, c) + self.D.to(u.dtype) * u[:, None]
        return self._mix(y.to(x_t.dtype))


def _check_length(length: int) -> None:
    if length >= 2**_BITS:
        raise ValueError(f"S4DPLR: {length} tokens; expected fewer than {2**_BITS}. Split them, carrying the state")


def _powers(a: Tensor, length: int) -> list[Tensor]:
    """A^(2^k), as many as numbers up to ``length`` have bits (all of them in a graph for every length)."""
    _check_length(length)
    bits = _BITS if torch.compiler.is_compiling() else max(length, _BLOCK).bit_length()
    powers = [a]
    while len(powers) < bits:
        powers.append(powers[-1] @ powers[-1])
    return powers


def _block(powers: list[Tensor], vectors: Tensor) -> Tensor:
    """A^b v for b < 64, by doubling: (heads, D, 64, N) from (heads, D, N)."""
    result = vectors[:, :, None]
    for k in range(_BLOCK_BITS):
        result = torch.cat((result, result @ powers[k].mT[:, None]), 2)
    return result


def _raised(powers: list[Tensor], vectors: Tensor, exponents: Tensor) -> Tensor:
    """A^e v: (heads, D, N) from vectors of the same shape and exponents (D,), bit by bit."""
    for k, power in enumerate(powers):
        bit = ((exponents >> k) & 1).bool()[:, None]
        vectors = torch.where(bit, vectors @ power.mT, vectors)
    return vectors


def _times_outer(powers: list[Tensor], c: Tensor, inner: Tensor, length: int) -> Tensor:
    """c A^(64 a) inner[b] at l = 64 a + b: (R, heads, length).

    c is (R or 1, heads, N), inner (R or 1, heads, 64, N).
    """
    blocks = (length + _BLOCK - 1) // _BLOCK
    index = torch.arange(blocks, device=c.device)
    rows = c.transpose(0, 1)[:, :, None].expand(-1, -1, blocks, -1).flatten(1, 2)
    rows = _raised([power.mT for power in powers[_BLOCK_BITS:]], rows, index.repeat(c.shape[0]))
    outer = rows.unflatten(1, (c.shape[0], blocks)).transpose(0, 1)  # (R, heads, blocks, N)
    product = (outer @ inner.mT).flatten(2)
    # Not a slice: torch 2.13's inductor leaves the gradient behind a dynamic end uninitialised.
    return product.index_select(2, torch.arange(length, device=c.device))
