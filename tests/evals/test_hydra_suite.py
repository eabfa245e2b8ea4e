"""The Hydra study: its tasks, its rows, its page and its controls."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evals.hydra import facts, memory, routing, speed
from evals.hydra.__main__ import main
from evals.hydra.cell import run
from evals.hydra.report import write_report
from evals.hydra.runner import write_rows
from evals.hydra.suites import suite_cells
from evals.hydra.summary import SUITE, collect, judge
from evals.hydra.training import generator
from evals.results import Results, read


def test_values_stand_where_no_window_reaches() -> None:
    tokens, targets = memory.rows(generator(1), 200)
    place = (tokens == memory.NAME).nonzero()
    assert place.shape[0] == 200  # once in each row
    named = tokens[place[:, 0], place[:, 1] + 1]
    assert torch.equal(named, targets[:, -1])
    asked = tokens == memory.ASK
    assert (asked.sum(1) == memory.ASKED).all()
    assert torch.equal(asked, targets >= 0)
    assert (targets[asked] == named[:, None].expand(-1, memory.ASKED).flatten()).all()
    assert int(asked.nonzero()[:, 1].amin()) - (int(place[:, 1].amax()) + 1) > memory.REACH
    assert not torch.equal(tokens, memory.rows(generator(2), 200)[0])


def test_domains_decide_the_next_token() -> None:
    tokens, targets = routing.rows(generator(3), 64)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    pairs = [set(zip(a.tolist(), b.tolist(), strict=True)) for a, b in zip(tokens, targets, strict=True)]
    counts: dict[tuple[int, int], int] = {}
    for row in pairs:
        for pair in row:
            counts[pair] = counts.get(pair, 0) + 1
    common = sum(sorted(counts.values(), reverse=True)[: 64 * 4])
    assert common / sum(counts.values()) > 0.8  # four successors of each of 64 tokens carry 90 %


def test_facts_are_distinct_and_repeatable() -> None:
    tokens, targets = facts.facts(0, 500)
    assert len({tuple(pair) for pair in tokens.tolist()}) == 500
    assert torch.equal(targets, facts.facts(0, 500)[1])
    assert not torch.equal(targets, facts.facts(1, 500)[1])


def test_usage_is_what_the_decode_state_says() -> None:
    cell = next(cell for cell in suite_cells("smoke") if cell.study == "routing")
    rows = run(cell)["rows"]
    shares = [row["about"]["share"] for row in rows if row["metric"] == "assignment_entropy"]
    assert len(shares) == 2
    assert all(sum(share) == pytest.approx(1) for share in shares)


def test_the_eager_transformer_is_the_fused_one() -> None:
    contestants = speed.models({"d_model": 32, "blocks": 2})
    eager, fused = contestants["transformer, eager"], contestants["transformer, fused"]
    eager.load_state_dict(fused.state_dict())
    ids = torch.randint(256, (2, 33))
    torch.testing.assert_close(eager(ids).logits, fused(ids).logits, rtol=1e-4, atol=1e-4)
    assert type(eager.backbone.layers()[0]) is not type(fused.backbone.layers()[0])


def test_a_blind_model_cannot_win() -> None:
    """Without a workspace and a recurrence, the answer's logits do not depend on the value at all; experts are routed
    by the chunk before, which lies inside the window's reach."""
    model = memory.build({"mixer": "gated_conv", "workspace": False}).double()
    tokens, _ = memory.rows(generator(4), 3)
    changed = tokens.clone()
    changed[:, : memory.WINDOW + 1] = memory.FILLER
    torch.testing.assert_close(model(changed).logits[:, -1], model(tokens).logits[:, -1], rtol=0, atol=1e-12)
    seeing = memory.build({"mixer": "gated_conv", "workspace": True, "address_std": 8.0}).double()
    assert (seeing(changed).logits[:, -1] - seeing(tokens).logits[:, -1]).abs().max() > 1e-6


@pytest.mark.parametrize("mixer", ["gated_conv", "hydra_diag"])
def test_arms_have_as_many_parameters(mixer: str) -> None:
    on, off = (
        memory.build({"mixer": mixer, "workspace": on, "address_std": 8.0}).num_parameters() for on in (True, False)
    )
    assert off == pytest.approx(on, rel=2e-3)


def test_slots_that_choose_see_the_value() -> None:
    """What the layer's first addresses are for: the value reaches the last question's read before any training."""
    seen = {}
    for address_std in (1.0, 8.0):
        torch.manual_seed(0)
        model = memory.build({"mixer": "gated_conv", "workspace": True, "address_std": address_std})
        seen[address_std] = memory.signal(model, memory.rows(generator(5), 64)[0])
    assert seen[8.0] > 3 * seen[1.0] > 0


def test_rows_page_and_controls(tmp_path: Path) -> None:
    results = Results(tmp_path, SUITE)
    chosen = {}
    for cell in suite_cells("smoke"):
        if cell.seed == 0:
            chosen.setdefault((cell.study, "off" in cell.arm), cell)
    for cell in chosen.values():
        write_rows(results, cell, run(cell))
    runs = collect(read(tmp_path))
    assert set(runs) == {cell.digest for cell in chosen.values()}
    page = write_report(tmp_path, [tmp_path]).read_text()
    for section in ("Throughput", "Routing", "Memory beyond the window", "Closed-book facts"):
        assert f"## {section}" in page
    assert "hydra (mamba3)" in page
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "throughput.png",
        "routing.png",
        "memory.png",
        "facts.png",
    }
    assert judge(list(runs.values())) == []  # a smoke run proves nothing


def test_controls_can_fail() -> None:
    def rows(study: str, arm: str, values: dict[str, float]) -> list[dict]:
        cell = next(c for c in suite_cells("cpu") if (c.study, c.arm, c.seed) == (study, arm, 0))
        about = {"suite": "cpu", "study": study, "arm": arm, "digest": cell.digest, "chance": 1 / 16, "facts": 100}
        stamp = {"suite": SUITE, "layer": "", "backend": "", "seed": 0, "rival": None, "machine": "", "time": "1"}
        options = {"cell": {"options": cell.options}}
        return [
            {**stamp, "case": cell.name, "metric": metric, "value": value, "config": {**about, **options}}
            for metric, value in {**values, "run_time": 1.0}.items()
        ]

    def verdicts(sees: float, blind: float, ablated: float) -> list[bool]:
        found = rows("memory", "gated_conv/workspace on", {"accuracy": sees})
        found += rows("memory", "gated_conv/workspace off", {"accuracy": blind})
        found += rows("facts", "memory on", {"accuracy": 0.9, "accuracy_ablated": ablated})
        return [holds for _, holds in judge(list(collect(found).values()))]

    assert verdicts(0.9, 0.07, 0.1) == [True, True, True]
    assert verdicts(0.89, 0.5, 0.9) == [False, False, False]


def test_command_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["--suite", "cpu", "--list"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(suite_cells("cpu")) == 44
    assert main(["--suite", "cpu", "--list", "--study", "facts", "throughput"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert {line.split("/")[0] for line in listed} == {"facts", "throughput"}
    assert main(["--suite", "gpu", "--out", str(tmp_path)]) == 2
    assert "unknown suite 'gpu'" in capsys.readouterr().err
    assert main(["--report", str(tmp_path)]) == 2
    assert "no finished hydra runs" in capsys.readouterr().err
