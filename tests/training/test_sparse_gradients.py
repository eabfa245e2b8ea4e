"""Tables with sparse gradients in the ordinary loop: the optimiser, the norm, clipping, resume and refusals."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from training_cases import tiny_config

from seqmodels.configuration import ConfigError
from seqmodels.mixers.base import ParameterHint
from seqmodels.training.config import OptimizerConfig
from seqmodels.training.distributed import Processes
from seqmodels.training.divergence import non_finite_gradients
from seqmodels.training.gradients import check_sparse_gradients, clip_gradients, gradient_norm, settle_sparse_gradients
from seqmodels.training.loop import train
from seqmodels.training.optimizer import make_optimizer, set_learning_rate
from seqmodels.training.table_adam import TableAdam

HERE = Processes(0, 1, torch.device("cpu"))
MEMORY = {"num_heads": 2, "top_k": 2, "query_dim": 4, "num_subkeys": 8, "value_dim": 4, "dropout": 0.0}


def model_config(sparse: bool, **changes: Any) -> dict[str, Any]:
    layers = {"product_key_memory": {**MEMORY, "sparse": sparse, **changes}, "linear_attention": {"num_heads": 2}}
    return {"vocab_size": 256, "d_model": 16, "pattern": "linear_attention product_key_memory", "layers": layers}


class Table(nn.Module):
    def __init__(self, sparse: bool, decay: float = 0.0) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.linspace(-1, 1, 12).reshape(6, 2).clone())
        self.matrix = nn.Parameter(torch.ones(2, 2))
        self.parameter_hints = {"rows": ParameterHint(weight_decay=decay, learning_rate=1e-3, sparse_gradient=sparse)}
        self.sparse = sparse

    def forward(self, picked: list[int]) -> Tensor:
        read = torch.nn.functional.embedding(torch.tensor(picked), self.rows, sparse=self.sparse)
        return ((read @ self.matrix) ** 2).sum()


def test_norm_and_clipping_are_those_of_the_dense_gradient() -> None:
    dense, sparse = Table(False), Table(True)
    for model in (dense, sparse):
        for picked in ([1, 1, 4], [4, 0, 1]):  # twice in a call, and in two micro-batches
            model(picked).backward()
        settle_sparse_gradients(model.parameters(), HERE)
    assert sparse.rows.grad is not None
    assert sparse.rows.grad.is_sparse
    assert sparse.rows.grad.values().shape == (3, 2)
    norms = [gradient_norm(model.parameters()) for model in (dense, sparse)]
    assert norms[1].item() == pytest.approx(norms[0].item(), rel=1e-6)
    for model, norm in zip((dense, sparse), norms, strict=True):
        clip_gradients(model.parameters(), 0.5, norm)
    torch.testing.assert_close(sparse.rows.grad.to_dense(), dense.rows.grad)
    torch.testing.assert_close(sparse.matrix.grad, dense.matrix.grad)
    assert gradient_norm(sparse.parameters()).item() == pytest.approx(0.5, rel=1e-5)
    before = sparse.rows.grad.to_dense()
    clip_gradients(sparse.parameters(), 9.0, gradient_norm(sparse.parameters()))
    assert torch.equal(sparse.rows.grad.to_dense(), before)  # below the maximum nothing changes


def test_one_step_is_adam_on_the_rows_read_and_nothing_elsewhere() -> None:
    config = OptimizerConfig(learning_rate=1e-2, weight_decay=0.1, betas=(0.9, 0.95), epsilon=1e-12)
    dense, sparse = Table(False), Table(True)
    optimizers = [make_optimizer(model, config) for model in (dense, sparse)]
    start = sparse.rows.detach().clone()
    for picked in ([1, 4], [1, 4, 4]):
        for model, optimizer in zip((dense, sparse), optimizers, strict=True):
            set_learning_rate(optimizer, 0.5)
            optimizer.zero_grad()
            model(picked).backward()
            optimizer.step()
    # The same rows in every step: this is Adam on them (epsilon apart, which is added before the bias correction).
    torch.testing.assert_close(sparse.rows, dense.rows, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(sparse.matrix, dense.matrix, rtol=0, atol=0)
    moved = (sparse.rows != start).any(1)
    assert moved.tolist() == [False, True, False, False, True, False]
    assert (sparse.rows - start).abs().amax().item() == pytest.approx(2 * 0.5 * 1e-3, rel=0.1)  # the hint's own rate
    assert {(group["peak"], group["weight_decay"]) for group in optimizers[1].param_groups} == {
        (1e-2, 0.1), (1e-3, 0.0),
    }  # fmt: skip


def test_rows_that_are_not_read_keep_their_moments() -> None:
    model = Table(True)
    optimizer = make_optimizer(model, OptimizerConfig())
    for picked in ([1], [4], [4]):
        optimizer.zero_grad()
        model(picked).backward()
        optimizer.step()
    moment = optimizer.state[model.rows]["exp_avg"]
    first = Table(True)
    first([1]).backward()
    assert first.rows.grad is not None
    torch.testing.assert_close(moment[1], 0.1 * first.rows.grad.to_dense()[1])  # as after its own step
    assert not moment[0].any()


@pytest.mark.parametrize("width", [3, 70_000])  # one chunk, and one row a chunk
def test_steps_are_those_of_sparse_adam(width: int) -> None:
    weights = torch.randn(9, width, dtype=torch.float64)
    tables = [nn.Parameter(weights.clone()) for _ in range(2)]
    ours = TableAdam([tables[0]], lr=0.1, betas=(0.8, 0.9), eps=1e-3)
    theirs = torch.optim.SparseAdam([tables[1]], lr=0.1, betas=(0.8, 0.9), eps=1e-3)
    for rows in ([1, 4, 1], [4, 8], [], [0, 1]):
        values = torch.randn(len(rows), width, dtype=torch.float64)
        for table in tables:
            table.grad = torch.sparse_coo_tensor(
                torch.tensor([rows], dtype=torch.int64), values, table.shape, check_invariants=True
            )
        ours.step()
        theirs.step()
        torch.testing.assert_close(tables[0], tables[1], rtol=1e-12, atol=1e-13)
    for name in ("exp_avg", "exp_avg_sq"):
        mine, other = ours.state[tables[0]][name], theirs.state[tables[1]][name]
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-13)
    assert ours.state[tables[0]]["step"] == theirs.state[tables[1]]["step"]
    tables[0].grad = torch.ones_like(weights)
    with pytest.raises(RuntimeError, match="TableAdam got a dense gradient"):
        ours.step()


def test_decay_on_a_sparse_gradient_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rows has a sparse gradient and weight_decay=0.1; .*weight_decay=0.0"):
        make_optimizer(Table(True, decay=0.1), OptimizerConfig())


def test_a_sparse_gradient_that_is_not_finite_is_named() -> None:
    model = Table(True)
    (model([2]) * math.inf).backward()
    settle_sparse_gradients(model.parameters(), HERE)
    assert "rows" in non_finite_gradients(model)


@pytest.fixture(scope="module")
def sparse_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sparse")
    return train(tiny_config(folder, **SETTINGS), folder / "run").run.path


SETTINGS: dict[str, Any] = {
    "model": model_config(True), "accumulation": 2, "checkpoint": {"every": 3, "keep": 9},
    "optimizer": {"learning_rate": 5e-3, "gradient_clip": 0.1}, "validate_every": 99,
}  # fmt: skip


def test_the_first_steps_are_those_of_the_dense_table(tmp_path: Path) -> None:
    """Up to the first update, which the two optimisers make differently for rows not read, all is the same."""
    changes = {**SETTINGS, "model": model_config(False), "log_every": 1, "steps": 3}
    dense = train(tiny_config(tmp_path, **changes), tmp_path / "dense")
    changes["model"] = model_config(True)
    sparse = train(tiny_config(tmp_path, **changes), tmp_path / "sparse")
    ours, theirs = (
        [(row["loss"], row["gradient_norm"]) for row in result.run.rows() if "loss" in row]
        for result in (sparse, dense)
    )
    assert ours[0] == pytest.approx(theirs[0], rel=1e-6)
    assert ours[2] == pytest.approx(theirs[2], rel=1e-2)
    assert ours[2] != theirs[2]


@pytest.mark.parametrize("stopped", [3, 6])
def test_going_on_is_bit_exact(tmp_path: Path, sparse_run: Path, stopped: int) -> None:
    shutil.copytree(sparse_run, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if int(path.name[5:]) > stopped:
            shutil.rmtree(path)
    train(tiny_config(sparse_run.parent, **SETTINGS), tmp_path / "run", resume=True)
    for name in ("model", "optimizer"):
        ours, theirs = (
            load_file(run / "checkpoints" / "step_00000008" / f"{name}.safetensors")
            for run in (tmp_path / "run", sparse_run)
        )
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert int(ours["backbone.blocks.1.layer.values.step"]) == 8


@pytest.mark.parametrize("changes", [{"precision": "bfloat16"}, {"backpropagation_windows": 2, "accumulation": 1}])
def test_it_goes_with_autocast_and_with_windows(tmp_path: Path, changes: dict[str, Any]) -> None:
    result = train(tiny_config(tmp_path, **{**SETTINGS, "steps": 3, **changes}), tmp_path / "run")
    assert all(parameter.isfinite().all() for parameter in result.model.parameters())


def test_what_makes_no_sparse_gradient_refuses_it(tmp_path: Path) -> None:
    made = tiny_config(tmp_path, **SETTINGS, compile=True)
    with pytest.raises(ConfigError, match=r"compile=true traces no sparse .*blocks\.1\.layer\.values.*sparse: false"):
        train(made, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match=r"parallel=fsdp shards no sparse gradient, and rows has one; .*parallel=ddp"):
        check_sparse_gradients(["rows"], sharded=True, compiled=False)
