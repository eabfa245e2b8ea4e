"""Metrics on file, and whose folder it is."""

from __future__ import annotations

import os

import pytest
from training_cases import tiny_config

from seqmodels.training.run_folder import RunFolder, RunFolderError


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", tiny_config(tmp_path))


def test_rows_come_back_and_a_torn_last_line_is_skipped(run):
    run.append({"step": 1, "loss": 2.5})
    run.append({"step": 2, "loss": 2.0})
    with open(run.metrics_path, "a") as file:
        file.write('{"step": 3, "lo')
    assert list(run.rows()) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}]


def test_rewind_forgets_the_steps_to_be_repeated(run):
    for step in (1, 2, 3, 4):
        run.append({"step": step})
    with open(run.metrics_path, "a") as file:
        file.write('{"step"')
    run.rewind(2)
    assert run.metrics_path.read_text() == '{"step": 1}\n{"step": 2}\n'
    run.append({"step": 3})
    assert [row["step"] for row in run.rows()] == [1, 2, 3]


def test_a_full_disk_is_an_error_that_names_the_folder(run):
    os.symlink("/dev/full", run.metrics_path)
    with pytest.raises(RunFolderError, match=r"cannot write run folder .*No space left on device; free space"):
        run.append({"step": 1})


def test_resume_removes_what_killed_writers_left(run, tmp_path):
    for name in (
        ".writing-step_00000003",
        ".deleting-step_00000001",
        "step_00000001",
        "step_00000002",
        "step_00000003",
    ):
        (run.checkpoints / name).mkdir()
    RunFolder.resume(run.path, tiny_config(tmp_path))
    assert sorted(os.listdir(run.checkpoints)) == ["step_00000002", "step_00000003"]
    assert run.latest() == run.checkpoints / "step_00000003"


def test_only_run_folders_are_opened(tmp_path):
    with pytest.raises(RunFolderError, match=r"is not a run folder: it has no config\.yaml"):
        RunFolder.open(tmp_path)
