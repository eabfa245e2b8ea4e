"""The loop: it learns, it goes on where it stopped, and it refuses what it must."""

from __future__ import annotations

import json
import math
import shutil

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from training_cases import tiny_config, write_corpus

from seqmodels.configuration import ConfigError, convert
from seqmodels.models import LanguageModel, ModelConfig
from seqmodels.tasks.corpus import CorpusError
from seqmodels.tasks.text import TextBatch
from seqmodels.training.checkpoint import CheckpointError, list_checkpoints
from seqmodels.training.divergence import TrainingDiverged, diverged, first_non_finite_output
from seqmodels.training.loop import train
from seqmodels.training.run_folder import RunFolder, RunFolderError


def weights(run):
    return load_file(run.latest() / "model.safetensors")


def test_a_run_learns_and_leaves_a_complete_folder(tmp_path):
    result = train(tiny_config(tmp_path, steps=60, validate_every=20), tmp_path / "run")
    rows = list(result.run.rows())
    losses = [row["bits_per_byte"] for row in rows if "bits_per_byte" in row]
    held_out = [row["validation_bits_per_byte"] for row in rows if "validation_bits_per_byte" in row]
    assert losses[0] > 7
    assert losses[-1] < 5
    assert len(held_out) == 3
    assert held_out[-1] < 5
    assert (result.run.path / "loss.png").stat().st_size > 10_000
    assert [path.name for path in list_checkpoints(result.run.checkpoints)] == ["step_00000057", "step_00000060"]
    assert RunFolder.open(result.run.path).config() == tiny_config(tmp_path, steps=60, validate_every=20)
    saved = weights(result.run)
    assert saved.keys() == result.model.state_dict().keys()
    assert all(torch.equal(saved[name], tensor) for name, tensor in result.model.state_dict().items())


def test_metric_rows_say_what_happened(tmp_path):
    result = train(tiny_config(tmp_path), tmp_path / "run")
    rows = [row for row in result.run.rows() if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]
    assert [row["tokens"] for row in rows] == [256, 512, 768, 1024]
    assert rows[0]["learning_rate"] == pytest.approx(5e-3)  # the last step of the warm-up
    assert rows[-1]["learning_rate"] == pytest.approx(5e-4)
    assert rows[0]["bits_per_byte"] == pytest.approx(rows[0]["loss"] / math.log(2), rel=0.02)
    assert all(row["gradient_norm"] > 0 for row in rows)


ROUTED = {
    "vocab_size": 256,
    "d_model": 16,
    "pattern": "gated_conv chunk_moe gated_conv by_load",
    "layers": {
        "chunk_moe": {"num_experts": 4, "d_hidden": 8, "chunk_size": 4, "balance_weight": 0.5},
        "by_load": {"layer": "chunk_moe", "balance": "bias", "balance_weight": 0.01},
    },
}


def test_rows_hold_what_layers_say_and_the_loss_holds_their_losses(tmp_path):
    config = tiny_config(tmp_path, model=ROUTED, accumulation=2)
    result = train(config, tmp_path / "run")
    (row, *_) = [row for row in result.run.rows() if "loss" in row]
    layers = row["layers"]
    assert layers.keys() == {
        "balance_loss", "z_loss", *(f"block{i}.{name}" for i in (1, 3) for name in ("load_max", "load_entropy")),
        "block1.dead_experts", "block3.dead_experts",
    }  # fmt: skip
    # E sum_e f_e P_e is 1 where either f or P is even, and at most E.
    assert 0.4 < layers["balance_loss"] <= 0.5 * 4
    assert 1 <= layers["block1.load_max"] <= 4
    model, tokens = result.model.eval(), torch.randint(256, (2, 16))
    output = model.loss(tokens)
    own = output.cross_entropy / output.num_targets + output.aux["balance_loss"] + output.aux["z_loss"]
    assert output.loss.item() == pytest.approx(own.item(), rel=1e-6)


def test_resuming_keeps_the_selection_bias_bit_for_bit(tmp_path):
    config = tiny_config(tmp_path, model=ROUTED, checkpoint={"every": 4, "keep": 9})
    train(config, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_00000008")
    train(config, tmp_path / "again", resume=True)
    whole, resumed = (
        load_file(tmp_path / run / "checkpoints" / "step_00000008" / "model.safetensors") for run in ("run", "again")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    bias = whole["backbone.blocks.3.layer.selection_bias"]
    assert bias.abs().amax() >= 0.0199  # at least two steps of 0.01 in one direction


def test_accumulation_gives_the_step_of_the_whole_batch(tmp_path):
    model = {"vocab_size": 256, "d_model": 16, "pattern": "gated_conv swiglu"}  # no dropout: masks differ
    whole = train(tiny_config(tmp_path, model=model), tmp_path / "whole")
    parts = train(tiny_config(tmp_path, model=model, accumulation=4), tmp_path / "parts")
    for name, tensor in weights(whole.run).items():
        torch.testing.assert_close(weights(parts.run)[name], tensor, rtol=1e-4, atol=1e-5)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    first = train(tiny_config(tmp_path), tmp_path / "run")
    before = first.run.latest().stat().st_mtime_ns
    again = train(tiny_config(tmp_path), tmp_path / "run", resume=True)
    assert again.run.latest().stat().st_mtime_ns == before
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True))


