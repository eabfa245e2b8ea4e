"""The bound on a low-precision result: twice the definition's own error in that precision, and a floor."""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR_ULPS = 4  # one rounding each of input, product, sum and output


def check_against(found: dict[str, Tensor], low: dict[str, Tensor], exact: dict[str, Tensor], name: str) -> None:
    """``found`` and ``low`` (the definition in the same dtype) against ``exact`` (float64), tensor by tensor.

    The floor is relative to the largest value of the tensor's kind (gradients, or outputs): sums that cancel
    are no more exact than their terms.
    """
    assert found.keys() == exact.keys()
    epsilon = torch.finfo(torch.float32).eps
    for key, truth in exact.items():
        kind = [value for other, value in exact.items() if other.startswith("grad") == key.startswith("grad")]
        scale = max((value.abs().max().item() for value in kind if value.numel()), default=0.0)
        assert found[key].shape == truth.shape, (name, key)
        if truth.numel() == 0:
            continue
        error = (found[key].double() - truth).abs().max().item()
        allowed = 2 * (low[key].double() - truth).abs().max().item() + FLOOR_ULPS * epsilon * scale
        assert error <= allowed, f"{name}: {key} is {error:.3g} from the float64 definition; bound {allowed:.3g}"
