"""The hybrid of a softmax window and linear attention, beyond the laws."""

from __future__ import annotations

import math

import pytest
import torch

from seqmodels import Layout
from seqmodels.mixers import Attention, HedgehogWindow
from seqmodels.mixers.hedgehog_window import HedgehogWindowCore
from seqmodels.models.hints import parameter_hints


def core_and_inputs(window: int, **options):
    core = HedgehogWindowCore(4, 6, num_kv_heads=2, window=window, **options)
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    q = torch.randn(2, 23, 4, 6, dtype=torch.float64)
    k, v = torch.randn(2, 2, 23, 2, 6, dtype=torch.float64).unbind(0)
    return core.double(), q, k, v


def by_definition(core, q, k, v):
    """num / den of the class's equation, one query of one head at a time."""
    y = torch.zeros_like(q)
    query_map, key_map = core.maps()
    gamma = torch.sigmoid(core.window_logit)
    factor = 1 - gamma if core.linear_factor == "complement" else torch.ones_like(gamma)
    repeated = k.repeat_interleave(2, dim=2)
    phi_q, phi_k = query_map(q), key_map(repeated)
    for row, i, head in torch.cartesian_prod(torch.arange(2), torch.arange(23), torch.arange(4)).tolist():
        inside = list(range(max(0, i - core.window + 1), i + 1))
        scores = torch.stack([q[row, i, head] @ repeated[row, j, head] / math.sqrt(6) for j in inside])
        near = gamma[head] * (scores - scores.max()).exp()
        numerator = sum(w * v[row, j, head // 2] for w, j in zip(near, inside, strict=True))
        denominator = near.sum()
        for j in range(i - core.window + 1):
            weight = factor[head] * phi_q[row, i, head] @ phi_k[row, j, head]
            numerator, denominator = numerator + weight * v[row, j, head // 2], denominator + weight
        y[row, i, head] = numerator / denominator
    return y


@pytest.mark.parametrize("feature_map", ["hedgehog_split", "hedgehog_joint", "t2r", "elu"])
@pytest.mark.parametrize(("window", "linear_factor"), [(1, "one"), (5, "complement"), (22, "one")])
def test_core_is_its_definition_in_sequence_and_in_decoding(window, linear_factor, feature_map):
    core, q, k, v = core_and_inputs(window, linear_factor=linear_factor, feature_map=feature_map)
    with torch.no_grad():
        expected = by_definition(core, q, k, v)
        torch.testing.assert_close(core(q, k, v)[0], expected, rtol=1e-11, atol=1e-12)
        state = core.init_state(2, dtype=torch.float64)
        steps = torch.stack([core.step(q[:, t], k[:, t], v[:, t], state) for t in range(23)], dim=1)
        torch.testing.assert_close(steps, expected, rtol=1e-11, atol=1e-12)
        weights = core.attention_weights(q, k)
        mixed = torch.einsum("bhij,bjhp->bihp", weights, v.repeat_interleave(2, dim=2))
        torch.testing.assert_close(mixed, expected, rtol=1e-11, atol=1e-12)


def test_weights_of_packed_documents():
    core, q, k, v = core_and_inputs(3)
    layout = Layout.packed([[9, 10], [1, 22]], 23)
    y = core(q, k, v, layout=layout)[0]
    mixed = torch.einsum("bhij,bjhp->bihp", core.attention_weights(q, k, layout), v.repeat_interleave(2, dim=2))
    torch.testing.assert_close(mixed[layout.valid], y[layout.valid], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("logit", [-20.0, 0.0, 4.0])
def test_a_window_over_everything_is_softmax_attention_for_every_gamma(logit):
    layer = HedgehogWindow(16, num_heads=4, num_kv_heads=2, window=64).double()
    attention = Attention(16, num_heads=4, num_kv_heads=2).double()
    with torch.no_grad():
        layer.core.window_logit.fill_(logit)
        attention.in_proj.weight.copy_(torch.cat([p.weight for p in (layer.q_proj, layer.k_proj, layer.v_proj)]))
        attention.out_proj.weight.copy_(layer.out_proj.weight)
    x = torch.randn(2, 50, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x).y, attention(x).y, rtol=1e-11, atol=1e-12)


def test_parts_can_be_switched_off():
    """Window alone is windowed softmax; the past alone is 0 until a token has left the window."""
    core, q, k, v = core_and_inputs(5)
    core.linear_weight = 0.0
    distance = torch.arange(23)[:, None] - torch.arange(23)
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) / math.sqrt(6)
    weights = scores.masked_fill((distance < 0) | (distance >= 5), -math.inf).softmax(-1)
    y = torch.einsum("bhij,bjhp->bihp", weights, v.repeat_interleave(2, 2))
    torch.testing.assert_close(core(q, k, v)[0], y, rtol=1e-11, atol=1e-12)
    core.linear_weight, core.window_weight = 1.0, 0.0
    y = core(q, k, v)[0]
    assert (y[:, :5] == 0).all()
    phi = [m(x) for m, x in zip(core.maps(), (q, k.repeat_interleave(2, 2)), strict=True)]
    weights = torch.einsum("bihf,bjhf->bhij", *phi) * (distance >= 5)
    weights = weights / weights.sum(-1, keepdim=True)
    expected = torch.einsum("bhij,bjhp->bihp", weights[:, :, 5:], v.repeat_interleave(2, 2))
    torch.testing.assert_close(y[:, 5:], expected, rtol=1e-11, atol=1e-12)


def test_gamma_starts_at_a_tenth_and_does_not_decay():
    layer = HedgehogWindow(16, num_heads=2)
    torch.testing.assert_close(layer.core.factors(torch.float32)[0], torch.full((2,), 0.1))
    hints = parameter_hints(layer)
    assert hints["core.window_logit"].weight_decay == 0.0


def test_state_does_not_grow():
    layer = HedgehogWindow(16, num_heads=4, num_kv_heads=2, window=6)
    rings, matrix, position = 2 * 2 * 6 * 4, 4 * 8 * 5, 2
    assert layer.state_bytes(10) == layer.state_bytes(10**6) == 4 * (rings + matrix + position)


def test_flops_count_window_and_linear_part():
    layer = HedgehogWindow(16, num_heads=2, window=10, feature_dim=4)
    pairs = 10 * 11 // 2 + 90 * 10
    linear = 4 * 8 * 4 + 4 * 8 * 9 + 64 * (8 + 9)
    assert layer.flops(100) == 100 * 4 * 2 * 16 * 16 + 2 * (4 * 8 * pairs + 100 * linear)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(window=0), "window is 0"),
        (dict(linear_factor="half"), "linear_factor is 'half'"),
        (dict(feature_map="hedgehog_exp"), "choose hedgehog_split or hedgehog_joint"),
        (dict(feature_map="identity"), "choose hedgehog_split or hedgehog_joint"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        HedgehogWindow(16, num_heads=2, **arguments)
