"""Learning-rate schedules: a factor in [0, 1] for each step."""

from __future__ import annotations

import math

from seqmodels.training.config import ScheduleConfig


def learning_rate_factor(config: ScheduleConfig, step: int, steps: int) -> float:
    """Factor of optimiser step ``step`` (0 to ``steps - 1``), with f = ``final_fraction``.

    Warm-up over w steps: (step + 1) / w. Then, with p the part of the remaining way done:
    ``cosine``: f + (1 - f) (1 + cos(pi p)) / 2. ``wsd``: 1 until the last ``decay_steps``, over
    which it falls in a straight line to f. The last step has p = 1 in both.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    last = steps - 1
    if config.name == "wsd":
        decay = config.decay_steps or max(1, steps // 5)
        begin = max(config.warmup_steps, last - decay)
    else:
        begin = config.warmup_steps
    progress = min(1.0, max(0.0, (step - begin) / max(1, last - begin)))
    shape = (1 + math.cos(math.pi * progress)) / 2 if config.name == "cosine" else 1 - progress
    return config.final_fraction + (1 - config.final_fraction) * shape
