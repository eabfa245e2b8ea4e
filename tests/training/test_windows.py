"""The law of truncated back-propagation: windows that go on from one another are the one long row, and a run with
carried states goes on bit for bit where it was stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training_cases import tiny_config

from seqmodels.channel import ChunkMoE
from seqmodels.configuration import ConfigError, convert
from seqmodels.mixers import Workspace
from seqmodels.mixers.base import Mixer
from seqmodels.models import LanguageModel, ModelConfig
from seqmodels.tasks.text import TextBatch
from seqmodels.training.config import TrainConfig
from seqmodels.training.loop import train
from seqmodels.training.objective import Objective, ObjectiveOutput
from seqmodels.training.windows import _cut, cut_windows

# One of every kind of state: two gated recurrences with rings, a window with globals, a full cache, chunks, slots.
PATTERN = "mamba3|sparse_global_attention workspace kv_shift_attention chunk_moe product_key_memory"
LAYERS: dict[str, dict[str, Any]] = {
    "mamba3": {"d_state": 8, "head_dim": 8},
    "sparse_global_attention": {"num_heads": 2, "window": 4, "num_globals": 3, "block": 3},
    "workspace": {"num_slots": 4, "rank": 4, "active": 2, "segment": 4},
    "kv_shift_attention": {"num_heads": 2},
    # Balance and z losses are not sums over tokens: a window's are its own.
    "chunk_moe": {"num_experts": 3, "d_hidden": 8, "chunk_size": 3, "balance": "none", "z_weight": 0.0},
    "product_key_memory": {
        "num_heads": 2,
        "top_k": 2,
        "query_dim": 4,
        "num_subkeys": 4,
        "value_dim": 4,
        "dropout": 0.0,
    },
}
LENGTHS = [[3, 14, 7], [20, 4], [8, 16], [1, 1, 22]]


def make(pattern: str = PATTERN, meta_tokens: int = 0) -> LanguageModel:
    values = {"vocab_size": 30, "d_model": 16, "pattern": pattern, "layers": LAYERS, "meta_tokens": meta_tokens}
    return LanguageModel(convert(values, ModelConfig, "model")).double()


def rows() -> TextBatch:
    tokens, targets = torch.randint(30, (2, 4, 24))
    return TextBatch(tokens, targets, LENGTHS, None, (False,) * 4)


def window(batch: TextBatch, index: int, size: int) -> TextBatch:
    cut = [_cut(lengths, size)[index] for lengths in batch.lengths]
    place = slice(index * size, index * size + size)
    return TextBatch(
        batch.tokens[:, place], batch.targets[:, place], [lengths for lengths, _ in cut], None,
        tuple(inside for _, inside in cut),
    )  # fmt: skip


def gradients(model: LanguageModel, output: ObjectiveOutput) -> dict[str, Tensor]:
    model.zero_grad()
    output.loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("count", "meta_tokens"), [(3, 5), (8, 0)])
def test_windows_with_gradient_are_the_long_row(count: int, meta_tokens: int) -> None:
    """With meta tokens, whose gradient comes back through the windows that go on, also from documents begun later."""
    model, batch = make(meta_tokens=meta_tokens), rows()
    objective = Objective(model, 24)
    whole = objective(batch.tokens, batch.targets, batch.layout())
    cut = objective(batch.tokens, batch.targets, cut_windows(batch, count, capacity=11))
    # Sums in another order: some hundred roundings of 1e-16 of numbers near one.
    torch.testing.assert_close(cut.loss, whole.loss, rtol=1e-13, atol=0)
    expected, found = gradients(model, whole), gradients(model, cut)
    assert expected.keys() == found.keys()
    assert "backbone.blocks.1.layer.initial_slots" in found
    assert ("meta_tokens" in found) == (meta_tokens > 0)
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-10, atol=1e-13, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("size", [3, 12])
def test_carried_and_detached_windows_have_the_losses_of_the_long_row(size: int) -> None:
    model, batch = make(), rows()
    objective = Objective(model, 24)
    whole = objective(batch.tokens, batch.targets, batch.layout()).parts
    state, parts = None, []
    for index in range(24 // size):
        part = window(batch, index, size)
        output = objective(part.tokens, part.targets, cut_windows(part, 1, state=state))
        state = output.state
        assert state is not None
        assert not any(tensor.requires_grad for _, tensor in state.tensors())
        parts.append(output.parts)
    torch.testing.assert_close(torch.stack(parts).mean(0), whole, rtol=1e-13, atol=0)


def test_a_state_is_needed_for_it() -> None:
    """The test above can fail: without the state, or with another row's, the losses differ."""
    model, batch = make(), rows()
    objective = Objective(model, 24)
    first, second = window(batch, 0, 12), window(batch, 1, 12)
    state = objective(first.tokens, first.targets, cut_windows(first, 1)).state
    assert state is not None
    right = objective(second.tokens, second.targets, cut_windows(second, 1, state=state)).parts
    turned = state.select(torch.tensor([1, 0, 3, 2]))
    for other in (None, turned):
        wrong = objective(second.tokens, second.targets, cut_windows(second, 1, state=other)).parts
        assert (wrong - right).abs() > 1e-6


