"""The public function of RMSNorm: equation, checks and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.backends import requested_backend
from seqmodels.ops.registration import Operator
from seqmodels.ops.rms_norm import torch as plain

# Below so many numbers PyTorch's own calls are faster than one of ours (one row: 6 to 13 us beside 20 to 24).
_SMALL = 8192
_PACKAGE = "seqmodels.ops.rms_norm"


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """y = weight * x / sqrt(mean(x^2) + epsilon), over the last dimension.

    ``torch.nn.functional.rms_norm``, which on the CPU is a chain of elementwise operations; here a C++
    kernel does it in one pass and its backward, which computes the mean square again and keeps only
    ``x``, in one more. Compilers fuse the plain form with what is around it, so compiled code and other
    devices get that.

    Args:
        x: (..., width). weight: (width), in x's dtype.

    Returns:
        x's shape and dtype. Sums are taken in float32 (float64).

    Raises:
        ValueError: shapes that do not fit together. TypeError: mixed dtypes.
    """
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight is {tuple(weight.shape)} beside x {tuple(x.shape)}; expected (width,)")
    if weight.dtype != x.dtype:
        raise TypeError(f"rms_norm: weight is {weight.dtype} and x {x.dtype}; expected one dtype")
    # A decode step: the pass is shorter than the dispatch.
    small = x.numel() < _SMALL and requested_backend() == "auto"
    if x.device.type != "cpu" or torch.compiler.is_compiling() or small:
        return plain.forward(x, weight, epsilon)
    return _operator(x, weight, epsilon)


_operator = Operator(
    "rms_norm",
    "Tensor x, Tensor weight, float epsilon",
    outputs=1,
    fake=lambda x, weight, epsilon: torch.empty_like(x, memory_format=torch.contiguous_format),
    modules={name: f"{_PACKAGE}.{name}" for name in ("reference", "torch", "cpu")},
    differentiable=(0, 1),
)
