"""The page over all results: what it says, and that it is what the committed rows say."""

from __future__ import annotations

import json

import pytest

from evals import results_page
from evals.recall.summary import Point, Run
from evals.results import FIELDS, FILE


def point(arm, score, state, speed, ended="score"):
    about = {"ended": ended}
    run = Run(about, arm, 0, score, {}, state, state, speed, {})
    return Point("cpu", "mqar", arm, 64, 2, [run], [run])


def test_the_page_is_up_to_date():
    assert results_page.main(["--check"]) == 0, (
        "rows have changed: run python -m evals.results_page and commit the page"
    )


def test_every_link_and_figure_of_the_page_is_there():
    text = (results_page.FOLDER / results_page.PAGE).read_text(encoding="utf-8")
    targets = [part.partition(")")[0] for part in text.split("](")[1:]]
    assert len(targets) > 10
    for target in targets:
        assert (results_page.FOLDER / target).exists(), target
    for folder in results_page.FOLDER.glob("*/results.jsonl"):
        assert f"[{folder.parent.name}](" in text


def test_the_ladder_names_the_best_layer_of_every_budget():
    points = [
        point("large", 0.99, 5000, 10.0),
        point("tiny", 0.30, 200, 70.0),
        point("small", 0.90, 900, 20.0),
        point("fast", 0.89, 1000, 50.0),  # within 0.02 of small, and faster
        point("worse", 0.10, 1024, 90.0),
    ]
    assert list(results_page._ladder(points)) == [
        ["256 bytes", "tiny (d=64): 0.300, 200 bytes, 70 tokens/s", "the same"],
        ["1 KiB", "small (d=64): 0.900, 900 bytes, 20 tokens/s", "fast (d=64): 0.890, 1,000 bytes, 50 tokens/s"],
        ["8 KiB", "large (d=64): 0.990, 5,000 bytes, 10 tokens/s", "the same"],
    ]
    kept = {p.arm: results_page._layer_cells(p, points)[-1] for p in points}
    assert kept == {"large": "yes", "tiny": "yes", "small": "yes", "fast": "", "worse": ""}


def test_runs_that_were_cut_short_are_counted():
    cells = results_page._layer_cells(point("a", 0.5, 10, 1.0, ended="seconds"), [])
    assert "1 of 1" in cells
    assert "1 of 1" not in results_page._layer_cells(point("a", 0.5, 10, 1.0), [])


def row(**values):
    return {
        **dict.fromkeys(FIELDS),
        "config": {},
        "time": "2026-01-02T00:00:00",
        "machine": "m",
        "commit": "c",
        **values,
    }


def write(folder, name, rows):
    (folder / name).mkdir()
    (folder / name / FILE).write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")


def test_costs_take_the_setting_that_most_layers_share(tmp_path):
    def timed(layer, width, metric, value, mode="forward", length=64):
        config = {"kind": "layer", "mode": mode, "length": length, "d_model": width, "dtype": "float32", "batch": 1}
        return row(suite="throughput", case=f"{layer}/{width}/{mode}/{length}/{metric}", layer=layer, metric=metric,
                   value=value, config=config)  # fmt: skip

    write(tmp_path, "throughput", [
        timed("a", 8, "tokens_per_second", 1234.4), timed("b", 8, "tokens_per_second", 2.0, "decode"),
        timed("a", 8, "state_bytes", 4096.0), timed("a", 16, "tokens_per_second", 9.0),
        {**timed("b", 8, "tokens_per_second", 777.0), "rival": "other library"},
    ])  # fmt: skip
    text = results_page.page(tmp_path)
    assert "width 8, batch 1, float32, on m" in text
    assert "| layer | decode 64 | forward 64 | state bytes |" in text
    assert "| a |  | 1,234 | 4,096 |" in text
    assert "| b | 2 |  |  |" in text
    assert "777" not in text


def test_a_new_suite_is_listed_by_itself(tmp_path, capsys):
    write(
        tmp_path, "my_suite", [row(suite="my_suite", layer="x", case="1"), row(suite="my_suite", layer="y", case="2")]
    )
    (tmp_path / "my_suite" / "a_b.png").write_bytes(b"")
    write(tmp_path, "empty", [])
    text = results_page.page(tmp_path)
    assert "| [my_suite](my_suite/) |  | 2 | 2 | 2026-01-02 | m | c |  |" in text
    assert "![My suite: a b](my_suite/a_b.png)" in text
    assert "empty" not in text
    assert results_page.main(["--check", "--folder", str(tmp_path)]) == 1
    assert not (tmp_path / results_page.PAGE).exists()
    assert results_page.main(["--folder", str(tmp_path)]) == 0
    assert results_page.main(["--check", "--folder", str(tmp_path)]) == 0
    (tmp_path / "my_suite" / FILE).write_text("{\n")
    assert results_page.main(["--check", "--folder", str(tmp_path)]) == 2
    assert "is not JSON" in capsys.readouterr().err


def test_a_folder_without_rows_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="run a suite"):
        results_page.page(tmp_path)
