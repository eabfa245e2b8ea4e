"""Rows survive a kill, are read back as written, and name what could not be measured."""

from __future__ import annotations

import json

import pytest

from evals.results import FIELDS, Results, commit, latest, machine, markdown_table, read


def test_rows_have_every_field_and_read_back(tmp_path):
    results = Results(tmp_path, "demo")
    row = results.write(
        "a/L8", "latency", 1.5, "ms", layer="mamba3", backend="cpu", seed=0, config={"length": 8}, rival="sdpa"
    )
    assert tuple(row) == FIELDS
    assert read(tmp_path) == [row]
    assert row["machine"] == machine()
    assert row["commit"] == commit()
    assert "torch" in row["versions"]


def test_half_written_row_of_a_killed_run_is_cut(tmp_path):
    results = Results(tmp_path, "demo")
    kept = results.write("a", "latency", 1, "ms")
    with results.path.open("a") as file:
        file.write('{"suite": "de')
    other = Results(tmp_path, "demo").write("b", "latency", 2, "ms")
    assert read(results.path) == [kept, other]


def test_finished_counts_measured_cases_of_this_machine_and_commit(tmp_path):
    results = Results(tmp_path, "demo")
    results.write("done", "latency", 1, "ms")
    results.write("failed", "latency", None, "ms", config={"reason": "out of memory"})
    Results(tmp_path, "demo", "another machine").write("elsewhere", "latency", 1, "ms")
    Results(tmp_path, "other suite").write("not mine", "latency", 1, "ms")
    assert results.finished() == {"done"}
    assert results.finished("accuracy") == set()


def test_not_a_number_is_recorded_as_such(tmp_path):
    results = Results(tmp_path, "demo")
    row = results.write("a", "latency", float("nan"), "ms")
    assert row["value"] is None
    assert row["config"]["reason"] == "the value is nan"
    with pytest.raises(TypeError, match="expected a number or None"):
        results.write("a", "latency", "fast", "ms")


def test_broken_line_is_named(tmp_path):
    (tmp_path / "results.jsonl").write_text(json.dumps({"suite": "x"}) + "\n")
    with pytest.raises(ValueError, match=r"results\.jsonl:1 lacks"):
        read(tmp_path)
    (tmp_path / "results.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match=r"results\.jsonl:1 is not JSON"):
        read(tmp_path)


def test_latest_keeps_the_last_row_of_a_key(tmp_path):
    results = Results(tmp_path, "demo")
    for value in (1, 2):
        row = results.write("a", "latency", value, "ms")
    other = results.write("a", "latency", 3, "ms", rival="sdpa")
    assert latest(read(tmp_path)) == [row, other]


def test_table():
    assert list(markdown_table(["a", "b"], [[1, "x|y"]])) == ["| a | b |", "|---|---|", "| 1 | x\\|y |"]
