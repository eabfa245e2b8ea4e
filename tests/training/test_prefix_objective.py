"""Training a prefix model: both losses are reported, a run goes on exactly, wrong settings are refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from training_cases import tiny_config, tiny_data

from seqmodels.configuration import ConfigError
from seqmodels.training.config import convert_train_config
from seqmodels.training.data import load_text
from seqmodels.training.loop import Trainer, train
from seqmodels.training.prefix import PrefixMasking

MODEL = {
    "vocab_size": 257, "d_model": 16, "pattern": "gated_conv prefix_linear_attention swiglu", "dropout": 0.1,
    "layers": {"prefix_linear_attention": {"num_heads": 2, "feature_dim": 4}},
    "objective": "prefix", "prefix_length": 16,
}  # fmt: skip


def config(folder, **changes):
    return tiny_config(folder, **{"model": MODEL, **changes})


def rows_without_time(run):
    return [{k: v for k, v in row.items() if k not in ("time", "tokens_per_second")} for row in run.rows()]


def test_both_losses_fall_and_are_reported_on_held_out_text(tmp_path):
    result = train(config(tmp_path, steps=60, validate_every=20), tmp_path / "run")
    rows = list(result.run.rows())
    for name in ("loss", "masked_loss", "validation_loss", "validation_masked_loss"):
        values = [row[name] for row in rows if name in row]
        assert values[-1] < values[0] < 6.5
        assert values[-1] < 4.5


@pytest.mark.parametrize("changes", [{}, {"accumulation": 2, "precision": "bfloat16"}])
def test_a_run_that_was_stopped_goes_on_with_the_same_masks(tmp_path, monkeypatch, changes):
    whole = train(config(tmp_path, **changes), tmp_path / "whole")
    step = Trainer._take_step

    def stopping(self, factor):
        if self.step == 5:
            raise KeyboardInterrupt
        return step(self, factor)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_take_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(config(tmp_path, **changes), tmp_path / "run")
    again = train(config(tmp_path, **changes), tmp_path / "run", resume=True)
    expected, found = (load_file(run.run.latest() / "model.safetensors") for run in (whole, again))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert rows_without_time(again.run) == rows_without_time(whole.run)


def test_rows_keep_their_masks_however_they_are_cut_into_batches(tmp_path):
    run = config(tmp_path)
    data = load_text(run.data, seed=run.seed, vocab_size=257)
    masking = PrefixMasking(None, run.model, data.tokenizer, seed=run.seed)
    assert masking.mask_id == 256
    batch = masking.masked(data.train.batch(3, 4), 3, validation=False)
    part = masking.masked(data.train.batch(4, 2), 4, validation=False)
    assert batch.masked.shape == (4, 16)
    assert torch.equal(batch.masked[1:3], part.masked)
    assert torch.equal(batch.tokens[1:3], part.tokens)
    assert not torch.equal(batch.masked, masking.masked(data.train.batch(3, 4), 3, validation=True).masked)


@pytest.mark.slow
def test_compiled_objective_gives_the_same_run(tmp_path):
    changes = {"steps": 2, "model": {**MODEL, "dropout": 0.0, "pattern": "prefix_linear_attention"}}
    plain = train(config(tmp_path, **changes), tmp_path / "plain")
    compiled = train(config(tmp_path, compile=True, **changes), tmp_path / "compiled")
    others = dict(compiled.model.named_parameters())
    for name, tensor in plain.model.named_parameters():
        torch.testing.assert_close(others[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {**MODEL, "prefix_length": 32}}, "model.prefix_length=32 leaves no next token.*sequence_length=32"),
        ({"model": {**MODEL, "prefix_length": 100}}, "model.prefix_length=100 leaves no next token"),
        ({"model": {k: v for k, v in MODEL.items() if k != "prefix_length"}}, "needs model.prefix_length.*=16, half"),
        ({"prefix": {"mask_id": 257}}, "prefix.mask_id=257 is no id of the model; model.vocab_size=257"),
        ({"prefix": {"mask_probability": 1.5}}, "mask_probability"),
        ({"model": {"vocab_size": 256, "d_model": 8, "pattern": "swiglu"}, "prefix": {}}, "'prefix' is for model.obj"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_trained_are_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        convert_train_config(tiny_data(tmp_path, **{"model": MODEL, **changes}))


def test_a_mask_that_is_a_token_of_the_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"mask id 255 is a token of tokenizer 'bytes'.*model.vocab_size=257"):
        train(config(tmp_path, model={**MODEL, "vocab_size": 256}), tmp_path / "run")
