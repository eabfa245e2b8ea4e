"""The grouped linear map: one matrix product a group on the CPU, PyTorch's grouped product on a GPU.

On the CPU the ends are read and each group is a dense product on a slice, at the dense rate.
``torch.nn.functional.grouped_mm`` keeps them on the device. It takes bfloat16 with rows of a multiple of
16 bytes; everything else goes by slices on a GPU too, and so waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def _by_slices(x: Tensor, weight: Tensor) -> bool:
    aligned = all(width % 8 == 0 for width in weight.shape[1:])
    return x.device.type != "cuda" or x.dtype != torch.bfloat16 or not aligned


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            yield group, slice(start, end)
        start = max(start, end)


def forward(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if not _by_slices(x, weight):
        x, weight = x.contiguous(), weight.contiguous()
        y = torch.nn.functional.grouped_mm(x, weight.mT, offs=ends)
        used = torch.arange(x.shape[0], device=x.device) < ends[-1]  # the product leaves the rows behind unwritten
        return torch.where(used[:, None], y, 0)
    y = x.new_empty(x.shape[0], weight.shape[1])
    y[int(ends[-1]) :] = 0
    for group, rows in _groups(ends):
        torch.mm(x[rows], weight[group].T, out=y[rows])
    return y


def backward(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    if not _by_slices(x, weight):
        grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
        used = (torch.arange(x.shape[0], device=x.device) < ends[-1])[:, None]
        grad_x = torch.nn.functional.grouped_mm(grad, weight, offs=ends)
        grad_weight = torch.nn.functional.grouped_mm(grad.mT, x, offs=ends)
        return torch.where(used, grad_x, 0), grad_weight
    grad_x, grad_weight = torch.zeros_like(x), torch.zeros_like(weight)
    for group, rows in _groups(ends):
        torch.mm(grad[rows], weight[group], out=grad_x[rows])
        torch.mm(grad[rows].T, x[rows], out=grad_weight[group])
    return grad_x, grad_weight
