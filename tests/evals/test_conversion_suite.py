"""The conversion suite at the smallest size: cells in this process, their rows, verdicts and page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from evals.conversion import cell as cell_module
from evals.conversion.__main__ import main
from evals.conversion.report import write_report
from evals.conversion.runner import write_rows
from evals.conversion.suites import Cell, cells
from evals.conversion.summary import Run, collect, judge, shares
from evals.results import Results, read
from seqmodels.training.config import DataConfig


def small(cell: Cell, text: Path) -> Cell:
    """``cell`` at a size of seconds."""
    data = DataConfig(source=str(text), tokenizer="bytes", sequence_length=16, validation_fraction=0.5)
    replace = msgspec.structs.replace
    teacher = replace(cell.teacher, hidden_size=16, layers=1, heads=2, key_heads=1, steps=2, data=data, warmup_steps=1)
    conversion = cell.conversion
    if conversion is not None:
        distillation = replace(conversion.distillation, steps=min(2, conversion.distillation.steps))
        finetuning = replace(conversion.finetuning, steps=2)
        conversion = replace(
            conversion, distillation=distillation, finetuning=finetuning, data=data, evaluation_rows=4, batch_size=2
        )
    return replace(cell, teacher=teacher, conversion=conversion)


def test_every_cell_of_a_seed_and_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cell_module, "say", lambda message: None)
    text = tmp_path / "text"
    text.mkdir()
    for index in range(4):
        (text / f"{index}.txt").write_text("".join(f"{index + number} " for number in range(60)))
    results = Results(tmp_path / "out", "conversion")
    teachers, conversions = cells("cpu", seeds=1)
    for cell in [*teachers, *conversions]:
        tiny = small(cell, text)
        write_rows(results, tiny, cell_module.run(tiny))
    runs = list(collect(read(results.path)).values())
    assert {run.arm for run in runs} == {cell.arm for cell in [*teachers, *conversions]}
    hybrid = next(run for run in runs if run.arm == "hedgehog_window")
    assert set(hybrid.losses) == {
        "teacher", "swapped", "distilled", "finetuned", "without_window", "without_linear"
    }  # fmt: skip
    assert dict(judge(runs))[next(text for text, _ in judge(runs) if text.startswith("softmax kept"))]
    page = write_report(results.path.parent, [results.path.parent]).read_text()
    assert "without_linear" in page
    for name in ("attention-hedgehog.png", "attention-hedgehog_window.png", "losses.png"):
        assert (results.path.parent / name).stat().st_size > 1000
        assert name in page


def run_of(arm: str, seed: int, **losses: float) -> Run:
    row: dict[str, Any] = {"config": {"arm": arm}, "seed": seed}
    return Run(row, losses, {}, {})


def good() -> list[Run]:
    runs = []
    for seed in range(3):
        for arm in ("hedgehog", "hedgehog_window"):
            runs.append(run_of(arm, seed, teacher=1.0, swapped=3.0, distilled=2.0, finetuned=1.05))
        runs.append(run_of("softmax kept", seed, teacher=1.0, swapped=1.0))
        runs.append(run_of("teacher trained on", seed, teacher=1.0, swapped=1.0, finetuned=0.95))
        runs.append(run_of("relu, untrained", seed, teacher=1.0, swapped=2.5))
    return runs


def test_verdicts_can_fail() -> None:
    assert all(holds for _, holds in judge(good()))
    share = shares(good(), "hedgehog")[0]
    assert share.of_teacher == pytest.approx(0.975)
    assert share.of_longer == pytest.approx(1.95 / 2.05)
    for index, worse in (
        (0, {"teacher": 1.0, "swapped": 3.0, "finetuned": 1.11}),
        (2, {"teacher": 1.0, "swapped": 1.001}),
        (4, {"teacher": 1.0, "swapped": 1.04}),
    ):
        runs = good()
        runs[index] = runs[index]._replace(losses=worse)
        assert sum(not holds for _, holds in judge(runs)) == 1
    assert not any(holds for _, holds in judge([]))


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--suite", "gpu", "--out", str(tmp_path)]) == 2
    assert "unknown suite 'gpu'; expected one of cpu" in capsys.readouterr().err
    assert main(["--report", str(tmp_path / "none")]) == 2
    assert "no finished conversion runs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--suite", "cpu", "--jobs", "0", "--out", str(tmp_path)])
