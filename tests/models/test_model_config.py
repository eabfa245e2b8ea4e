from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from model_helpers import HYBRID

from seqmodels.configuration import convert, dump_yaml, load_yaml, parse_yaml
from seqmodels.models import ClassifierConfig, LanguageModel, ModelConfig, load_config
from seqmodels.models.config import read_model_config

CONFIGS = Path(__file__).parents[2] / "configs" / "models"


def make(**changes: Any) -> ModelConfig:
    return convert({**HYBRID, **changes}, ModelConfig)


def block_list(config: ModelConfig) -> list[tuple[list[tuple[str, dict]], str | None]]:
    return [([tuple(layer) for layer in block.layers], block.share) for block in config.block_specs()]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_build_and_round_trip(path: Path) -> None:
    config = load_config(path)
    assert convert(parse_yaml(dump_yaml(config)), ModelConfig) == config
    assert LanguageModel(config, device="meta").num_parameters() > 0


def test_round_trip_is_exact_for_awkward_values() -> None:
    config = make(
        norm_epsilon=1e-12,
        dropout=0.1 + 0.2,
        initialization={"embedding_std": 1 / 3, "linear_std": 1e-3, "residual_scale": None},
        layers={**HYBRID["layers"], "linear_attention": {"num_heads": 2, "epsilon": 1e-300}},
        pattern=None,
        blocks=["2x(gated_conv swiglu)", {"layer": "attention", "num_heads": 2, "share": "no"}],
    )
    again = convert(parse_yaml(dump_yaml(config)), ModelConfig)
    assert again == config
    assert again.block_specs() == config.block_specs()


def test_words_inherit_arguments_and_blocks_override_them() -> None:
    config = make(
        pattern=None,
        layers={
            "attention": {"num_heads": 4},
            "window": {"layer": "attention", "window": 8},
            "wide": {"layer": "window", "window": 32},
        },
        blocks=["attention window", "wide", {"layer": "window", "window": 64, "num_heads": 2}],
    )
    assert block_list(config) == [
        ([("attention", {"num_heads": 4})], None),
        ([("attention", {"num_heads": 4, "window": 8})], None),
        ([("attention", {"num_heads": 4, "window": 32})], None),
        ([("attention", {"num_heads": 2, "window": 64})], None),
    ]


