"""A step whose loss or gradient is not finite: find where, keep what is needed to see it again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.utils._pytree as pytree
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from seqmodels.state import State
from seqmodels.tasks.text import TextBatch
from seqmodels.training.gradients import stored


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
        if gradient is not None and not bool(stored(gradient).isfinite().all()):
            names.append(name)
    return names


def first_non_finite_output(objective: nn.Module, run: Iterable) -> str | None:
    """Name of the first module whose output is not finite while ``run`` (an iterable that calls it) goes on."""
    found: list[str] = []

    def watch(name: str):
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            # Not the states: scores of pinned tokens are infinite in them.
            for tensor in pytree.tree_leaves(output, is_leaf=lambda value: isinstance(value, State)):
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


def diverged(
    folder: Path,
    what: str,
    batches: list[TextBatch],
    weights: dict[str, Tensor] | None,
    *,
    rank: int,
    output: str | None,
    gradients: list[str],
    carried: dict[str, Tensor] | None = None,
) -> TrainingDiverged:
    """Saves ``batch_RANK.safetensors``, ``model.safetensors`` and ``report.json``, and ``carried_RANK.safetensors``
    where rows go on from states; the error to raise.

    Args:
        what: step, loss and gradient norm in words.
        batches: this process's micro-batches of the step.
        weights: before the step; None on all processes but one.
        output, gradients: what :func:`first_non_finite_output` and :func:`non_finite_gradients` found.
        carried: the states that the rows go on from.
    """
    lengths = [row for batch in batches for row in batch.lengths]
    tensors = {
        "tokens": torch.cat([batch.tokens for batch in batches]),
        "targets": torch.cat([batch.targets for batch in batches]),
        "document_counts": torch.tensor([len(row) for row in lengths]),
        "document_lengths": torch.tensor([length for row in lengths for length in row]),
    }
    if batches[0].inside:
        tensors["inside"] = torch.tensor([begun for batch in batches for begun in batch.inside])
    if batches[0].masked is not None:
        tensors["masked"] = torch.cat([batch.masked for batch in batches if batch.masked is not None])
    report = {"what": what, "first_non_finite_output": output, "non_finite_gradients": gradients}
    saved = f"The batch, the weights and a report are in {folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / f"batch_{rank}.safetensors")
        if carried:
            save_file({name: tensor.cpu() for name, tensor in carried.items()}, folder / f"carried_{rank}.safetensors")
        if weights is not None:
            plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
            save_file(plain, folder / "model.safetensors")
            (folder / "report.json").write_text(json.dumps(report, indent=1))
    except (OSError, SafetensorError) as error:
        saved = f"The batch could not be saved in {folder} ({error})"
    place = output or (f"the gradient of {gradients[0]}" if gradients else "another process's batch")
    return TrainingDiverged(
        f"{what}; first not finite: {place}. Weights are unchanged. {saved}. Start again with a lower "
        "optimizer.learning_rate or a longer schedule.warmup_steps; to keep the steps so far, change it in "
        f"{folder.parent / 'config.yaml'} too and go on with --resume",
        folder,
    )
