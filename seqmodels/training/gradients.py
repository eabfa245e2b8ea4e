"""Gradients of a step, dense and sparse: averaged over processes, their norm, and clipping."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from seqmodels.configuration import ConfigError
from seqmodels.training.distributed import Processes


def check_sparse_gradients(names: Sequence[str], *, sharded: bool, compiled: bool) -> None:
    """Refuses parameters with sparse gradients where PyTorch cannot make them.

    Raises:
        ConfigError: FSDP2 or torch.compile.
    """
    if names and (sharded or compiled):
        asked = "parallel=fsdp shards no sparse gradient" if sharded else "compile=true traces no sparse gradient"
        way = "parallel=ddp" if sharded else "compile=false"
        raise ConfigError(f"{asked}, and {names[0]} has one; set the layer's sparse: false, or {way}")


def settle_sparse_gradients(parameters: Iterable[nn.Parameter], here: Processes) -> None:
    """Adds up what sparse gradients hold twice of a row, and averages them over processes.

    DDP leaves them alone: it would send them dense, and NCCL has no sparse reduction. Rows read and their values are
    gathered instead, and added in the order of the processes, so that all have the same numbers.
    """
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            gradient = _coalesced(parameter.grad)
            parameter.grad = _mean(gradient, here.world_size) if here.world_size > 1 else gradient


def stored(gradient: Tensor) -> Tensor:
    """The numbers that are stored of a gradient: all of a dense one, the values of a (coalesced) sparse one."""
    return gradient.values() if gradient.is_sparse else gradient


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """The 2-norm of all gradients as one vector. Sparse ones must be settled: rows held twice add up first."""
    norm = torch.nn.utils.get_total_norm([stored(p.grad) for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def clip_gradients(parameters: Iterable[nn.Parameter], maximum: float, norm: Tensor) -> None:
    """Multiplies every gradient by min(1, maximum / norm)."""
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    torch.nn.utils.clip_grads_with_norm_([p for p in with_gradient if not _sparse(p)], maximum, norm)
    coefficient = (maximum / (norm + 1e-6)).clamp(max=1.0)  # as torch has it
    for parameter in filter(_sparse, with_gradient):
        assert parameter.grad is not None
        stored(parameter.grad).mul_(coefficient.to(parameter.device))


def _sparse(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and parameter.grad.is_sparse


def _coalesced(gradient: Tensor) -> Tensor:
    """Each row once. Autograd forgets that a gradient it stores is so already, and adding up copies all of it."""
    indices = gradient._indices()
    if indices.shape[0] == 1 and bool((indices[0].diff() > 0).all()):
        return torch.sparse_coo_tensor(
            indices, gradient._values(), gradient.shape, is_coalesced=True, check_invariants=False
        )
    return gradient.coalesce()


def _mean(gradient: Tensor, world_size: int) -> Tensor:
    indices, values = gradient.indices(), gradient.values()
    counts = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(world_size)]
    dist.all_gather(counts, counts[0].new_tensor([values.shape[0]]))
    sizes = [int(count) for count in counts]
    parts = []
    for tensor in (indices.mT.contiguous(), values):
        padded = tensor.new_zeros(max(sizes), *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
        gathered = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(gathered, padded)
        parts.append(torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)]))
    rows, numbers = parts
    return torch.sparse_coo_tensor(rows.mT, numbers / world_size, gradient.shape, check_invariants=False).coalesce()
