"""Hedgehog and Based, beyond the laws: the definition by quadratic weights, groups, both directions, extremes."""

from __future__ import annotations

import pytest
import torch

import seqmodels
from seqmodels import Layout
from seqmodels.mixers import Based, Hedgehog, LinearAttention
from seqmodels.mixers.hedgehog import HedgehogCore

MAPS = ["hedgehog_exp", "hedgehog_split", "hedgehog_joint", "hedgehog_joint_doubled", "t2r", "taylor", "elu", "relu"]


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double()


def weights_by_definition(core: HedgehogCore, q, k, layout=None):
    """phi(q_i) . phi(k_j) over its sum, one head at a time, with each query head's own map of its group's keys."""
    query_map, key_map = core.maps()
    repeats = core.num_heads // core.num_kv_heads
    phi_q, phi_k = query_map(q), key_map(torch.stack([k[:, :, h // repeats] for h in range(core.num_heads)], dim=2))
    weights = torch.stack([phi_q[:, :, h] @ phi_k[:, :, h].transpose(1, 2) for h in range(core.num_heads)], dim=1)
    if not core.bidirectional:
        weights = weights.tril()
    if layout is not None:
        same = layout.document[:, :, None] == layout.document[:, None, :]
        weights = weights * (same & layout.valid[:, None])[:, None]
    return weights / (weights.sum(-1, keepdim=True) + core.epsilon) if core.normalize else weights


@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "both ways"])
@pytest.mark.parametrize("feature_map", MAPS)
def test_core_is_its_definition(feature_map, bidirectional):
    core = randomised(
        HedgehogCore(4, 5, num_kv_heads=2, value_dim=3, feature_map=feature_map, bidirectional=bidirectional)
    )
    q = torch.randn(2, 11, 4, 5, dtype=torch.float64)
    k, v = torch.randn(2, 11, 2, 5, dtype=torch.float64), torch.randn(2, 11, 2, 3, dtype=torch.float64)
    layout = Layout.packed([[4, 6], [1, 2, 3]], 11, capacity=7)
    for given in (None, layout):
        weights = weights_by_definition(core, q, k, given)
        y = torch.einsum("bhij,bjhp->bihp", weights, v.repeat_interleave(2, dim=2))
        if given is not None:
            y = y * given.valid[..., None, None]
        torch.testing.assert_close(core(q, k, v, layout=given)[0], y, rtol=1e-10, atol=1e-12)
        found = core.attention_weights(q, k, given)
        valid = torch.ones(2, 11, dtype=torch.bool) if given is None else given.valid
        found, weights = (x.transpose(1, 2)[valid] for x in (found, weights))
        torch.testing.assert_close(found, weights, rtol=1e-10, atol=1e-12)


def test_rotation_comes_before_the_map():
    """With the same token everywhere, only positions tell keys apart."""
    layer = randomised(Hedgehog(8, num_heads=2, rotary_fraction=1.0))
    x = torch.randn(1, 1, 8, dtype=torch.float64).expand(1, 6, 8).contiguous()
    turned, plain = layer, randomised(Hedgehog(8, num_heads=2))
    plain.load_state_dict(layer.state_dict())
    weights = [one.core.attention_weights(*one.project(x, torch.arange(6))[:2]) for one in (turned, plain)]
    assert weights[0][0, 0, -1].std() > 1e-3
    torch.testing.assert_close(weights[1][0, 0, -1], torch.full((6,), 1 / 6, dtype=torch.float64))


@pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "both ways"])
@pytest.mark.parametrize("feature_map", ["hedgehog_exp", "hedgehog_joint"])
def test_large_features_stay_finite_and_exact(feature_map, bidirectional):
    """u of about 40 and up to 120, whose exponentials overflow float32, against float64."""
    core = HedgehogCore(2, 8, feature_map=feature_map, bidirectional=bidirectional)
    q, k, v = (x.float() for x in torch.randn(3, 2, 33, 2, 8, dtype=torch.float64).unbind(0))
    q, k = 40 * q, 40 * k
    assert torch.isinf(core.query_map(4 * q)).any() == (feature_map == "hedgehog_exp")
    y = core(q, k, v)[0]
    with seqmodels.backend("reference"):
        exact = core.double()(q.double(), k.double(), v.double())[0]
    # float32 rounds u by 2^-24 of 120: weights are off by a factor of 1 + 120 * 2^-24 * a few, and so is y
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=8 * 2 * 120 * 2**-24 * v.abs().max().item())


def test_a_query_that_sees_no_weight_gives_zero():
    """relu can leave a sum of 0; padding has none. Neither is NaN, nor its gradient."""
    core = HedgehogCore(1, 2, feature_map="relu")
    q, k, v = -torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1, 2), torch.ones(1, 3, 1, 2)
    assert (core(q, k, v)[0] == 0).all()
    for feature_map in MAPS:
        core = HedgehogCore(1, 2, feature_map=feature_map)
        q.requires_grad_()
        y = core(q, k, v, layout=Layout.left_padded([1], 3))[0]
        assert (y[:, :2] == 0).all()
        assert torch.isfinite(torch.autograd.grad(y.sum(), q)[0]).all()


