"""One decode step of Mamba-3, from the projected token to the gated output: checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.mamba3.op import Mamba3State, state_shapes
from seqmodels.ops.mamba3.projection import Projection
from seqmodels.ops.registration import Operator, state_dtype

_PACKAGE = "seqmodels.ops.mamba3"


@torch.no_grad()
def mamba3_step(
    projected: Tensor,
    state: Mamba3State,
    projection: Projection,
    *,
    dt_bias: Tensor,
    b_weight: Tensor,
    c_weight: Tensor,
    b_bias: Tensor,
    c_bias: Tensor,
    skip: Tensor,
    mimo_x: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    norm_weight: Tensor | None = None,
    pairing: str = "adjacent",
    epsilon: float = 1e-5,
) -> Tensor:
    """One token of :func:`seqmodels.ops.mamba3.mamba3`; updates ``state`` in place, no gradient.

    Args:
        projected: (batch, sum of ``projection.widths``), the input projection of the token.
        state: of :func:`mamba3` or an earlier step; contiguous, float32 (float64 beside float64).
        projection: how ``projected`` is laid out and activated.
        dt_bias: (heads). The others as in :func:`mamba3`.

    Returns:
        (batch, heads * head_dim) of projected's dtype, ready for the output projection.

    Raises:
        ValueError: a projected token or state of another size or dtype, or a state that is not contiguous.
        TypeError: a state of another layer.
    """
    width = sum(projection.widths)
    if projected.dim() != 2 or projected.shape[-1] != width:
        raise ValueError(f"mamba3_step: projected has shape {tuple(projected.shape)}; expected (batch, {width})")
    wide = state_dtype(projected.dtype)
    if not isinstance(state, Mamba3State):
        raise TypeError(f"mamba3_step: state is {type(state).__name__}; expected Mamba3State")
    p = projection
    shapes = state_shapes(projected.shape[0], p.num_heads, p.head_dim, p.d_state, p.ranks, p.angles)
    fields = [state.angle, state.ssm, state.k, state.v]
    for (name, shape), tensor in zip(shapes.items(), fields, strict=True):
        if tensor.shape != shape or tensor.dtype != wide or not tensor.is_contiguous():
            contiguous = "" if tensor.is_contiguous() else ", not contiguous"
            raise ValueError(
                f"mamba3_step: state field {name!r} is {tuple(tensor.shape)} {tensor.dtype}{contiguous}; "
                f"expected {shape} {wide}, contiguous"
            )
    parameters = (dt_bias, b_weight, c_weight, b_bias, c_bias, skip, mimo_x, mimo_z, mimo_o, norm_weight)
    return _operator(
        projected,
        *(
            parameter if parameter is None or parameter.dtype == wide else parameter.to(wide)
            for parameter in parameters
        ),
        *fields,
        projection.num_groups,
        pairing,
        projection.a_activation,
        projection.a_floor,
        projection.rotation,
        projection.trapezoid,
        epsilon,
    )


def _fake(projected: Tensor, *rest: Tensor) -> Tensor:
    v = rest[13]
    return projected.new_empty(v.shape[0], v.shape[1] * v.shape[2])


_operator = Operator(
    "mamba3_step",
    "Tensor projected, Tensor dt_bias, Tensor b_weight, Tensor c_weight, Tensor b_bias, Tensor c_bias, Tensor skip, "
    "Tensor? mimo_x, Tensor? mimo_z, Tensor? mimo_o, Tensor? norm_weight, "
    "Tensor(a!) angle, Tensor(b!) ssm, Tensor(c!) k, Tensor(d!) v, int num_groups, str pairing, "
    "str a_activation, float a_floor, str rotation, bool trapezoid, float epsilon",
    outputs=1,
    fake=_fake,
    modules={name: f"{_PACKAGE}.step_{name}" for name in ("reference", "torch", "cpu")}
    | {"triton": f"{_PACKAGE}.triton_step"},
)
