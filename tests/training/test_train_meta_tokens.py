"""Meta tokens learn in every way of training, come back with a checkpoint, and a run goes on bit by bit."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from training_cases import tiny_config

from seqmodels.models import LanguageModel, ModelConfig, generate, load_model
from seqmodels.training.loop import train
from seqmodels.training.objective import state_template

MODEL = {
    "vocab_size": 256,
    "d_model": 16,
    "meta_tokens": 4,
    "pattern": "window linear_attention swiglu",
    "layers": {
        "linear_attention": {"num_heads": 2, "decay": "fixed"},
        "window": {"layer": "attention", "num_heads": 2, "window": 5},
    },
}


@pytest.mark.parametrize("reading", [{}, {"carry_state": True, "backpropagation_windows": 2}])
def test_a_run_learns_them_and_goes_on(tmp_path, reading: dict[str, Any]) -> None:
    # Without decay only a gradient moves them.
    config = tiny_config(
        tmp_path, model=MODEL, steps=6, optimizer={"learning_rate": 5e-3, "weight_decay": 0.0}, **reading
    )
    result = train(config, tmp_path / "run")
    torch.manual_seed(config.seed)
    start = LanguageModel(config.model)
    moved = (result.model.meta_tokens - start.meta_tokens).abs()
    assert moved.min() > 1e-4  # Adam moves every entry by about the learning rate a step
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for path in sorted((tmp_path / "again" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(path)
    again = train(config, tmp_path / "again", resume=True)
    for (name, ours), (_, theirs) in zip(
        again.model.state_dict().items(), result.model.state_dict().items(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    loaded = load_model(tmp_path / "run").model
    assert torch.equal(loaded.meta_tokens, result.model.meta_tokens)
    prompts = [[1, 2, 3], [4]]
    assert generate(loaded, prompts, max_new_tokens=4) == generate(result.model, prompts, max_new_tokens=4)


def test_asking_for_the_template_of_a_state_counts_no_load() -> None:
    """A run that goes on asks for it again, and must not count the meta tokens twice."""
    layers = {"chunk_moe": {"num_experts": 3, "d_hidden": 8, "chunk_size": 4, "balance": "bias"}}
    model = LanguageModel(ModelConfig(vocab_size=9, d_model=8, pattern="chunk_moe", layers=layers, meta_tokens=5))
    state_template(model)
    assert model.training
    assert model.backbone.layers()[0].assigned.sum() == 0
