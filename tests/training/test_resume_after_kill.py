"""A run killed at any moment and resumed ends with the weights of one that was not, bit for bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent


def run_killed(folder: Path, *arguments: str) -> dict:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parents[1]}:{HERE}"}
    done = subprocess.run(
        [sys.executable, str(HERE / "killed_runs.py"), str(folder), *arguments],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run_killed(folder, "never")["killed"] == 0
    return folder / "run"


def compare(run: Path, other: Path) -> None:
    for file in ("model", "optimizer", "rng"):
        one, two = (load_file(path / "checkpoints" / "step_00000008" / f"{file}.safetensors") for path in (run, other))
        assert one.keys() == two.keys()
        for name, tensor in one.items():
            assert torch.equal(tensor, two[name]), f"{file}: {name} differs"
    rows = [
        [
            {key: value for key, value in json.loads(line).items() if key not in ("time", "tokens_per_second")}
            for line in lines
        ]
        for lines in ((path / "metrics.jsonl").read_text().splitlines() for path in (run, other))
    ]
    assert rows[0] == rows[1]


def test_killed_at_random_moments(tmp_path, undisturbed):
    result = run_killed(tmp_path, "random", "1")
    assert result["killed"] >= 3
    compare(undisturbed, tmp_path / "run")


def test_killed_inside_checkpoint_writes(tmp_path, undisturbed):
    result = run_killed(tmp_path, "writing")
    assert result["killed"] == 12
    assert any(name.startswith(".writing-") for name in result["seen"])  # kills did fall into a write
    assert any(name.startswith(".deleting-") for name in result["seen"])  # and into a deletion
    compare(undisturbed, tmp_path / "run")
    assert sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["step_00000006", "step_00000008"]
