"""From a continuous diagonal SSM to its recurrence. Complex numbers are pairs in a last dimension of 2.

Everything here is heads x states, and computed in float64: phases of 1e6 radians are multiples of what
is computed here, and (e^z - 1) / A loses half of float32's digits at small steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Discretization = Literal["zoh", "bilinear", "softmax"]
RealPart = Literal["exp", "relu", "softplus", "free", "clip"]
Positive = Literal["exp", "softplus"]
SMALLEST = 1e-4  # of -Re A at initialisation, and always for "relu" and "clip"
_SOFTMAX_EPSILON = 1e-7


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Product of two complex numbers."""
    (a_real, a_imaginary), (b_real, b_imaginary) = a.unbind(-1), b.unbind(-1)
    real = a_real * b_real - a_imaginary * b_imaginary
    return torch.stack((real, a_real * b_imaginary + a_imaginary * b_real), -1)


def divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b."""
    size = b.square().sum(-1, keepdim=True)
    return multiply(a, conjugate(b)) / size


def conjugate(a: Tensor) -> Tensor:
    return torch.stack((a[..., 0], -a[..., 1]), -1)


def exponential(z: Tensor) -> Tensor:
    """e^z."""
    return torch.exp(z[..., :1]) * torch.stack((torch.cos(z[..., 1]), torch.sin(z[..., 1])), -1)


def exponential_minus_one(z: Tensor) -> Tensor:
    """e^z - 1 without cancellation: (expm1(x) cos y - 2 sin(y/2)^2) + i e^x sin y for z = x + iy."""
    x, y = z.unbind(-1)
    real = torch.expm1(x) * torch.cos(y) - 2 * torch.sin(y / 2).square()
    return torch.stack((real, torch.exp(x) * torch.sin(y)), -1)


class Discrete(NamedTuple):
    """x[t] = e^z x[t-1] + (factor * B) u[t]; both (..., 2) in float64."""

    z: Tensor
    factor: Tensor


def discretize(a: Tensor, dt: Tensor, rule: str, *, softmax_length: int | None = None) -> Discrete:
    r"""The recurrence of x' = A x + B u with steps of dt:

    .. code-block:: text

        zoh       z = dt A                                      factor = (e^z - 1) / A
        bilinear  e^z = (1 + dt A / 2) / (1 - dt A / 2)         factor = dt / (1 - dt A / 2)
        softmax   z = dt A                                      factor = (e^z - 1) r(A (e^{L z} - 1)),  Re A <= 0
                                            (e^{-z} - 1) r(A (e^{-L z} - 1)) e^{-(L - 1) z},  Re A > 0

    with r(x) = conj(x) / (|x|^2 + 1e-7) and L = ``softmax_length``: the normalised kernel of DSS (Gupta,
    Gu and Berant, "Diagonal state spaces are as effective as structured state spaces").

    Args:
        a: (..., 2).
        dt: (...,) broadcasting against a without its last dimension.
        rule: "zoh", "bilinear" or "softmax".
    """
    a, dt = a.double(), dt.double().unsqueeze(-1)
    z = dt * a
    if rule == "zoh":
        return Discrete(z, divide(exponential_minus_one(z), a))
    if rule == "bilinear":
        x, y = (z / 2).unbind(-1)
        below = torch.stack((1 - x, -y), -1)
        # log((1 + w) / (1 - w)) for w = x + iy: |1 + w|^2 = |1 - w|^2 + 4x.
        log_modulus = torch.log1p(4 * x / below.square().sum(-1)) / 2
        phase = torch.atan2(y, 1 + x) + torch.atan2(y, 1 - x)
        one = torch.stack((torch.ones_like(x), torch.zeros_like(x)), -1)
        return Discrete(torch.stack((log_modulus, phase), -1), dt * divide(one, below))
    assert softmax_length is not None
    # Toward decay in either direction of time, so that no exponential overflows.
    grows = z[..., :1] > 0
    inward = torch.where(grows, -z, z)
    total = multiply(a, exponential_minus_one(softmax_length * inward))
    inverse = conjugate(total) / (total.square().sum(-1, keepdim=True) + _SOFTMAX_EPSILON)
    factor = multiply(exponential_minus_one(inward), inverse)
    shifted = multiply(factor, exponential((softmax_length - 1) * inward))
    return Discrete(z, torch.where(grows, shifted, factor))


def inverse_softplus(x: Tensor) -> Tensor:
    """p with log(1 + e^p) = x."""
    return x + torch.log(-torch.expm1(-x))


#: -Re A as a function of its parameter, and the parameter for a given -Re A (at least SMALLEST).
REAL_PARTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "exp": (torch.exp, torch.log),
    "relu": (lambda p: F.relu(p) + SMALLEST, lambda size: size - SMALLEST),
    "softplus": (F.softplus, inverse_softplus),
    "free": (lambda p: p, lambda size: size),
    "clip": (lambda p: p.clamp_min(SMALLEST), lambda size: size),
}
STEPS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "exp": (torch.exp, torch.log),
    "softplus": (F.softplus, inverse_softplus),
}


def log_uniform(parameter: Tensor, low: float, high: float, activation: str) -> None:
    """Fills a step-size parameter so that the step is log-uniform in [low, high]."""
    dt = torch.empty_like(parameter).uniform_(math.log(low), math.log(high)).exp()
    parameter.copy_(STEPS[activation][1](dt))