def test_documents_at_the_edge_of_a_window() -> None:
    assert _cut([3, 14, 7], 8) == [([3, 5], False), ([8], True), ([1, 7], True)]
    assert _cut([8, 16], 8) == [([8], False), ([8], False), ([8], True)]


def test_a_graph_holds_one_window_at_a_time() -> None:
    """What the graph keeps does not grow with the windows, but for the states between them."""
    objective = Objective(make("mamba3 workspace chunk_moe").float(), 512)

    def saved(batch: TextBatch, layout: Any) -> int:
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = objective(batch.tokens, batch.targets, layout)
        del output
        return sum(sizes.values())

    tokens, targets = torch.randint(30, (2, 1, 512))
    batch = TextBatch(tokens, targets, [[512]], None, (False,))
    assert saved(batch, cut_windows(batch, 8)) < 0.4 * saved(batch, batch.layout())


HYDRA: dict[str, Any] = {
    "architecture": "hydra", "vocab_size": 256, "d_model": 16, "num_blocks": 2, "attention_every": 2,
    "memory_blocks": [1], "mixer": "hydra_diag",
    "attention": {"num_heads": 2, "window": 8, "num_globals": 16, "block": 8},
    "experts": {"num_experts": 3, "d_hidden": 8, "chunk_size": 8, "balance": "bias", "balance_weight": 0.1},
    "workspace": {"num_slots": 4, "rank": 4, "active": 2, "segment": 8},
    "memory": {"num_heads": 1, "top_k": 2, "query_dim": 4, "num_subkeys": 4, "value_dim": 4},
}  # fmt: skip
STAGES: list[dict[str, Any]] = [
    {"name": "short", "share": 0.25},
    {"name": "long", "share": 0.25, "activates": ["sparse_attention"], "sequence_length": 64},
    {
        "name": "carried", "share": 0.5, "activates": ["workspace", "memory"], "sequence_length": 16,
        "backpropagation_windows": 2, "carry_state": True,
    },
]  # fmt: skip


def config(folder: Path, **changes: Any) -> TrainConfig:
    values = {"model": HYDRA, "curriculum": {"stages": STAGES}, "steps": 12, "log_every": 1, **changes}
    return tiny_config(folder, **{"checkpoint": {"every": 1, "keep": 100}, "validate_every": 6, **values})


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    return train(config(folder), folder / "run").run.path


def last(run: Path, name: str, step: int = 12) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:08d}" / f"{name}.safetensors")


