"""Two gloo processes against one: DDP and FSDP2 give the single-process weights, and one format of checkpoint."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_runs import CHANGES, linked
from safetensors.torch import load_file
from training_cases import tiny_config

from seqmodels.configuration import ConfigError
from seqmodels.training.feed import micro_batch_rows
from seqmodels.training.loop import train
from seqmodels.training.reading import reading_plan

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with the runs ``single``, ``ddp``, ``fsdp`` and ``resumed``."""
    folder = tmp_path_factory.mktemp("distributed")
    for rank in range(2):
        tiny_config(folder / f"rank{rank}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parents[1]}:{HERE}"}
    workers = [
        subprocess.Popen(
            [sys.executable, str(HERE / "distributed_runs.py"), str(folder)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    train(tiny_config(folder / "rank0", **CHANGES), folder / "single")
    for parallel in ("ddp", "fsdp"):
        made = tiny_config(folder / "rank0", parallel=parallel, **linked(parallel))
        train(made, folder / f"linked_single_{parallel}")
        shutil.copytree(folder / f"linked_single_{parallel}", folder / f"linked_on_{parallel}")
    try:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], "\n".join(outputs)
    return folder


def tensors(run: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:08d}" / f"{name}.safetensors")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["model", "optimizer"])
def test_two_processes_give_the_weights_of_one(runs, parallel, name):
    single, several = tensors(runs / "single", 8, name), tensors(runs / parallel, 8, name)
    assert single.keys() == several.keys()
    for key, tensor in single.items():
        assert several[key].shape == tensor.shape, key
        # Adam divides by the root of a squared gradient, so rounding in a small one weighs up to
        # 1e-3 of a learning rate of 5e-3; a wrong average or shard is off by the rate itself.
        torch.testing.assert_close(
            several[key], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_carry_the_states_of_one(runs, parallel):
    one, two = runs / f"linked_single_{parallel}", runs / f"linked_{parallel}"
    for name in ("model", "optimizer"):
        single, several = tensors(one, 8, name), tensors(two, 8, name)
        assert single.keys() == several.keys()
        for key, tensor in single.items():
            torch.testing.assert_close(
                several[key], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}"
            )
    whole = tensors(one, 8, "carried_0")
    halves = [tensors(two, 8, f"carried_{rank}") for rank in range(2)]
    for key, tensor in whole.items():  # rows 0 and 1, then 2 and 3
        both = torch.cat([halves[0][key], halves[1][key.replace("00000000.", "00000002.")]])
        torch.testing.assert_close(both, tensor, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


def test_a_carried_run_goes_on_with_another_number_of_processes(runs):
    """Rows are found by their number: one process goes on from the states of two."""
    folder = runs / "linked_on_ddp"
    shutil.rmtree(folder / "checkpoints")
    shutil.copytree(runs / "linked_ddp" / "checkpoints", folder / "checkpoints")
    shutil.rmtree(folder / "checkpoints" / "step_00000008")
    train(tiny_config(runs / "rank0", parallel="ddp", **linked("ddp")), folder, resume=True)
    whole, resumed = tensors(runs / "linked_single_ddp", 8, "carried_0"), tensors(folder, 8, "carried_0")
    assert whole.keys() == resumed.keys()
    for key, tensor in whole.items():
        torch.testing.assert_close(resumed[key], tensor, rtol=1e-3, atol=1e-4)


def test_metrics_agree_with_one_process(runs):
    import json

    def losses(run):
        return [json.loads(line).get("loss") for line in (run / "metrics.jsonl").read_text().splitlines()]

    single = [loss for loss in losses(runs / "single") if loss is not None]
    for parallel in ("ddp", "fsdp"):
        assert [loss for loss in losses(runs / parallel) if loss is not None] == pytest.approx(single, rel=1e-5)


def test_loads_of_experts_are_summed_over_processes(runs):
    for rank in range(2):  # together [4, 6, 1, 1], 3 in the mean; each process alone would raise another expert
        assert torch.load(runs / f"bias_{rank}").tolist() == [-0.5, -0.5, 0.5, 0.5]


def test_a_sharded_run_resumes_exactly(runs):
    for name in ("model", "optimizer"):
        straight, resumed = tensors(runs / "fsdp", 8, name), tensors(runs / "resumed", 8, name)
        assert all(torch.equal(straight[key], resumed[key]) for key in straight)


def test_an_error_of_one_process_reaches_all(runs):
    assert "already holds a run" in (runs / "error_0").read_text()
    assert "rank 0: " in (runs / "error_1").read_text()
    assert "already holds a run" in (runs / "error_1").read_text()


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path):
    config = tiny_config(tmp_path)
    with pytest.raises(ConfigError, match=r"batch_size=4 is not divisible by 3 processes x accumulation=1"):
        micro_batch_rows(config, reading_plan(config)[0], 3)