def test_parameters_of_the_maps():
    layer = Hedgehog(16, num_heads=4, num_kv_heads=2, feature_dim=3, map_bias=True)
    shapes = {name: tuple(p.shape) for name, p in layer.core.named_parameters()}
    assert shapes == {
        "query_map.weight": (4, 4, 3), "query_map.bias": (4, 3), "key_map.weight": (4, 4, 3), "key_map.bias": (4, 3),
    }  # fmt: skip
    tied = Hedgehog(16, num_heads=4, tied=True)
    assert [name for name, _ in tied.core.named_parameters()] == ["query_map.weight"]
    assert tied.core.maps()[0] is tied.core.maps()[1]
    fixed = Hedgehog(16, num_heads=4, feature_map="elu")
    assert not list(fixed.core.parameters())


def test_state_does_not_grow_and_counts_query_heads():
    layer = Hedgehog(16, num_heads=4, num_kv_heads=1)
    matrix, scale, position = 4 * 8 * 5, 4 * 8, 2  # an int64 is two float32
    assert layer.state_bytes(10) == layer.state_bytes(10**6) == 4 * (matrix + scale + position)
    assert Hedgehog(16, num_heads=4, bidirectional=True).state_bytes(10) == 0


def test_flops_count_maps_and_products():
    layer = Hedgehog(16, num_heads=2, feature_dim=3)
    projections, maps, state, chunk = 4 * 2 * 16 * 16, 2 * 4 * 8 * 3, 2 * 4 * 6 * 9, 2 * 64 * (6 + 9)
    assert layer.flops(100) == 100 * (projections + maps + state + chunk)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_heads=3), "d_model=16 is not divisible by num_heads=3"),
        (dict(num_heads=4, num_kv_heads=3), "num_heads=4 is not divisible by num_kv_heads=3"),
        (dict(num_heads=2, feature_map="identity"), "choose normalize=False or another map"),
        (dict(num_heads=2, normalize=False), "needs normalize=True, since its scale cancels in a mean only"),
        (dict(num_heads=2, epsilon=1e-6), "none for the exponential map, whose divisor cannot vanish"),
        (dict(num_heads=2, feature_map="relu", epsilon=0.0), "epsilon is 0.0"),
        (dict(num_heads=2, feature_map="relu", feature_dim=4), "feature_map='relu' has no parameters"),
        (dict(num_heads=2, feature_map="taylor_full"), "has no fused form"),
        (dict(num_heads=2, rotary_fraction=2.0), "rotary_fraction is 2.0"),
        (dict(num_heads=2, rotary_fraction=0.4), "expected an even number"),
        (dict(num_heads=2, rotary_base=0.0), "rotary_base is 0.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        Hedgehog(16, **arguments)


def test_bidirectional_layers_have_no_state():
    layer = Hedgehog(16, num_heads=2, bidirectional=True)
    x, state = torch.randn(1, 3, 16), Hedgehog(16, num_heads=2).init_state(1)
    assert layer.causality == "bidirectional"
    for call in (
        lambda: layer(x, state),
        lambda: layer(x, return_state=True),
        lambda: layer.step(x[:, 0], state),
        lambda: layer.init_state(1),
    ):
        with pytest.raises(ValueError, match="a bidirectional layer cannot"):
            call()


# ---- Based


@pytest.mark.parametrize("decay", ["none", "fixed"])
def test_based_is_its_definition(decay):
    layer = randomised(Based(12, num_heads=3, feature_dim=4, decay=decay))
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    q, k, v = (linear(x).unflatten(-1, (3, 4)).transpose(1, 2) for linear in (layer.q_proj, layer.k_proj, layer.v_proj))
    s = q @ k.transpose(-1, -2) / 2
    weights = (1 + s + s**2 / 2).tril()
    if decay == "fixed":
        distance = (torch.arange(9)[:, None] - torch.arange(9)).clamp_min(0)
        weights = weights * torch.tensor([7 / 8, 15 / 16, 31 / 32], dtype=torch.float64)[:, None, None] ** distance
    y = weights @ v / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(layer(x).y, layer.out_proj(y.transpose(1, 2).flatten(-2)), rtol=1e-10, atol=1e-11)


def test_based_packs_its_state():
    assert Based(64).state_bytes(5) == 4 * 16 * 153 * (4 + 1)
    assert issubclass(Based, LinearAttention)
    with pytest.raises(ValueError, match="decay is 'data_dependent'; expected 'none' or 'fixed'"):
        Based(64, decay="data_dependent")
