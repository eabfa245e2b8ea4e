"""AdamW with groups by parameter name (by rows for sparse gradients), and its state as plain named tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from seqmodels.models.hints import parameter_hints
from seqmodels.training.config import OptimizerConfig
from seqmodels.training.table_adam import TableAdam

_STATE = ("exp_avg", "exp_avg_sq", "step")


class AdamWithTables(torch.optim.Optimizer):
    """AdamW, and TableAdam for parameters with sparse gradients, as one: one list of groups, one state."""

    def __init__(self, dense: torch.optim.AdamW, tables: TableAdam) -> None:
        super().__init__([*dense.param_groups, *tables.param_groups], {})
        self._members = (dense, tables)
        for member in self._members:
            member.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of both."""
        for member in self._members:
            member.step()


def sparse_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters whose gradient is sparse, by their hints."""
    hints = parameter_hints(model)
    return [name for name, _ in model.named_parameters() if name in hints and hints[name].sparse_gradient]


def make_optimizer(
    model: nn.Module, config: OptimizerConfig, part: Callable[[str], Any] = lambda name: None
) -> torch.optim.AdamW | AdamWithTables:
    """AdamW over the parameters of ``model``, grouped by weight decay and peak learning rate.

    Matrices get ``config.weight_decay``; vectors and scalars (norms, biases) get none. A layer's
    hint replaces the decay, and caps the learning rate: min(hint, global). Each group carries its
    ``peak`` learning rate; :func:`set_learning_rate` multiplies it by the schedule's factor. A group holds
    parameters of one ``part(name)``, which may have a factor of its own. Parameters whose hint says that their
    gradient is sparse have :class:`~seqmodels.training.table_adam.TableAdam`.

    Raises:
        ValueError: weight decay on a sparse gradient.
    """
    hints = parameter_hints(model)
    groups: dict[tuple[float, float, Any, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        hint = hints.get(name)
        decay = config.weight_decay if parameter.dim() >= 2 else 0.0
        peak = config.learning_rate
        if hint is not None:
            decay = decay if hint.weight_decay is None else hint.weight_decay
            peak = peak if hint.learning_rate is None else min(hint.learning_rate, peak)
        sparse = hint is not None and hint.sparse_gradient
        if sparse and decay:
            raise ValueError(
                f"{name} has a sparse gradient and weight_decay={decay}; TableAdam does not decay weights: give the "
                "parameter's hint weight_decay=0.0"
            )
        groups.setdefault((decay, peak, part(name), sparse), []).append(parameter)
    dense: list[dict[str, Any]] = []
    tables: list[dict[str, Any]] = []
    for (decay, peak, own, sparse), parameters in groups.items():
        group = {"params": parameters, "weight_decay": decay, "lr": peak, "peak": peak, "part": own}
        (tables if sparse else dense).append(group)
    options: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.epsilon}
    adam = torch.optim.AdamW(dense, **options, fused=True)
    return AdamWithTables(adam, TableAdam(tables, **options)) if tables else adam


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
            # TableAdam counts its steps in a Python integer.
            tensors[f"{name}.{field}"] = value if isinstance(value, Tensor) else torch.tensor(value)
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
    tables = set(sparse_parameters(model))
    for name, parameter in model.named_parameters():
        if name in untrained and f"{name}.{_STATE[0]}" not in tensors:
            continue
        if parameter.requires_grad:
            state: dict[str, Any] = {field: tensors[f"{name}.{field}"] for field in _STATE}
            if name in tables:
                state["step"] = int(state["step"])
            optimizer.state[parameter] = state
