"""Random arguments of the Mamba-3 op. Biases are trained-like: constant ones would hide a swap of heads and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.mamba3 import Mamba3State


def make_inputs(
    *,
    batch_size: int = 2,
    length: int = 37,
    heads: int = 4,
    head_dim: int = 6,
    d_state: int = 8,
    groups: int = 2,
    ranks: int | None = None,
    angles: int = 2,
    norm: bool = False,
    dt_scale: float = 1.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Keywords of :func:`seqmodels.ops.mamba3.mamba3`; ``ranks=None`` is SISO."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    R = 1 if ranks is None else ranks
    token = (batch_size, length, heads)
    dt = dt_scale * uniform(*token)
    inputs = {
        "x": normal(*token, head_dim),
        "b": normal(batch_size, length, R, groups, d_state),
        "c": normal(batch_size, length, R, groups, d_state),
        "z": normal(*token, head_dim),
        "dt": dt,
        "log_decay": -dt * 2 * uniform(*token),
        "trapezoid": uniform(*token),
        "rate": torch.pi * normal(batch_size, length, angles).tanh(),
        "b_weight": 1 + 0.3 * normal(d_state),
        "c_weight": 1 + 0.3 * normal(d_state),
        "b_bias": normal(heads, R, d_state),
        "c_bias": normal(heads, R, d_state),
        "skip": normal(heads),
    }
    if ranks is not None:
        inputs |= {name: normal(heads, R, head_dim) for name in ("mimo_x", "mimo_z", "mimo_o")}
    if norm:
        inputs["norm_weight"] = 1 + 0.3 * normal(heads * head_dim)
    return {name: value.to(dtype) for name, value in inputs.items()}


def make_state(inputs: dict[str, Tensor], documents: int | None = None, seed: int = 1) -> Mamba3State:
    """A random state that fits ``inputs``."""
    generator = torch.Generator().manual_seed(seed)
    _, _, heads, head_dim = inputs["x"].shape
    documents = inputs["x"].shape[0] if documents is None else documents
    ranks, d_state = inputs["b"].shape[2], inputs["b"].shape[-1]
    shapes = (
        (documents, heads, inputs["rate"].shape[-1]),
        (documents, heads, head_dim, d_state),
        (documents, ranks, heads, d_state),
        (documents, heads, head_dim),
    )
    return Mamba3State(
        *(torch.randn(s, generator=generator, dtype=torch.float64).to(inputs["dt"].dtype) for s in shapes)
    )


def cut(inputs: dict[str, Tensor], begin: int, end: int) -> dict[str, Tensor]:
    """Tokens [begin, end) of every per-token argument."""
    per_token = ("x", "b", "c", "z", "dt", "log_decay", "trapezoid", "rate", "phase_step")
    return {name: value[:, begin:end] if name in per_token else value for name, value in inputs.items()}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max |actual - expected| / max |expected|."""
    if expected.numel() == 0:
        return 0.0
    difference = (actual.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp_min(1e-300)).item()
