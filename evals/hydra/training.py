"""A few hundred steps on generated batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqmodels.models import LanguageModel
from seqmodels.training.config import OptimizerConfig, ScheduleConfig
from seqmodels.training.optimizer import make_optimizer, set_learning_rate
from seqmodels.training.schedule import learning_rate_factor

Say = Callable[[dict[str, Any]], None]
EVERY = 25  # steps between messages


def train(
    model: LanguageModel,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    options: dict[str, Any],
    say: Say,
    watch: Callable[[int, dict[str, Tensor]], None] = lambda step, aux: None,
) -> None:
    """``options["steps"]`` steps of AdamW with warm-up and a cosine to a tenth; ``batch(step)`` gives ids and targets
    (-100: none), ``watch`` sees the layers' metrics of each step.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    steps = options["steps"]
    optimizer = make_optimizer(model, OptimizerConfig(learning_rate=options["learning_rate"], weight_decay=0.01))
    schedule = ScheduleConfig(name="cosine", warmup_steps=min(20, steps), final_fraction=0.1)
    model.train()
    for step in range(steps):
        output = model.loss(*batch(step))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_learning_rate(optimizer, learning_rate_factor(schedule, step, steps))
        optimizer.step()
        optimizer.zero_grad()
        watch(step + 1, output.aux)
        if (step + 1) % EVERY == 0 or step + 1 == steps:
            loss = float(output.cross_entropy / output.num_targets)
            if not torch.isfinite(output.loss):
                raise FloatingPointError(f"the loss is {loss} at step {step + 1}")
            say({"step": step + 1, "steps": steps, "loss": loss})
    model.eval()


def generator(*numbers: int) -> torch.Generator:
    """A generator of its own for each tuple of small numbers."""
    seed = 0
    for number in numbers:
        seed = seed * 1_000_003 + number
    return torch.Generator().manual_seed(seed % (1 << 63))