def test_share_ids_reach_their_blocks() -> None:
    config = make(
        pattern="shared swiglu shared", layers={"shared": {"layer": "attention", "num_heads": 2, "share": "a"}}
    )
    assert [block.share for block in config.block_specs()] == ["a", None, "a"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_siz": 3}, "vocab_siz.*vocab_size"),
        ({"vocab_size": 0}, "vocab_size is 0; expected a positive integer"),
        ({"vocab_size": 2.5}, "Expected `int`, got `float`.*vocab_size"),
        ({"d_model": -4}, "d_model is -4"),
        ({"d_model": "16"}, "Expected `int`, got `str`.*d_model"),
        ({"dropout": 1.0}, "dropout is 1.0; expected 0 <= dropout < 1"),
        ({"norm": "rmsnorm"}, "norm"),
        ({"norm": "none", "norm_place": "post"}, "places a norm, but norm is 'none'"),
        ({"norm_epsilon": 0.0}, "norm_epsilon is 0.0"),
        ({"initialization": {"linear_std": -1.0}}, "linear_std is -1.0"),
        ({"initialization": {"linear_sdt": 1.0}}, "linear_sdt.*linear_std"),
        ({"pattern": None}, "exactly one of 'pattern'"),
        ({"blocks": ["swiglu"]}, "exactly one of 'pattern'"),
        ({"pattern": None, "blocks": []}, "blocks is empty"),
        ({"pattern": None, "blocks": [{"window": 3}]}, "blocks.0: a mapping needs the key 'layer'"),
        ({"pattern": "gated_conf"}, "unknown layer 'gated_conf'. Did you mean gated_conv"),
        (
            {"layers": {"atention": {"num_heads": 2}}, "pattern": "swiglu"},
            "layers.atention: unknown layer 'atention'. Did you mean",
        ),
        ({"layers": {"a": {"layer": "b"}, "b": {"layer": "a"}}, "pattern": "a"}, "circle of names"),
        ({"layers": {"a": {"layer": 3}}, "pattern": "a"}, "'layer' is 3"),
        ({"layers": {"a": {"layer": "mlp", "share": 3}}, "pattern": "a"}, "'share' is 3"),
        (
            {"layers": {"a": {"layer": "mlp", "share": "x"}}, "pattern": "a>mlp"},
            "a branch of several layers; 'share' is for blocks of one layer",
        ),
    ],
)
def test_refusals_name_the_key_and_the_way_out(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_shared_blocks_must_agree() -> None:
    config = make(
        pattern=None,
        layers={},
        blocks=[
            {"layer": "attention", "num_heads": 2, "share": "a"},
            {"layer": "attention", "num_heads": 4, "share": "a"},
        ],
    )
    with pytest.raises(ValueError, match="block 1 and block 0 share weights 'a' but differ"):
        LanguageModel(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_head": 4}, "unknown argument 'num_head'. Did you mean num_heads"),
        ({"num_heads": "4"}, "'num_heads' is '4'; expected int"),
        ({"num_heads": True}, "'num_heads' is True; expected int"),
        ({"num_heads": 2, "window": "wide"}, "'window' is 'wide'; expected int or null"),
        ({"num_heads": 2, "d_model": 3}, "'d_model' is set by the model"),
        ({}, "'num_heads' is missing"),
    ],
)
def test_layer_arguments_are_checked_against_the_constructor(arguments: dict, message: str) -> None:
    config = make(pattern="attention", layers={"attention": arguments})
    with pytest.raises(ValueError, match=message):
        config.check_layers()
    with pytest.raises(ValueError, match=message):
        LanguageModel(config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, r"block 0 \(attention\).*d_model=16 is not divisible by num_heads=3"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"num_heads": -2}, "num_heads is -2"),
    ],
)
def test_a_layers_own_refusal_names_its_block(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModel(make(pattern="attention", layers={"attention": arguments}))


def test_a_users_layer_is_configured_like_any_other() -> None:
    config = make(pattern="test_running_sum", layers={"test_running_sum": {"factor": 2}})
    assert LanguageModel(config).backbone.layers()[0].factor == 2.0
    with pytest.raises(ValueError, match=r"unknown argument 'factr'\. Did you mean factor"):
        LanguageModel(make(pattern="test_running_sum", layers={"test_running_sum": {"factr": 2}}))
    with pytest.raises(ValueError, match=r"block 0 \(test_running_sum\): RunningSum: factor is -1"):
        LanguageModel(make(pattern="test_running_sum", layers={"test_running_sum": {"factor": -1.0}}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "exactly one of 'vocab_size'"),
        ({"vocab_size": 3, "input_size": 1}, "exactly one of 'vocab_size'"),
        ({"vocab_size": 3, "num_classes": 0}, "num_classes is 0"),
        ({"input_size": 0}, "input_size is 0"),
        ({"vocab_size": 3, "pooling": "max"}, "pooling"),
    ],
)
def test_classifier_configs_are_strict(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert({"d_model": 8, "pattern": "mlp", "num_classes": 2, **changes}, ClassifierConfig)


def test_numbers_in_yaml_files(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_text("vocab_size: 50\nd_model: 16\npattern: swiglu\nnorm_epsilon: 1e-3\n")
    assert load_config(path, ["dropout=1e-1", "layers.swiglu.d_hidden=8"]).norm_epsilon == 1e-3
    path.write_text("vocab_size: 50\nd_model: 16\nd_model: 32\npattern: swiglu\n")
    with pytest.raises(ValueError, match="'d_model' appears twice"):
        load_yaml(path)


def test_a_training_config_names_its_model_inline_or_by_path(tmp_path: Path) -> None:
    text = "vocab_size: 50\nd_model: 16\npattern: swiglu\n"
    (tmp_path / "model.yaml").write_text(text)
    (tmp_path / "by_path.yaml").write_text("model: model.yaml\nsteps: 3\n")
    (tmp_path / "inline.yaml").write_text("steps: 3\nmodel:\n  " + text.replace("\n", "\n  "))
    expected = load_config(tmp_path / "model.yaml", ["d_model=8"])
    for name in ("model", "by_path", "inline"):
        assert read_model_config(tmp_path / f"{name}.yaml", ["d_model=8"]) == expected
