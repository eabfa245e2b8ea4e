"""The analysis suite: every value is the known one, a wrong one is told, and the page comes from the rows."""

from __future__ import annotations

import json

import pytest

from evals.long_range_theory import __main__ as command
from evals.long_range_theory import measures
from evals.long_range_theory.known import Finding


@pytest.mark.parametrize("topic", measures.TOPICS, ids=lambda topic: topic.__name__)
def test_known_values(topic) -> None:
    findings = list(topic())
    wrong = [f"{f.case}, {f.metric}: {f.value:.10g}, known {f.known}" for f in findings if not f.holds]
    assert not wrong
    assert any(finding.known for finding in findings)


def test_tolerance_is_the_last_digit() -> None:
    assert Finding("a", "b", 1.239, "1.23").holds
    assert not Finding("a", "b", 1.241, "1.23").holds
    assert Finding("a", "b", 7.3e-4, "7.2e-4").holds
    assert not Finding("a", "b", 7.35e-4, "7.2e-4").holds
    assert not Finding("a", "b", float("nan"), "1.0", relative=10.0).holds
    assert Finding("a", "b", -1.0, "0", below=True).holds
    assert not Finding("a", "b", 0.0, "0", below=True).holds


def test_command(tmp_path, capsys, monkeypatch) -> None:
    assert command.main(["--out", str(tmp_path), "--topics", "frequencies", "noise"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["suite"] for row in rows} == {"long_range_theory"}
    assert all(row["config"]["holds"] for row in rows)
    assert (tmp_path / "noise.png").stat().st_size > 10_000
    assert "| yes |" in (tmp_path / "README.md").read_text()
    assert command.main(["--report", str(tmp_path)]) == 0

    def wrong():
        yield Finding("kernels/x", "K0", 1.0, "2.000")

    wrong.__name__ = "kernels"
    monkeypatch.setattr(measures, "TOPICS", (wrong,))
    assert command.main(["--out", str(tmp_path / "wrong")]) == 1
    assert "WRONG: kernels/x, K0: 1; known 2.000" in capsys.readouterr().out
    assert command.main(["--out", str(tmp_path), "--topics", "kernel"]) == 2
    assert "Did you mean kernels" in capsys.readouterr().err
    assert command.main(["--report", str(tmp_path / "empty")]) == 2
