"""The public functions of the Vandermonde products: equation, checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.registration import Operator

_PACKAGE = "seqmodels.ops.vandermonde"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def vandermonde(z: Tensor, weight: Tensor, length: int, *, scale: float = 1.0) -> Tensor:
    r"""Convolution kernel of a diagonal SSM, for each row r, head h and time l < length:

    .. code-block:: text

        kernel[r, h, l] = scale * Re sum_n weight[r, h, n] e^{l z[h, n]}

    Complex arguments are real tensors with a trailing dimension of 2 (real part, imaginary part),
    as ``torch.view_as_real`` gives them; so are their gradients (dL/dRe, dL/dIm).

    The phase l Im z is exact to rounding of the result whatever its size: the powers are formed in
    float64, or modulo 2 pi. (The float32 z itself is taken as exact: pass z in float64 to keep the
    rounding of step * A out of it.) No tensor of heads x states x length is made, forward or
    backward.

    Rows share the exponents and are anything that multiplies them: output channels, or the
    documents of a batch. With z = step * A:

    * zero-order hold kernel: weight = C * B * (e^z - 1) / A, scale = 2 where conjugates are left out;
    * what an initial state s adds to output l: weight = C * e^z * s, see :func:`diagonal_response`.

    Section 3.2 of Gu, Gupta, Goel and Ré, "On the parameterization and initialization of diagonal
    state space models".

    Args:
        z: (heads, states, 2), float32 or float64. Re z <= 0 decays; Re z > 0 grows and may overflow.
        weight: (heads, states, 2) or (rows, heads, states, 2).
        length: number of times, at least 1.
        scale: factor of the sum.

    Returns:
        (heads, length) or (rows, heads, length); float64 if weight is float64, else float32.

    Raises:
        ValueError: shapes that do not fit together, or length < 1.
        TypeError: complex or integer tensors.
    """
    z, weight = _working("vandermonde", z=z, values=weight, name="weight")
    if weight.dim() not in (3, 4) or weight.shape[-3:] != z.shape:
        raise ValueError(
            f"vandermonde: weight has shape {tuple(weight.shape)}; expected {tuple(z.shape)} or (rows, "
            f"{', '.join(map(str, z.shape))}) for z {tuple(z.shape)}"
        )
    if length < 1:
        raise ValueError(f"vandermonde: length is {length}; expected at least 1")
    rows = weight if weight.dim() == 4 else weight.unsqueeze(0)
    kernel = _operator(z, rows, length, float(scale))
    return kernel if weight.dim() == 4 else kernel.squeeze(0)


def vandermonde_adjoint(z: Tensor, x: Tensor) -> Tensor:
    r"""The transposed product: sums over time instead of states, for each row r, head h and state n:

    .. code-block:: text

        state[r, h, n] = sum_{l < length} x[r, h, l] e^{l z[h, n]}

    With x in reversed time this is the final state of the recurrence s <- e^z s + x (see
    :func:`diagonal_final_state`). Accuracy and memory as in :func:`vandermonde`.

    Args:
        z: (heads, states, 2), float32 or float64.
        x: (rows, heads, length), real.

    Returns:
        (rows, heads, states, 2); float64 if x is float64, else float32.

    Raises:
        ValueError: shapes that do not fit together.
        TypeError: complex or integer tensors.
    """
    z, x = _working("vandermonde_adjoint", z=z, values=x, name="x")
    if x.dim() != 3 or x.shape[1] != z.shape[0] or x.shape[2] < 1:
        raise ValueError(
            f"vandermonde_adjoint: x has shape {tuple(x.shape)}; expected (rows, {z.shape[0]}, length) with at least "
            f"one time for z {tuple(z.shape)}"
        )
    return _adjoint_operator(z, x)


def _working(owner: str, *, z: Tensor, values: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if z.dim() != 3 or z.shape[-1] != 2:
        raise ValueError(
            f"{owner}: z has shape {tuple(z.shape)}; expected (heads, states, 2): real and imaginary parts last "
            "(torch.view_as_real)"
        )
    for label, tensor in (("z", z), (name, values)):
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"{owner}: {label} is {tensor.dtype}; expected a real floating-point dtype, complex values as pairs "
                "in a trailing dimension (torch.view_as_real)"
            )
    exact = values.dtype == torch.float64
    return z if z.dtype == torch.float64 else z.float(), values if exact else values.float()


def _fake(z: Tensor, weight: Tensor, length: int, scale: float) -> Tensor:
    return weight.new_empty((weight.shape[0], weight.shape[1], length))


def _adjoint_fake(z: Tensor, x: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], *z.shape))


_MODULES = ("reference", "torch", "cpu", "triton")
_operator = Operator(
    "vandermonde",
    "Tensor z, Tensor weight, SymInt length, float scale",
    outputs=1,
    fake=_fake,
    modules={name: f"{_PACKAGE}.{name}" for name in _MODULES},
    differentiable=(0, 1),
)
_adjoint_operator = Operator(
    "vandermonde_adjoint",
    "Tensor z, Tensor x",
    outputs=1,
    fake=_adjoint_fake,
    modules={name: f"{_PACKAGE}.{name}_adjoint" for name in _MODULES},
    differentiable=(0, 1),
)
