"""Strict training configurations."""

from __future__ import annotations

import pytest
from training_cases import tiny_data

from seqmodels.configuration import ConfigError, dump_yaml, load_yaml, parse_yaml
from seqmodels.training.config import TrainConfig, convert_train_config, load_train_config


@pytest.fixture
def path(tmp_path):
    (tmp_path / "train.yaml").write_text(dump_yaml(tiny_data(tmp_path)))
    return tmp_path / "train.yaml"


def test_a_configuration_survives_yaml(path, tmp_path):
    config = load_train_config(path)
    (tmp_path / "again.yaml").write_text(dump_yaml(config))
    assert load_train_config(tmp_path / "again.yaml") == config
    assert isinstance(config, TrainConfig)


def test_overrides_are_typed_yaml(path):
    config = load_train_config(
        path, ["optimizer.learning_rate=1e-4", "model.d_model=32", "compile=true", "data.suffixes=[.py]"]
    )
    assert config.optimizer.learning_rate == 1e-4
    assert config.model.d_model == 32
    assert config.compile is True
    assert config.data.suffixes == (".py",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sequence_lenght=4", "data.sequence_lenght'. Did you mean data.sequence_length?"),
        ("stepz=4", "stepz'. Did you mean steps?"),
        ("model.d_modle=4", "model.d_modle'. Did you mean model.d_model?"),
        ("model.layers.linear_attention.num_head=4", "num_heads"),
        ("optimiser.learning_rate=1", "Did you mean optimizer?"),
        ("zzz=1", "Known: model, data, optimizer"),
        ("steps=many", "Expected `int`"),
        ("steps=0", ">= 1"),
        ("schedule.name=linear", "Invalid enum value 'linear'"),
        ("steps.more=1", "'steps' is the value 8, it has no keys inside"),
        ("steps", "is not key=value"),
        ("steps=[", "is not valid YAML"),
        ("batch_size=5 ", None),
        ("accumulation=3", "batch_size=4 is not divisible by accumulation=3"),
        ("schedule.warmup_steps=9", "warmup_steps=9 is more than steps=8"),
        ("schedule.decay_steps=3", "schedule.decay_steps=3 belongs to schedule.name=wsd"),
        ("schedule={name: wsd, warmup_steps: 4, decay_steps: 5}", "are together more than steps=8"),
        ("model.pattern=gated_con swiglu", "Did you mean gated_conv?"),
    ],
)
def test_overrides_are_strict(path, override, message):
    if message is None:
        assert load_train_config(path, [override]).batch_size == 5
        return
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the text is compared below
        load_train_config(path, [override])
    assert message in str(error.value)


def test_the_model_may_lie_in_a_file_beside(path, tmp_path):
    data = tiny_data(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny.yaml").write_text(dump_yaml(data["model"]))
    path.write_text(dump_yaml({**data, "model": "models/tiny.yaml"}))
    assert load_train_config(path, ["model.d_model=8"]) == convert_train_config(
        {**data, "model": {**data["model"], "d_model": 8}}
    )


def test_a_model_is_required(path):
    path.write_text("steps: 3\n")
    with pytest.raises(ConfigError, match="no key 'model'"):
        load_train_config(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load_train_config(tmp_path / "absent.yaml")


def test_exponents_are_numbers_and_duplicates_are_refused(tmp_path):
    assert parse_yaml("[1e-3, 2.5e4, 1E6, -3e-2, .5e1, 1e, e3]") == [1e-3, 2.5e4, 1e6, -3e-2, 5.0, "1e", "e3"]
    (tmp_path / "twice.yaml").write_text("steps: 1\nseed: 2\nsteps: 3\n")
    with pytest.raises(ConfigError, match=r"line 3: key 'steps' appears twice"):
        load_yaml(tmp_path / "twice.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_yaml(tmp_path / "list.yaml")
