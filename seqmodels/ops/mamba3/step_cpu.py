"""One decode step of Mamba-3 by the C++ kernel of ``csrc/cpu/mamba3_step.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(projected: Tensor, *rest: object) -> str | None:
    if projected.dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ kernel takes float32 and bfloat16; projected is {projected.dtype}"
    rotation, trapezoid = rest[-3], rest[-2]
    if rotation == "fixed" or not trapezoid:
        return f"the C++ kernel has no rotation={rotation!r} with trapezoid={trapezoid}"
    return None


def forward(
    projected: Tensor,
    dt_bias: Tensor,
    b_weight: Tensor,
    c_weight: Tensor,
    b_bias: Tensor,
    c_bias: Tensor,
    skip: Tensor,
    mimo_x: Tensor | None,
    mimo_z: Tensor | None,
    mimo_o: Tensor | None,
    norm_weight: Tensor | None,
    angle: Tensor,
    ssm: Tensor,
    k: Tensor,
    v: Tensor,
    num_groups: int,
    pairing: str,
    a_activation: str,
    a_floor: float,
    rotation: str,
    trapezoid: bool,
    epsilon: float,
) -> Tensor:
    weights = (dt_bias, b_weight, c_weight, b_bias, c_bias, skip, mimo_x, mimo_z, mimo_o, norm_weight)
    return torch.ops.seqmodels_cpu.mamba3_step(
        projected.contiguous(),
        *(None if weight is None else weight.contiguous() for weight in weights),
        angle,
        ssm,
        k,
        v,
        num_groups,
        pairing == "half",
        a_activation == "heavy_tail",
        a_floor,
        epsilon,
    )
