"""The public function of the grouped linear map: equation, checks and dispatch."""

from __future__ import annotations

from torch import Tensor

from seqmodels.ops.registration import Operator, cast_inputs

_PACKAGE = "seqmodels.ops.grouped_linear"


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """y[i] = weight[e] x[i] for the rows ends[e-1] <= i < ends[e]; zero for rows from the last end on.

    Args:
        x: (rows, in). Rows of a group stand side by side.
        weight: (groups, out, in).
        ends: (groups,) int32, where each group ends, never falling, at most ``rows``. On a GPU they stay
            on the device.

    Returns:
        (rows, out) in x's dtype (autocast's under autocast).

    Raises:
        ValueError: shapes that do not fit together.
    """
    x, weight = cast_inputs(x, weight)
    if x.dim() != 2 or weight.dim() != 3 or weight.shape[2] != x.shape[1] or ends.shape != weight.shape[:1]:
        raise ValueError(
            f"grouped_linear: x {tuple(x.shape)}, weight {tuple(weight.shape)} and ends {tuple(ends.shape)} do not "
            "fit together; expected (rows, in), (groups, out, in) and (groups,)"
        )
    return _operator(x, weight, ends)


_operator = Operator(
    "grouped_linear",
    "Tensor x, Tensor weight, Tensor ends",
    outputs=1,
    fake=lambda x, weight, ends: x.new_empty(x.shape[0], weight.shape[1]),
    modules={"reference": f"{_PACKAGE}.reference", "torch": f"{_PACKAGE}.torch", "cpu": f"{_PACKAGE}.torch"},
    differentiable=(0, 1),
)
