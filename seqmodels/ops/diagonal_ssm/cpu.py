"""A diagonal SSM by the C++ kernels of ``csrc/cpu/diagonal_ssm.cpp``, one pass for each row of c."""

from __future__ import annotations

import torch
from torch import Tensor


def supports(u: Tensor, *rest: object) -> str | None:
    return None if u.dtype == torch.float32 else f"the C++ kernels take float32; u is {u.dtype}"


def _optional(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def forward(
    u: Tensor,
    z: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    u, z, b, c, skip = (tensor.contiguous() for tensor in (u, z, b, c, skip))
    documents = _optional(initial_state, starts, lengths)
    rows = [
        torch.ops.seqmodels_cpu.diagonal_ssm(u, z, b, weight, direct, *documents, reverse)
        for weight, direct in zip(c, skip, strict=True)
    ]
    final_state = rows[0][1]
    y = rows[0][0].unsqueeze(2) if len(rows) == 1 else torch.stack([y for y, _ in rows], 2)
    return y, torch.zeros_like(final_state) if reverse else final_state


def backward(
    grad_y: Tensor,
    grad_final: Tensor,
    u: Tensor,
    z: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, ...]:
    u, z, b, c, skip = (tensor.contiguous() for tensor in (u, z, b, c, skip))
    documents = _optional(initial_state, starts, lengths)
    grad_final = torch.zeros_like(grad_final) if reverse else grad_final.contiguous()
    rows = []
    for row, (weight, direct) in enumerate(zip(c, skip, strict=True)):
        grad = grad_y[:, :, row].contiguous()
        behind = grad_final if row == 0 else torch.zeros_like(grad_final)
        rows.append(
            torch.ops.seqmodels_cpu.diagonal_ssm_backward(grad, behind, u, z, b, weight, direct, *documents, reverse)
        )
    grad_u, grad_z, grad_b, grad_c, grad_skip, grad_initial = zip(*rows, strict=True)
    return (
        _sum(grad_u),
        _sum(grad_z).to(z.dtype),
        _sum(grad_b),
        torch.stack(grad_c),
        torch.zeros_like(skip) if reverse else torch.stack(grad_skip),
        grad_y.new_empty(0) if initial_state is None else _sum(grad_initial),
    )


def _sum(parts: tuple[Tensor, ...]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
