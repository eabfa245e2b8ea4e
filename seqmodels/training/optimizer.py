"""AdamW with groups by parameter name, and its state as plain named tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from seqmodels.models.hints import parameter_hints
from seqmodels.training.config import OptimizerConfig

_STATE = ("exp_avg", "exp_avg_sq", "step")


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, part: Callable[[str], Any] = lambda name: None
) -> torch.optim.AdamW:
    """AdamW over the parameters of ``model``, grouped by weight decay and peak learning rate.

    Matrices get ``config.weight_decay``; vectors and scalars (norms, biases) get none. A layer's
    hint replaces the decay, and caps the learning rate: min(hint, global). Each group carries its
    ``peak`` learning rate; :func:`set_learning_rate` multiplies it by the schedule's factor. A group holds
    parameters of one ``part(name)``, which may have a factor of its own.
    """
    hints = parameter_hints(model)
    groups: dict[tuple[float, float, Any], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        hint = hints.get(name)
        decay = config.weight_decay if parameter.dim() >= 2 else 0.0
        peak = config.learning_rate
        if hint is not None:
            decay = decay if hint.weight_decay is None else hint.weight_decay
            peak = peak if hint.learning_rate is None else min(hint.learning_rate, peak)
        groups.setdefault((decay, peak, part(name)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr": peak, "peak": peak, "part": own}
            for (decay, peak, own), parameters in groups.items()
        ],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.epsilon,
        fused=True,
    )


def set_learning_rate(
    optimizer: torch.optim.Optimizer, factor: float, own: Callable[[Any], float] = lambda part: 1.0
) -> None:
    """Every group's learning rate becomes its peak times ``factor`` times that of its part. At 0 nothing moves:
    weight decay is multiplied by it too."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * factor * own(group["part"])


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as ``parameter name + field`` to tensor; empty before the first step."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for field, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{field}"] = value
    return tensors


def load_optimizer_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    untrained: Collection[str] = (),
) -> None:
    """Inverse of :func:`optimizer_tensors`; every trained parameter must be there, and ``untrained`` ones may be.

    Raises:
        KeyError: a parameter without state in ``tensors``.
    """
    for name, parameter in model.named_parameters():
        if name in untrained and f"{name}.{_STATE[0]}" not in tensors:
            continue
        if parameter.requires_grad:
            optimizer.state[parameter] = {field: tensors[f"{name}.{field}"] for field in _STATE}
