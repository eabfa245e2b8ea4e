"""One process, or several under torchrun: who this one is, and what they do together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from seqmodels.configuration import ConfigError


@dataclass(frozen=True)
class Processes:
    """This process's place among ``world_size`` ones."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def mean(self, value: Tensor) -> Tensor:
        """Average over processes."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.world_size
        return value

    def on_main(self, action: Callable[[], object]) -> None:
        """Runs ``action`` on the main process while the others wait; all raise when it fails."""
        error: BaseException | None = None
        if self.is_main:
            try:
                action()
            except Exception as caught:
                error = caught
        self.raise_together(error)

    def together(self, action: Callable[[], object]) -> None:
        """Runs ``action`` on every process and waits for the others; all raise when one fails."""
        error: BaseException | None = None
        try:
            action()
        except Exception as caught:
            error = caught
        self.raise_together(error)

    def raise_together(self, error: BaseException | None) -> None:
        """Every process raises when one has an ``error``, so that none waits for it for ever."""
        if self.world_size > 1:
            messages: list[str | None] = [None] * self.world_size
            dist.all_gather_object(messages, None if error is None else str(error))
            if error is None:
                failed = [f"rank {rank}: {message}" for rank, message in enumerate(messages) if message is not None]
                if failed:
                    raise RuntimeError("; ".join(failed))
        if error is not None:
            raise error


def device_named(name: str) -> torch.device:
    """The device of a configuration; ``auto`` is CUDA when there.

    Raises:
        ConfigError: no device of PyTorch, or CUDA where there is none.
    """
    try:
        target = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ConfigError(f"device={name!r} is no device of PyTorch; expected auto, cpu, cuda or cuda:N") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device={name!r}, but PyTorch {torch.__version__} finds no CUDA here; set device=cpu or auto"
        )
    return target


@contextlib.contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """Joins torchrun's process group when there is one (gloo on the CPU, NCCL on CUDA) and leaves it at the end."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    target = device_named(device)
    if target.type == "cuda" and target.index is None:
        target = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if target.type == "cuda":
        torch.cuda.set_device(target)
    owned = world_size > 1 and not dist.is_initialized()
    if owned:
        dist.init_process_group("nccl" if target.type == "cuda" else "gloo")
    try:
        yield Processes(rank, world_size, target)
    finally:
        if owned:
            dist.destroy_process_group()


def parallelize(
    objective: nn.Module,
    blocks: list[nn.Module],
    kind: Literal["ddp", "fsdp"],
    here: Processes,
    *,
    whole: bool = True,
    apart: Sequence[str] = (),
) -> nn.Module:
    """The objective with gradients averaged over processes; parameters sharded block by block for ``fsdp``.

    Args:
        whole: every parameter meets a gradient in every step (under a curriculum, not all do).
        apart: parameters with sparse gradients, which the caller averages
            (:func:`~seqmodels.training.gradients.settle_sparse_gradients`); none for ``fsdp``.
    """
    if here.world_size == 1:
        return objective
    if kind == "fsdp":
        mesh = dist.init_device_mesh(here.device.type, (here.world_size,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(objective, mesh=mesh)
        return objective
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, list(apart))
    devices = [here.device] if here.device.type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=devices, find_unused_parameters=not whole)


@contextlib.contextmanager
def gradient_exchange(objective: nn.Module, last: bool) -> Iterator[None]:
    """Lets only the ``last`` micro-batch of a step exchange gradients."""
    if isinstance(objective, FSDPModule):
        objective.set_requires_gradient_sync(last)
        yield
    elif isinstance(objective, DistributedDataParallel) and not last:
        with objective.no_sync():
            yield
    else:
        yield
