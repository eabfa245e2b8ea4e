"""The set disjointness study: equal states, runs that are kept, controls that can fail, a page from rows alone."""

from __future__ import annotations

import io
import json

import msgspec
import pytest
import torch
from rich.console import Console

from evals.results import Results, read
from evals.set_disjointness import cell as cell_module
from evals.set_disjointness import runner
from evals.set_disjointness.__main__ import main
from evals.set_disjointness.cell import build_model, state_elements
from evals.set_disjointness.report import write_report
from evals.set_disjointness.suites import SUITES, Cell, both_orders
from evals.set_disjointness.summary import collect, judge, points

TINY = msgspec.structs.replace(
    SUITES["cpu"],
    plan=msgspec.structs.replace(
        SUITES["cpu"].plan, train_sizes=both_orders((1, 4)), test_sizes=both_orders((1, 4), (2, 6)), steps=3,
        batch_size=4, warmup_steps=1, test_count=8,
    ),
    attention_steps=4, d_model=(16,), feature_dim=(2,), seeds=1,
)  # fmt: skip


def rows(results, accuracy):
    """Rows of every TINY cell with the given accuracies: arm to (small first, large first)."""
    for cell in TINY.cells("tiny"):
        small, large = accuracy[cell.arm]
        outcome = {
            "parameters": 1, "state_elements": 10, "loss": 0.1, "seconds": 1.0,
            "accuracy": {f"{a}-{b}": small if a < b else large for a, b in cell.plan.test_sizes},
        }  # fmt: skip
        runner.write_rows(results, cell, outcome)


@pytest.mark.parametrize(
    ("accuracy", "holds"),
    [
        ({"attention": (1.0, 0.99), "causal": (0.9, 0.5), "prefix": (0.9, 0.88)}, [True, True, True]),
        ({"attention": (1.0, 0.9), "causal": (0.5, 0.9), "prefix": (0.9, 0.88)}, [False, True, True]),
        ({"attention": (1.0, 1.0), "causal": (0.9, 0.88), "prefix": (0.9, 0.5)}, [True, False, False]),
        ({"attention": (1.0, 1.0), "causal": (0.9, 0.5), "prefix": (0.4, 0.4)}, [True, True, False]),
    ],
)
def test_controls_can_fail(tmp_path, accuracy, holds):
    results = Results(tmp_path, "set_disjointness", "here")
    rows(results, accuracy)
    verdicts = judge(points(collect(read(tmp_path)).values()))
    assert [verdict for _, verdict in verdicts] == holds


def test_causal_and_prefix_have_the_same_state_and_attention_all_tokens():
    for suite in SUITES.values():
        sizes = {}
        for cell in suite.cells("any"):
            model = build_model(cell, device="meta")
            sizes.setdefault((cell.d_model, cell.feature_dim), {})[cell.arm] = state_elements(model, 50)
            expected = cell.pairs * 2 * (1 + (f := cell.feature_dim) + f * (f + 1) // 2) * (cell.d_model // 2 + 1)
            if cell.arm == "attention":
                expected = cell.pairs * 2 * 50 * cell.d_model
            assert sizes[cell.d_model, cell.feature_dim][cell.arm] == expected


def test_a_prefix_model_reads_all_but_the_last_token_twice():
    """The answer's position must see what stands behind a token of A; in a causal model a token of A does not."""
    for cell in TINY.cells("tiny"):
        torch.manual_seed(0)
        model = build_model(cell).double()
        tokens = torch.randint(4, 60, (1, 9))
        seen: list = []
        note = seen.append
        handle = model.backbone.blocks[1].register_forward_hook(lambda module, given, out, note=note: note(out[0]))
        for last in (5, 6):
            tokens[0, 7] = last
            cell_module._logits(model, cell, tokens)
        handle.remove()
        assert bool((seen[0][0, 0] != seen[1][0, 0]).any()) is (cell.arm == "prefix")


def test_a_suite_runs_resumes_and_makes_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SUITES, "tiny", TINY)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    asked = ["--suite", "tiny", "--arms", "causal", "--out", str(tmp_path), "--jobs", "1"]
    assert main(asked) == 0
    content = (tmp_path / "results.jsonl").read_text()
    assert {json.loads(line)["config"]["arm"] for line in content.splitlines()} == {"causal"}
    assert main(asked) == 0
    assert (tmp_path / "results.jsonl").read_text() == content  # nothing was run again
    assert "kept from commit" in capsys.readouterr().out
    assert main(["--report", str(tmp_path)]) == 0
    assert "3 steps (causal)" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "tiny.png").stat().st_size > 5_000


def test_one_seed_gives_one_run():
    cell = TINY.cells("tiny")[1]
    first, second = cell_module.run(cell), cell_module.run(cell)
    assert first._replace(seconds=0) == second._replace(seconds=0)
    assert set(first.accuracy) == {"1-4", "4-1", "2-6", "6-2"}
    assert msgspec.json.decode(msgspec.json.encode(cell), type=Cell) == cell


def test_a_broken_cell_is_reported_and_tried_again(tmp_path):
    broken = msgspec.structs.replace(TINY.cells("tiny")[1], device="nowhere")
    results = Results(tmp_path, "set_disjointness")
    runs, complete = runner.run([broken], results, 1, Console(file=io.StringIO()))
    assert (runs, complete) == ([], False)
    row = read(tmp_path)[0]
    assert row["metric"] == "failed"
    assert "nowhere" in row["config"]["reason"]


def test_wrong_arguments_are_named(tmp_path, capsys):
    assert main(["--suite", "gpu", "--out", str(tmp_path)]) == 2
    assert "unknown suite 'gpu'" in capsys.readouterr().err
    assert main(["--suite", "cpu", "--arms", "mamba", "--out", str(tmp_path)]) == 2
    assert "unknown arm mamba; known: attention, causal, prefix" in capsys.readouterr().err
    assert main(["--report", str(tmp_path / "none")]) == 2
    assert "no finished set_disjointness runs" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        write_report(tmp_path, [tmp_path / "none"])
