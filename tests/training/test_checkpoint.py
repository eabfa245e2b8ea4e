"""Checkpoints are whole or not there; damaged ones are refused by name."""

from __future__ import annotations

import errno
import json
import os
import resource

import pytest
import torch

from seqmodels.training import checkpoint as module
from seqmodels.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    generator_states,
    list_checkpoints,
    load_checkpoint,
    remove_leftovers,
    restore_generators,
    save_checkpoint,
)
from seqmodels.training.distributed import Processes

HERE = Processes(0, 1, torch.device("cpu"))


def some(scale: float = 1.0) -> Checkpoint:
    weight = torch.arange(4000, dtype=torch.float32).reshape(40, 100) * scale
    return Checkpoint(
        model={"weight": weight, "scalar": torch.tensor(2.5)},
        optimizer={"weight.exp_avg": weight * 2, "weight.step": torch.tensor(7.0)},
        rng=generator_states(HERE.device),
        trainer={"step": 7, "rows": 70},
    )


def save(folder, step, checkpoint=None, keep=2):
    return save_checkpoint(folder, step, checkpoint or some(), "seed: 1\n", HERE, keep=keep)


def test_round_trip_is_exact_and_holds_no_pickle(tmp_path):
    path = save(tmp_path, 7)
    torch.randn(3)
    assert sorted(file.name for file in path.iterdir()) == [
        "config.yaml", "model.safetensors", "optimizer.safetensors", "rng.safetensors", "trainer.json"
    ]  # fmt: skip
    wanted = some()
    found = load_checkpoint(path, wanted.model, HERE)
    for ours, theirs in zip(wanted[:2], found[:2], strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert found.trainer["rows"] == 70
    assert (path / "config.yaml").read_text() == "seed: 1\n"


def test_random_numbers_go_on_where_they_were(tmp_path):
    torch.manual_seed(5)
    torch.randn(10)
    path = save(tmp_path, 1)
    expected = torch.randn(4)
    torch.manual_seed(99)
    restore_generators(load_checkpoint(path, some().model, HERE).rng, HERE.device)
    assert torch.equal(torch.randn(4), expected)


def test_the_newest_are_kept(tmp_path):
    for step in (5, 10, 100, 99_999_999):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000100", "step_99999999"]
    assert sorted(os.listdir(tmp_path)) == ["step_00000100", "step_99999999"]


def test_the_same_step_again_replaces(tmp_path):
    save(tmp_path, 3)
    path = save(tmp_path, 3, some(scale=-1.0))
    assert torch.equal(load_checkpoint(path, some().model, HERE).model["weight"], some(-1.0).model["weight"])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "rng.safetensors", "config.yaml"])
@pytest.mark.parametrize("cut", [1, 0.5, None])
def test_a_truncated_or_missing_file_is_named(tmp_path, name, cut):
    path = save(tmp_path, 7)
    size = (path / name).stat().st_size
    if cut is None:
        (path / name).unlink()
    else:
        os.truncate(path / name, size - 1 if cut == 1 else int(size * cut))
    with pytest.raises(CheckpointError, match=rf"{name} is (missing|truncated or damaged).*delete the folder"):
        load_checkpoint(path, some().model, HERE)


def test_a_truncated_manifest_is_refused(tmp_path):
    path = save(tmp_path, 7)
    os.truncate(path / "trainer.json", 20)
    with pytest.raises(CheckpointError, match=r"no readable trainer\.json"):
        load_checkpoint(path, some().model, HERE)


def test_a_damaged_header_is_refused(tmp_path):
    path = save(tmp_path, 7)
    with open(path / "model.safetensors", "r+b") as file:
        file.write(b"\xff" * 16)
    with pytest.raises(CheckpointError, match=r"cannot read .*model\.safetensors"):
        load_checkpoint(path, some().model, HERE)


def test_every_difference_to_another_model_is_listed(tmp_path):
    path = save(tmp_path, 7)
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(path, {"weight": torch.zeros(40, 99), "bias": torch.zeros(3)}, HERE)
    message = str(error.value)
    assert "weight is (40, 100); this model has (40, 99)" in message
    assert "bias is missing" in message
    assert "scalar is not a tensor of this model" in message


@pytest.mark.parametrize("victim", ["model", "optimizer", "rng"])
def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(tmp_path, monkeypatch, victim):
    before = save(tmp_path, 1)
    plain = module.save_file

    def full(tensors, path, *arguments):
        if path.name.startswith(victim):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        plain(tensors, path, *arguments)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(
        CheckpointError, match=r"No space left.*newest complete checkpoint is .*step_00000001.*--resume"
    ):
        save(tmp_path, 2)
    assert os.listdir(tmp_path) == [before.name]
    load_checkpoint(before, some().model, HERE)


def test_a_write_that_the_system_refuses_half_way_leaves_nothing(tmp_path):
    """A real failed write, from the kernel: a limit on file sizes below the size of the weights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(CheckpointError, match="there is no complete checkpoint yet"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []


def test_an_unwritable_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot write checkpoint"):
        save(tmp_path / "file", 1)


def test_what_killed_writers_left_is_removed_and_never_read(tmp_path):
    path = save(tmp_path, 1)
    for name in (".writing-step_00000002", ".deleting-step_00000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    (tmp_path / "step_12").mkdir()  # not ours
    assert list_checkpoints(tmp_path) == [path]
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step_00000001", "step_12"]


def test_a_leftover_of_the_same_step_is_no_obstacle(tmp_path):
    (tmp_path / ".writing-step_00000004").mkdir()
    (tmp_path / ".writing-step_00000004" / "stray").write_bytes(b"half")
    path = save(tmp_path, 4)
    assert "stray" not in json.loads((path / "trainer.json").read_text())["files"]
