"""A step whose loss or gradient is not finite: find where, keep what is needed to see it again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.utils._pytree as pytree
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from seqmodels.tasks.text import TextBatch


class TrainingDiverged(RuntimeError):
    """The loss or the gradient became NaN or infinite. ``folder`` holds the batch and a report."""

    def __init__(self, message: str, folder: Path) -> None:
        super().__init__(message)
        self.folder = folder


def non_finite_gradients(model: nn.Module) -> list[str]:
    """Names of parameters whose gradient (this process's shard of it) is NaN or infinite somewhere."""
    names = []
    for name, parameter in model.named_parameters():
        gradient = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        if gradient is not None and not bool(gradient.isfinite().all()):
            names.append(name)
    return names


def first_non_finite_module(objective: nn.Module, run: Iterable) -> str | None:
    """Name of the first module whose output is not finite while ``run`` (an iterable that calls it) goes on."""
    found: list[str] = []

    def watch(name: str):
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            for tensor in pytree.tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    found.append(f"{name or 'model'} ({type(module).__name__})")
                    return

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in objective.named_modules()]
    try:
        with torch.no_grad():
            for _ in run:
                pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def save_divergence(folder: Path, batch: TextBatch, weights: dict[str, Tensor] | None, rank: int, report: dict) -> None:
    """Writes ``batch_rank.safetensors``, ``model.safetensors`` (the weights before the step) and ``report.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = torch.tensor([len(row) for row in batch.lengths])
    lengths = torch.tensor([length for row in batch.lengths for length in row])
    save_file(
        {"tokens": batch.tokens, "targets": batch.targets, "document_counts": counts, "document_lengths": lengths},
        folder / f"batch_{rank}.safetensors",
    )
    if weights is not None:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}, folder / "model.safetensors"
        )
        (folder / "report.json").write_text(json.dumps(report, indent=1))
