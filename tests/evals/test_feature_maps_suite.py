"""The suite on feature maps: its measures on known rows, the distillation it relies on, its verdicts and its page."""

from __future__ import annotations

import json
import math

import pytest
import torch

from evals.feature_maps import __main__ as command
from evals.feature_maps import cells, measures, recipe
from evals.feature_maps.controls import judge
from seqmodels.mixers.feature_maps import FEATURE_MAPS


def test_measures_of_known_rows():
    q, k = recipe.tokens(0)(2)
    teacher = measures.softmax_weights(q, k)
    torch.testing.assert_close(teacher.sum(-1), torch.ones(2, 4, 64))
    equal = torch.ones(64, 64).tril() / torch.arange(1, 65)[:, None]
    equal = equal.expand_as(teacher)
    assert measures.entropy(equal) == pytest.approx(measures.uniform_entropy(64), rel=1e-5)
    assert measures.divergence(teacher, teacher) == pytest.approx(0, abs=1e-6)
    assert measures.divergence(teacher, equal) == pytest.approx(
        measures.uniform_entropy(64) - measures.entropy(teacher), rel=1e-4
    )
    assert measures.monotonicity(q, k, teacher) == pytest.approx(1, abs=1e-6)
    assert measures.monotonicity(q, -k, teacher) == pytest.approx(-1, abs=1e-6)
    assert measures.monotonicity(q, k, equal) == 0


def test_ranks_share_ties_as_scipy_does():
    ranks = measures._ranks(torch.tensor([3.0, 1.0, 3.0, 2.0]))
    assert ranks.tolist() == [3.0, 0.5, 3.0, 1.5]  # 0-based, halves of (below + not above)


def test_distillation_brings_hedgehog_close_and_not_relu():
    """The acceptance test: KL below 0.25 and below half of relu's after 300 steps from the identity."""
    found = {}
    for name in ("hedgehog_exp", "t2r"):
        draw = recipe.tokens(0)
        held_out = draw(32)
        pair = recipe.Pair(*(FEATURE_MAPS[name](recipe.HEADS, recipe.WIDTH) for _ in range(2)))
        teacher = measures.softmax_weights(*held_out)
        with torch.no_grad():
            before = measures.divergence(teacher, pair.weights(*held_out))
        recipe.distil(pair, draw)
        with torch.no_grad():
            found[name] = measures.divergence(teacher, pair.weights(*held_out))
        if name == "hedgehog_exp":
            assert before > 1  # the identity is not spiky
    assert found["hedgehog_exp"] < 0.25
    assert found["hedgehog_exp"] < 0.5 * found["t2r"]


def _rows(change: dict[tuple[str, str, str, str], float] | None = None) -> list[dict]:
    """Rows in the known order, with some values changed."""
    values = {
        ("tokens", "softmax", "untrained", "entropy"): 0.36,
        ("tokens", "hedgehog_exp", "distilled", "divergence"): 0.14,
        ("tokens", "hedgehog_exp", "distilled", "entropy"): 0.5,
        ("tokens", "hedgehog_exp", "distilled", "monotonicity"): 0.8,
        ("tokens", "hedgehog_joint", "distilled", "divergence"): 0.15,
        ("tokens", "t2r", "distilled", "divergence"): 1.8,
        ("tokens", "elu", "untrained", "entropy"): 3.17,
        ("tokens", "elu", "untrained", "monotonicity"): 0.65,
        ("tokens", cells.EXPONENTIAL, "untrained", "entropy"): 1.6,
        ("tokens", cells.EXPONENTIAL, "untrained", "monotonicity"): 0.52,
        ("noise", "softmax", "untrained", "entropy"): 4.37,
        ("noise", "hedgehog_exp", "untrained", "entropy"): 4.84,
        ("noise", "elu", "untrained", "entropy"): 4.85,
        **(change or {}),
    }
    return [
        {"config": {"inputs": i, "map": m, "stage": s}, "metric": metric, "value": value, "seed": seed}
        for seed in cells.SEEDS
        for (i, m, s, metric), value in values.items()
    ]


def test_every_claim_can_fail():
    assert all(holds for _, holds in judge(_rows()))
    changes = [
        (
            "tokens",
            "hedgehog_exp",
            "distilled",
            "divergence",
            0.3,
            ("tokens", "hedgehog_joint", "distilled", "divergence"),
        ),
        ("tokens", "t2r", "distilled", "divergence", 0.2, None),
        ("tokens", "hedgehog_exp", "distilled", "entropy", 1.5, None),
        ("tokens", "elu", "untrained", "entropy", 2.5, None),
        ("tokens", cells.EXPONENTIAL, "untrained", "entropy", 2.5, None),
        ("tokens", cells.EXPONENTIAL, "untrained", "monotonicity", 0.75, None),
        ("noise", "softmax", "untrained", "entropy", 4.5, None),
        ("noise", "hedgehog_exp", "untrained", "entropy", 4.7, None),
        ("noise", "elu", "untrained", "entropy", 4.7, None),
    ]
    for number, (*key, value, also) in enumerate(changes):
        change = {tuple(key): value, **({also: value} if also else {})}
        verdicts = judge(_rows(change))
        assert not verdicts[number][1], verdicts[number][0]
    assert not any(holds for _, holds in judge([]))


def test_command(tmp_path, capsys, monkeypatch):
    kept = [cells.Cell("tokens", "elu", "untrained", seed) for seed in cells.SEEDS]
    monkeypatch.setattr(cells, "cells", lambda: iter(kept))
    assert command.main(["--out", str(tmp_path)]) == 1  # measured, but nothing stands beside elu
    assert "holds: control: elu is not spiky" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["metric"] for row in rows} == {"entropy", "monotonicity", "divergence"}
    assert all(math.isfinite(row["value"]) for row in rows)
    assert command.main(["--out", str(tmp_path)]) == 1
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(rows)  # finished cells stay
    (tmp_path / "README.md").unlink()
    assert command.main(["--report", str(tmp_path)]) == 0
    assert "| elu | untrained | 3.17" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "maps.png").stat().st_size > 10_000
    assert command.main(["--report", str(tmp_path / "empty")]) == 2