def test_the_seed_decides_the_weights(tmp_path):
    one = train(tiny_config(tmp_path), tmp_path / "one")
    same = train(tiny_config(tmp_path), tmp_path / "same")
    other = train(tiny_config(tmp_path, seed=4), tmp_path / "other")
    assert all(torch.equal(weights(one.run)[name], tensor) for name, tensor in weights(same.run).items())
    assert not torch.equal(weights(one.run)["embedding.weight"], weights(other.run)["embedding.weight"])


def test_bfloat16_autocast_keeps_float32_weights(tmp_path):
    result = train(tiny_config(tmp_path, precision="bfloat16"), tmp_path / "run")
    assert {tensor.dtype for tensor in weights(result.run).values()} == {torch.float32}
    assert math.isfinite(list(result.run.rows())[-1]["validation_loss"])


def test_compiled_objective_gives_the_same_run(tmp_path):
    model = {"vocab_size": 256, "d_model": 8, "pattern": "swiglu"}
    changes = {"steps": 2, "model": model, "validate_every": 99, "optimizer": {"learning_rate": 1e-3}}
    plain = train(tiny_config(tmp_path, **changes), tmp_path / "plain")
    compiled = train(tiny_config(tmp_path, compile=True, **changes), tmp_path / "compiled")
    assert weights(plain.run).keys() == weights(compiled.run).keys()
    for name, tensor in weights(plain.run).items():
        torch.testing.assert_close(weights(compiled.run)[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    train(tiny_config(tmp_path, steps=2), tmp_path / "run")
    with pytest.raises(RunFolderError, match="already holds a run; go on with it"):
        train(tiny_config(tmp_path, steps=2), tmp_path / "run")


def test_resuming_another_configuration_lists_every_differing_key(tmp_path):
    train(tiny_config(tmp_path, steps=2), tmp_path / "run")
    other = tiny_config(tmp_path, steps=4, optimizer={"learning_rate": 1e-4}, log_every=7)
    with pytest.raises(RunFolderError) as error:
        train(other, tmp_path / "run", resume=True)
    assert "optimizer.learning_rate: 0.005 != 0.0001" in str(error.value)
    assert "steps: 2 != 4" in str(error.value)
    assert "log_every" not in str(error.value)  # decides no weight


def test_resuming_on_another_text_is_refused(tmp_path):
    train(tiny_config(tmp_path), tmp_path / "run")
    config = tiny_config(tmp_path)
    (tmp_path / "corpus" / "file_00.txt").write_text("changed since")
    with pytest.raises(CheckpointError, match="trained on another text"):
        train(config, tmp_path / "run", resume=True)


def test_a_folder_that_is_no_run_cannot_be_resumed(tmp_path):
    with pytest.raises(RunFolderError, match=r"no config\.yaml"):
        train(tiny_config(tmp_path), tmp_path / "nothing", resume=True)


def test_an_unwritable_run_folder_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFolderError, match="cannot write run folder"):
        train(tiny_config(tmp_path), tmp_path / "file" / "run")


def test_a_checkpoint_of_another_model_lists_the_tensors(tmp_path):
    config = tiny_config(tmp_path)
    train(config, tmp_path / "run")
    wider = msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, d_model=24))
    RunFolder.create(tmp_path / "wider", wider)
    (tmp_path / "wider" / "checkpoints").rmdir()
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "wider" / "checkpoints")
    with pytest.raises(CheckpointError, match=r"embedding.weight is \(256, 16\); this model has \(256, 24\)"):
        train(wider, tmp_path / "wider", resume=True)