@pytest.mark.parametrize("stopped", [6, 10])
def test_going_on_with_carried_states_is_bit_exact(tmp_path: Path, stopped: int, whole_run: Path) -> None:
    shutil.copytree(whole_run, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if int(path.name[5:]) > stopped:
            shutil.rmtree(path)
    train(config(whole_run.parent), tmp_path / "run", resume=True)
    for name in ("model", "optimizer", "carried_0"):
        ours, theirs = last(tmp_path / "run", name), last(whole_run, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_the_rows_say_how_text_is_read_and_checkpoints_hold_what_goes_on(whole_run: Path) -> None:
    from seqmodels.training.run_folder import RunFolder

    found = [row for row in RunFolder(whole_run).rows() if "stage" in row]
    assert [row["tokens"] for row in found] == [128 * step for step in range(1, 13)]
    reading = [(row["sequence_length"], row["windows"], row["rows"]) for row in found]
    assert reading == [(32, 1, 4)] * 3 + [(64, 1, 2)] * 3 + [(16, 2, 4)] * 6
    shares = [row.get("carried_share") for row in found]
    assert shares[:7] == [None] * 6 + [0.0]
    assert all(
        share is not None and share >= 0.5 for share in shares[7:]
    )  # a document of some 400 bytes ends in one row of 13
    held = [
        (whole_run / "checkpoints" / f"step_{step:08d}" / "carried_0.safetensors").exists() for step in range(1, 13)
    ]
    assert held == [False] * 6 + [True] * 6


def test_carried_states_matter(tmp_path: Path, whole_run: Path) -> None:
    """A run that goes on without them is another one."""
    shutil.copytree(whole_run, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        if int(path.name[5:]) > 10:
            shutil.rmtree(path)
    place = tmp_path / "run" / "checkpoints" / "step_00000010"
    states = load_file(place / "carried_0.safetensors")
    from safetensors.torch import save_file

    save_file({name: torch.zeros_like(tensor) for name, tensor in states.items()}, place / "carried_0.safetensors")
    train(config(whole_run.parent), tmp_path / "run", resume=True)
    assert not torch.equal(
        last(tmp_path / "run", "model")["embedding.weight"], last(whole_run, "model")["embedding.weight"]
    )


def test_micro_batches_go_on_where_one_batch_does(tmp_path: Path, whole_run: Path) -> None:
    """From the state of 4 rows, 2 micro-batches of 2 rows; the loss of the next step is the mean of theirs."""
    model = {**HYDRA, "experts": None, "memory": None}  # nothing that depends on the batch, and no dropout
    stages = [{"name": "carried", "share": 1.0, "carry_state": True, "activates": []}]
    same: dict[str, Any] = {"model": model, "curriculum": {"stages": stages}, "steps": 3}
    one = train(config(tmp_path, **same), tmp_path / "one")
    two = train(config(tmp_path, accumulation=2, **same), tmp_path / "two")
    losses = [[row["loss"] for row in result.run.rows() if "loss" in row] for result in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # float32 sums in another order
    assert last(two.run.path, "carried_0", 3).keys() != last(one.run.path, "carried_0", 3).keys()


def test_what_is_recomputed_is_counted_once(tmp_path: Path) -> None:
    made = config(tmp_path, curriculum=None, backpropagation_windows=4, steps=2)
    counted = []
    plain = ChunkMoE.after_optimizer_step

    def watch(self: ChunkMoE) -> None:
        counted.append(int(self.assigned.sum()))
        plain(self)

    ChunkMoE.after_optimizer_step = watch  # type: ignore[method-assign]
    try:
        train(made, tmp_path / "run")
    finally:
        ChunkMoE.after_optimizer_step = plain  # type: ignore[method-assign]
    # 128 tokens in chunks of 8, two experts each, and one more chunk for a document that begins inside one.
    assert counted
    assert 2 * 16 <= counted[0] < 2 * 16 * 1.5


def test_bfloat16_carries_too(tmp_path: Path) -> None:
    result = train(config(tmp_path, precision="bfloat16", steps=8), tmp_path / "run")
    states = last(result.run.path, "carried_0", 8)
    assert states
    assert all(tensor.isfinite().all() for tensor in states.values() if tensor.is_floating_point())


def test_a_layer_that_refuses_a_state_is_named(tmp_path: Path) -> None:
    model = {**HYDRA, "experts": {**HYDRA["experts"], "router_input": "paper_mean"}}
    with pytest.raises(ConfigError, match=r"need layers that go on from a state: ChunkMoE.*paper_mean"):
        train(config(tmp_path, model=model), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_layer_without_a_state_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workspace, "init_state", Mixer.init_state)
    with pytest.raises(ConfigError, match=r"block \d+ \(workspace\) has no init_state"):
        train(config(tmp_path), tmp_path / "run")
