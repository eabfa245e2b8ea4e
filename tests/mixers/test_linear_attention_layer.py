"""LinearAttention and its feature maps, beyond the laws."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import linear, logsigmoid

import seqmodels
from seqmodels.mixers import LinearAttention
from seqmodels.mixers.feature_maps import FEATURE_MAPS


def attention_weights(layer: LinearAttention, x: torch.Tensor) -> torch.Tensor:
    """phi(q_i) . phi(k_j) for j <= i, zero elsewhere: (batch, heads, length, length)."""
    q = layer.query_map(layer.q_proj(x).unflatten(-1, (layer.num_heads, layer.key_dim)))
    k = layer.key_map(layer.k_proj(x).unflatten(-1, (layer.num_heads, layer.key_dim)))
    return torch.einsum("bihn,bjhn->bhij", q, k).tril()


@pytest.mark.parametrize("feature_map", [name for name in FEATURE_MAPS.shipped() if FEATURE_MAPS[name].nonnegative])
def test_normalised_is_a_weighted_mean(feature_map):
    layer = LinearAttention(8, num_heads=2, feature_map=feature_map).double()
    x = torch.randn(2, 11, 8, dtype=torch.float64)
    weights = attention_weights(layer, x)
    weights = weights / (weights.sum(-1, keepdim=True) + (0 if feature_map == "hedgehog_exp" else 1e-6))
    v = layer.v_proj(x).unflatten(-1, (2, 4))
    y = torch.einsum("bhij,bjhp->bihp", weights, v).flatten(-2)
    torch.testing.assert_close(layer(x).y, layer.out_proj(y), rtol=1e-10, atol=1e-10)


def test_fixed_decay_is_retention():
    layer = LinearAttention(8, num_heads=2, feature_map="identity", decay="fixed", normalize=False).double()
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    distance = (torch.arange(9)[:, None] - torch.arange(9)).clamp_min(0)
    decay = torch.tensor([1 - 2.0**-5, 1 - 2.0**-6], dtype=torch.float64)[:, None, None] ** distance
    v = layer.v_proj(x).unflatten(-1, (2, 4))
    y = torch.einsum("bhij,bjhp->bihp", attention_weights(layer, x) * decay, v).flatten(-2)
    torch.testing.assert_close(layer(x).y, layer.out_proj(y), rtol=1e-10, atol=1e-10)


def test_data_dependent_decay():
    layer = LinearAttention(8, num_heads=2, decay="data_dependent").double()
    rate = torch.nn.functional.softplus(layer.decay_bias)
    assert ((rate >= 9.9e-4) & (rate <= 0.101)).all()
    x = torch.randn(1, 7, 8, dtype=torch.float64)
    sums = logsigmoid(-(linear(x, layer.decay_proj.weight) + layer.decay_bias)).cumsum(1).transpose(1, 2)
    weights = attention_weights(layer, x) * (sums[..., :, None] - sums[..., None, :]).tril().exp()
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    y = torch.einsum("bhij,bjhp->bihp", weights, layer.v_proj(x).unflatten(-1, (2, 4))).flatten(-2)
    torch.testing.assert_close(layer(x).y, layer.out_proj(y), rtol=1e-10, atol=1e-10)


def test_taylor_features_give_the_expansion():
    features = FEATURE_MAPS["taylor"](2, 16)
    q, k = torch.randn(2, 3, 5, 2, 16, dtype=torch.float64).unbind(0)
    s = (q * k).sum(-1) / math.sqrt(16)
    assert features.output_dim == features(q).shape[-1] == 153
    torch.testing.assert_close((features(q) * features(k)).sum(-1), 1 + s + s**2 / 2)


@pytest.mark.parametrize("name", FEATURE_MAPS.names())
def test_declared_signs(name):
    features = FEATURE_MAPS[name](2, 6)
    q, k = torch.randn(2, 400, 2, 6).unbind(0)
    products = (features(q) * features(k)).sum(-1)
    assert (products >= 0).all().item() == features.nonnegative


def test_bfloat16_keeps_decays_and_state_in_float32():
    layer = LinearAttention(16, num_heads=2, decay="fixed").bfloat16()
    x = torch.randn(1, 300, 16).bfloat16()
    output = layer(x, return_state=True)
    assert output.y.dtype == torch.bfloat16
    assert output.state.matrix.dtype == torch.float32
    with seqmodels.backend("reference"):
        exact = layer.double()(x.double(), return_state=True).state.matrix
    # A decay rounded to bfloat16 would be wrong by 2^-9 of itself at every one of 300 tokens.
    torch.testing.assert_close(output.state.matrix.double(), exact, rtol=2e-2, atol=2e-2 * exact.abs().max().item())


def test_flops_count_matrix_products():
    layer = LinearAttention(16, num_heads=2, gate=True)
    projections = 2 * 100 * 5 * 16 * 16
    assert layer.flops(100) == projections + 100 * 2 * (4 * 8 * 9 + 64 * (8 + 9))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_heads=3), "d_model=16 is not divisible by num_heads=3"),
        (dict(num_heads=0), "num_heads is 0"),
        (dict(num_heads=2, key_dim=-1), "key_dim is -1"),
        (dict(num_heads=2, feature_map="elo"), "unknown feature map 'elo'. Did you mean elu"),
        (dict(num_heads=2, decay="learned"), "decay is 'learned'"),
        (dict(num_heads=2, feature_map="identity"), "choose normalize=False"),
        (dict(num_heads=2, epsilon=0.0), "epsilon is 0.0"),
        (dict(num_heads=2, feature_map="hedgehog_exp", decay="fixed"), "needs normalize=True and decay='none'"),
        (dict(num_heads=2, feature_map="hedgehog_exp", normalize=False), "needs normalize=True and decay='none'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        LinearAttention(16, **arguments)


def test_refuses_a_state_of_another_batch_and_a_flat_input():
    layer = LinearAttention(16, num_heads=2)
    with pytest.raises(ValueError, match="state field 'matrix'"):
        layer(torch.randn(2, 3, 16), layer.init_state(3))
    with pytest.raises(ValueError, match="call step"):
        layer(torch.randn(2, 16))
