"""Learning-rate schedules against their definition, computed here in another way."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from seqmodels.training.config import ScheduleConfig
from seqmodels.training.schedule import learning_rate_factor


def factors(config: ScheduleConfig, steps: int) -> list[float]:
    return [learning_rate_factor(config, step, steps) for step in range(steps)]


def test_warm_up_rises_in_equal_parts_to_the_peak():
    found = factors(ScheduleConfig(warmup_steps=4), 20)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_cosine_is_half_way_in_the_middle_and_ends_at_the_final_fraction():
    found = factors(ScheduleConfig(final_fraction=0.2), 101)
    assert found[0] == 1.0
    assert found[50] == pytest.approx(0.6)
    assert found[25] == pytest.approx(0.2 + 0.8 * math.cos(math.pi / 8) ** 2)
    assert found[100] == pytest.approx(0.2)
    assert all(a >= b for a, b in pairwise(found))


def test_wsd_stays_and_then_falls_in_a_line():
    found = factors(ScheduleConfig(name="wsd", warmup_steps=10, decay_steps=20, final_fraction=0.0), 100)
    assert found[10:80] == [1.0] * 70
    falling = [a - b for a, b in pairwise(found[79:])]
    assert falling == pytest.approx([1 / 20] * 20)
    assert found[-1] == 0.0


def test_wsd_decays_over_a_fifth_when_nothing_is_said():
    found = factors(ScheduleConfig(name="wsd"), 50)
    assert sum(factor < 1 for factor in found) == 10


@pytest.mark.parametrize("name", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_shortest_runs_have_a_learning_rate(name, steps):
    for warmup in range(steps + 1):
        found = factors(ScheduleConfig(name=name, warmup_steps=warmup), steps)
        assert all(0 < factor <= 1 for factor in found)
