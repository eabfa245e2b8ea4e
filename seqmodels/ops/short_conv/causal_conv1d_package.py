"""Access to the optional causal-conv1d package, and what it cannot do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@functools.cache
def package_function(name: str) -> Callable[..., Any] | None:
    try:
        import causal_conv1d  # type: ignore[import-not-found]
    except ImportError:
        return None
    return getattr(causal_conv1d, name)


def refusal(function: str, x: Tensor, weight: Tensor) -> str | None:
    """What the package cannot do with these arguments, or how to get it."""
    if package_function(function) is None:
        return "causal-conv1d does not import; pip install causal-conv1d (needs nvcc), or use backend 'triton'"
    if x.dtype == torch.float64 or not 2 <= weight.shape[1] <= 4 or x.shape[-1] % 8:
        return (
            "causal-conv1d takes float32, bfloat16 and float16, widths 2 to 4 and channels in multiples of 8; "
            f"x is {x.dtype} with {x.shape[-1]} channels, the width is {weight.shape[1]}"
        )
    return None
