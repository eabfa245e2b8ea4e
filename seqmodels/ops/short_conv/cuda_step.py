"""One step of the short convolution by the causal-conv1d package, where it is installed."""

from __future__ import annotations

from torch import Tensor

from seqmodels.ops.short_conv.causal_conv1d_package import package_function, refusal

BY_NAME_ONLY = True


def supports(x_t: Tensor, weight: Tensor, *rest: object) -> str | None:
    return refusal("causal_conv1d_update", x_t, weight)


def forward(x_t: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor, silu: bool) -> Tensor:
    function = package_function("causal_conv1d_update")
    assert function is not None  # supports() has looked
    window = state.to(x_t.dtype).transpose(1, 2)  # (batch, channels, W-1), the state itself in float32
    y = function(
        x_t.contiguous(),
        window,
        weight.contiguous(),
        None if bias is None else bias.to(weight.dtype),
        activation="silu" if silu else None,
    )
    if window.data_ptr() != state.data_ptr():
        state.copy_(window.transpose(1, 2))
    return y.contiguous()
