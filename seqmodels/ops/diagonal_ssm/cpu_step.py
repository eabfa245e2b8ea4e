"""One token of a diagonal SSM by the C++ kernel of ``csrc/cpu/diagonal_ssm.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(u_t: Tensor, *rest: object) -> str | None:
    return None if u_t.dtype == torch.float32 else f"the C++ kernel takes float32; the input is {u_t.dtype}"


def forward(u_t: Tensor, decay: Tensor, b: Tensor, c: Tensor, skip: Tensor, state: Tensor) -> Tensor:
    tables = (tensor.contiguous() for tensor in (u_t, decay, b, c, skip))
    return torch.ops.seqmodels_cpu.diagonal_ssm_step(*tables, state)
