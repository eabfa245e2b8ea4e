"""Norms, dropout, branches and initial weights against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from model_helpers import HYBRID, hybrid, tokens

from seqmodels.configuration import convert
from seqmodels.layout import Layout
from seqmodels.models import LanguageModel, ModelConfig, Stack
from seqmodels.models.config import StackConfig
from seqmodels.models.normalization import BatchNorm, Dropout, make_norm


def make_stack(**values: object) -> Stack:
    torch.manual_seed(0)
    config = StackConfig(**{"d_model": 8, "pattern": "swiglu mlp", **values})  # type: ignore[arg-type]
    return Stack(config).double()


def test_pre_norm_block() -> None:
    stack, h = make_stack(), torch.randn(2, 5, 8, dtype=torch.float64)
    expected = h
    for block in stack.blocks:
        expected = expected + block.layer(block.norm(expected)).y
    torch.testing.assert_close(stack(h).hidden, stack.norm(expected))


def test_post_norm_block_has_no_last_norm() -> None:
    stack, h = make_stack(norm="layer", norm_place="post"), torch.randn(2, 5, 8, dtype=torch.float64)
    expected = h
    for block in stack.blocks:
        expected = block.norm(expected + block.layer(expected).y)
    torch.testing.assert_close(stack(h).hidden, expected)


def test_a_branch_applies_its_layers_in_turn() -> None:
    stack, h = make_stack(pattern="swiglu>mlp"), torch.randn(2, 5, 8, dtype=torch.float64)
    (block,) = stack.blocks
    first, second = block.layers()
    torch.testing.assert_close(stack(h).hidden, stack.norm(h + second(first(block.norm(h)).y).y))


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norms_are_torchs_in_every_dtype(kind: str) -> None:
    norm = make_norm(kind, 8, 1e-3)
    x = torch.randn(3, 8)
    torch.nn.init.normal_(norm.weight)
    theirs = torch.nn.RMSNorm(8, 1e-3) if kind == "rms" else torch.nn.LayerNorm(8, 1e-3)
    theirs.load_state_dict(norm.state_dict())
    torch.testing.assert_close(norm(x), theirs(x))
    low = norm.to(torch.bfloat16)
    theirs.load_state_dict(low.state_dict())
    assert low(x).dtype == torch.float32
    torch.testing.assert_close(low(x), theirs(x))


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_torchs(training: bool) -> None:
    ours, theirs = BatchNorm(6, 1e-4).double(), torch.nn.BatchNorm1d(6, 1e-4).double()
    for module in (ours, theirs):
        torch.manual_seed(1)
        torch.nn.init.normal_(module.weight)
        torch.nn.init.normal_(module.bias)
        module.train(training)
    for _ in range(3):
        x = 3 + 2 * torch.randn(4, 7, 6, dtype=torch.float64)
        torch.testing.assert_close(ours(x), theirs(x.flatten(0, 1)).view_as(x))
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_batch_norm_counts_no_padding() -> None:
    norm = BatchNorm(6, 1e-5).double()
    layout = Layout.packed([[3], [5], [1]], 5)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    x[~layout.valid] = 1e6
    alone = BatchNorm(6, 1e-5).double()
    expected = alone(x[layout.valid][None])[0]
    torch.testing.assert_close(norm(x, layout)[layout.valid], expected)
    torch.testing.assert_close(norm.running_var, alone.running_var)
    torch.testing.assert_close(norm.running_mean, alone.running_mean)


def test_tied_dropout_draws_one_mask_for_a_sequence() -> None:
    x = torch.ones(5, 40, 64)
    tied, free = Dropout(0.25, tied=True)(x), Dropout(0.25)(x)
    torch.testing.assert_close(tied.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert (tied == tied[:, :1]).all()
    assert not (tied[0] == tied[1]).all()
    assert not (free == free[:, :1]).all()
    assert abs((tied == 0).float().mean() - 0.25) < 0.1
    assert torch.equal(Dropout(0.25).eval()(x), x)


def test_depth_scaled_initial_weights() -> None:
    def weights(scale: object) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        config = {**HYBRID, "pattern": "4x(attention swiglu) mlp>mlp", "initialization": {"residual_scale": scale}}
        return LanguageModel(convert(config, ModelConfig)).state_dict()

    plain, deep, fixed = weights(None), weights("depth"), weights(0.25)
    scaled = {name for name in plain if name.endswith("out_proj.weight")}
    assert len(scaled) == 10
    for name, tensor in plain.items():
        torch.testing.assert_close(deep[name], tensor / math.sqrt(9) if name in scaled else tensor)
        torch.testing.assert_close(fixed[name], tensor * 0.25 if name in scaled else tensor)


def test_normal_initial_weights() -> None:
    config = {
        **HYBRID,
        "d_model": 64,
        "initialization": {"linear_std": 0.02, "embedding_std": 0.5, "residual_scale": None},
    }
    model = LanguageModel(convert(config, ModelConfig))
    assert abs(model.embedding.weight.std() - 0.5) < 0.02
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    large = [module.weight for module in linears if module.weight.numel() > 1000]
    assert len(large) >= 8
    for weight in large:
        assert abs(weight.std() - 0.02) < 0.002


def test_dropout_of_a_model_acts_in_training_only() -> None:
    model, ids = hybrid(dropout=0.5), tokens(2, 6)
    assert not torch.equal(model(ids).logits, model(ids).logits)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)