def test_a_missing_corpus_is_refused(tmp_path):
    data = {"source": str(tmp_path / "absent"), "cache": str(tmp_path / "cache")}
    with pytest.raises(CorpusError, match="does not exist"):
        train(tiny_config(tmp_path, data=data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    data = {"source": str(tmp_path / "empty"), "cache": str(tmp_path / "cache")}
    with pytest.raises(CorpusError, match="holds no text"):
        train(tiny_config(tmp_path, data=data), tmp_path / "run")


def test_a_corpus_smaller_than_one_window_is_refused(tmp_path):
    data = {"source": str(tmp_path / "corpus"), "cache": str(tmp_path / "cache"), "sequence_length": 10**6}
    with pytest.raises(CorpusError, match="less than one window of 1000000"):
        train(tiny_config(tmp_path, data=data), tmp_path / "run")


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model.vocab_size=100 is less than the 256 ids"):
        train(tiny_config(tmp_path, model={"vocab_size": 100, "d_model": 8, "pattern": "swiglu"}), tmp_path / "run")


def test_one_file_cannot_be_split(tmp_path):
    write_corpus(tmp_path / "one", files=1)
    data = {"source": str(tmp_path / "one"), "cache": str(tmp_path / "cache"), "sequence_length": 32}
    with pytest.raises(CorpusError, match=r"cannot be split by file"):
        train(tiny_config(tmp_path, data=data), tmp_path / "run")
    without = train(tiny_config(tmp_path, data={**data, "validation_fraction": 0}), tmp_path / "run")
    assert not any("validation_loss" in row for row in without.run.rows())


@pytest.mark.parametrize("after", [0, 5])
def test_a_step_that_is_not_finite_stops_with_the_batch_and_the_place(tmp_path, monkeypatch, after):
    config = tiny_config(tmp_path)
    calls = 0
    plain = LanguageModel.loss

    def poisoned(self, *args, **kwargs):
        nonlocal calls
        calls += self.training
        if self.training and calls == after + 1:
            with torch.no_grad():
                self.backbone.blocks[1].layer.out_proj.weight[0, 0] = math.nan
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(LanguageModel, "loss", poisoned)
    with pytest.raises(TrainingDiverged, match=rf"step {after}: loss nan.*backbone.blocks.1") as error:
        train(config, tmp_path / "run")
    folder = error.value.folder
    assert folder == tmp_path / "run" / f"diverged_step_{after:08d}"
    batch = load_file(folder / "batch_0.safetensors")
    assert batch["tokens"].shape == batch["targets"].shape == (4, 32)
    assert batch["document_lengths"].sum() == 4 * 32
    report = json.loads((folder / "report.json").read_text())
    assert report["what"].startswith(f"step {after}: loss nan")
    assert "blocks.1" in report["first_non_finite_output"]
    assert load_file(folder / "model.safetensors")["embedding.weight"].isfinite().all()
    steps = [row["step"] for row in RunFolder(tmp_path / "run").rows()]
    assert all(step <= after for step in steps)


def test_a_diverged_step_keeps_the_states_that_its_rows_went_on_from(tmp_path, monkeypatch):
    plain, calls = LanguageModel.loss, 0

    def poisoned(self, *args, **kwargs):
        nonlocal calls
        calls += self.training
        output = plain(self, *args, **kwargs)
        return output._replace(loss=output.loss * math.nan) if calls > 2 else output

    monkeypatch.setattr(LanguageModel, "loss", poisoned)
    with pytest.raises(TrainingDiverged, match="step 2: ") as error:
        train(tiny_config(tmp_path, carry_state=True), tmp_path / "run")
    batch, states = (load_file(error.value.folder / f"{name}_0.safetensors") for name in ("batch", "carried"))
    assert batch["inside"].shape == (4,)
    assert batch["inside"].any()
    assert states
    assert all(tensor.shape[0] == 4 for tensor in states.values())


def test_a_gradient_that_is_not_finite_is_named(tmp_path, monkeypatch):
    plain = LanguageModel.loss

    def overflowing(self, *args, **kwargs):
        output = plain(self, *args, **kwargs)
        norm = self.backbone.norm.weight
        return output._replace(loss=output.loss + (norm * 0).sqrt().sum() * 0) if self.training else output

    monkeypatch.setattr(LanguageModel, "loss", overflowing)  # 0 * d sqrt(0) is NaN, the loss itself is not
    with pytest.raises(TrainingDiverged, match=r"step 0: .*the gradient of backbone\.norm\.weight"):
        train(tiny_config(tmp_path), tmp_path / "run")


def test_infinite_scores_in_a_state_are_not_where_a_run_diverged():
    """Pinned tokens have them, meta tokens among them."""
    layers = {"sparse_global_attention": {"num_heads": 2, "window": 4, "num_globals": 2, "block": 4}}
    values = {"vocab_size": 9, "d_model": 8, "pattern": "sparse_global_attention swiglu", "meta_tokens": 2}
    model = LanguageModel(convert({**values, "layers": layers}, ModelConfig, "model"))
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    assert any(tensor.isinf().any() for _, tensor in model.init_state(1).tensors())
    assert first_non_finite_output(model, (model(tokens) for _ in range(1))) is None
    with torch.no_grad():
        model.backbone.blocks[1].layer.out_proj.weight.fill_(math.nan)
    found = first_non_finite_output(model, (model(tokens) for _ in range(1)))
    assert found == "backbone.blocks.1.layer.out_proj (Linear)"


def test_divergence_is_told_also_when_the_batch_cannot_be_saved(tmp_path):
    batch = TextBatch(torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64), [[4]])
    (tmp_path / "file").write_text("in the way")
    error = diverged(tmp_path / "file" / "x", "step 3: loss nan", [batch], None, rank=0, output="head", gradients=[])
    assert "step 3: loss nan; first not finite: head" in str(error)
    assert "could not be saved" in str(error)
