from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_helpers import hybrid, tokens
from safetensors.torch import load_file, save_file

from seqmodels.models import load_model, save_model
from seqmodels.models.loading import ModelFolderError


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_head": False},
        {"layers": {"attention": {"num_heads": 2}, "a": {"layer": "attention", "share": "x"}}, "pattern": "a swiglu a"},
    ],
)
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, changes: dict) -> None:
    model = hybrid(**changes, dtype=torch.float32)
    save_model(model, tmp_path / "saved", tokenizer="some/tokenizer")
    loaded = load_model(tmp_path / "saved")
    assert loaded.tokenizer == "some/tokenizer"
    assert loaded.model.config == model.config
    assert not loaded.model.training
    ids = tokens(2, 9)
    assert torch.equal(loaded.model(ids).logits, model(ids).logits)
    assert load_model(tmp_path / "saved", dtype=torch.bfloat16).model.embedding.weight.dtype == torch.bfloat16


def test_a_run_gives_its_newest_checkpoint(tmp_path: Path) -> None:
    run = save_model(hybrid(dtype=torch.float32), tmp_path / "run")
    weights = run / "model.safetensors"
    for step in (90, 100):
        model = hybrid(dtype=torch.float32, seed=step)
        save_model(model, run / "checkpoints" / f"step_{step:08d}")
    weights.unlink()
    found = load_model(run)
    assert found.weights == run / "checkpoints" / "step_00000100" / "model.safetensors"
    ids = tokens(1, 5)
    assert torch.equal(found.model(ids).logits, model(ids).logits)
    assert torch.equal(load_model(found.weights.parent).model(ids).logits, model(ids).logits)


def test_a_checkpoint_of_another_config_is_refused_by_tensor(tmp_path: Path) -> None:
    folder = save_model(hybrid(dtype=torch.float32), tmp_path / "saved")
    tensors = load_file(folder / "model.safetensors")
    tensors["extra.weight"] = torch.zeros(2)
    tensors["embedding.weight"] = torch.zeros(51, 16)
    del tensors["backbone.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelFolderError) as caught:
        load_model(folder)
    message = str(caught.value)
    assert "backbone.norm.weight is missing from the file" in message
    assert "extra.weight is in the file but not in the model" in message
    assert "embedding.weight is (51, 16) in the file, (50, 16) in the model" in message


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    folder = save_model(hybrid(dtype=torch.float32), tmp_path / "saved")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(ModelFolderError, match="truncated or not safetensors"):
        load_model(folder)


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFolderError, match=r"there is no config\.yaml in it"):
        load_model(tmp_path)
    folder = save_model(hybrid(dtype=torch.float32), tmp_path / "saved")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelFolderError, match=r"has a config\.yaml but no weights"):
        load_model(folder)
    (folder / "config.yaml").write_text("steps: 3\n")
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelFolderError, match="has no key 'model'"):
        load_model(folder)
