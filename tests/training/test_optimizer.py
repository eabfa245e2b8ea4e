"""Groups by parameter name, and the optimiser's state by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from seqmodels.mixers.base import ParameterHint
from seqmodels.training.config import OptimizerConfig
from seqmodels.training.optimizer import (
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
)


class Hinted(nn.Module):
    parameter_hints = {  # noqa: RUF012 - as layers write it
        "slow": ParameterHint(learning_rate=1e-4, weight_decay=0.0),
        "fast": ParameterHint(learning_rate=1.0),
        "decayed": ParameterHint(weight_decay=0.3),
    }

    def __init__(self):
        super().__init__()
        self.slow = nn.Parameter(torch.randn(2, 3))
        self.fast = nn.Parameter(torch.randn(2, 3))
        self.decayed = nn.Parameter(torch.randn(3))
        self.frozen = nn.Parameter(torch.randn(2, 2), requires_grad=False)
        self.linear = nn.Linear(3, 2)


def settings(model, optimizer):
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[p]: (group["weight_decay"], group["peak"]) for group in optimizer.param_groups for p in group["params"]
    }


def test_hints_cap_the_learning_rate_and_replace_the_decay():
    model = nn.Sequential(Hinted(), nn.RMSNorm(3))
    assert settings(model, make_optimizer(model, OptimizerConfig(learning_rate=1e-2, weight_decay=0.1))) == {
        "0.slow": (0.0, 1e-4),
        "0.fast": (0.1, 1e-2),  # a cap above the global rate changes nothing
        "0.decayed": (0.3, 1e-2),
        "0.linear.weight": (0.1, 1e-2),
        "0.linear.bias": (0.0, 1e-2),
        "1.weight": (0.0, 1e-2),
    }


def test_the_schedule_scales_every_group():
    model = Hinted()
    optimizer = make_optimizer(model, OptimizerConfig(learning_rate=1e-2))
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.25)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [1e-4 * 0.25, 1e-2 * 0.25]


def step(model, optimizer):
    optimizer.zero_grad()
    sum((p.sin() * 3).sum() for p in model.parameters() if p.requires_grad).backward()
    optimizer.step()


def test_state_by_name_continues_the_run_exactly():
    torch.manual_seed(1)
    model, copy = Hinted(), Hinted()
    config = OptimizerConfig(learning_rate=1e-2)
    optimizer, other = make_optimizer(model, config), make_optimizer(copy, config)
    for _ in range(3):
        step(model, optimizer)
    copy.load_state_dict(model.state_dict())
    saved = {name: tensor.clone() for name, tensor in optimizer_tensors(model, optimizer).items()}
    assert set(saved) == {
        f"{name}.{field}" for name in settings(model, optimizer) for field in ("exp_avg", "exp_avg_sq", "step")
    }
    load_optimizer_tensors(copy, other, saved)
    step(model, optimizer)
    step(copy, other)
    for (name, one), two in zip(model.named_parameters(), copy.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_missing_entry_is_named():
    model = Hinted()
    with pytest.raises(KeyError, match=r"slow\.exp_avg"):
        load_optimizer_tensors(model, make_optimizer(model, OptimizerConfig()), {})
