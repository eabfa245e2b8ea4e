"""Feature maps: what each of them is, by identities that need no layer; and the fused op's idea of them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from seqmodels.mixers.feature_maps import FEATURE_MAPS, LearnedMap, fused, make_feature_map, paired_features
from seqmodels.ops.feature_attention import feature_attention

HEADS, WIDTH = 2, 6
LEARNED = [name for name in FEATURE_MAPS.shipped() if issubclass(FEATURE_MAPS[name], LearnedMap)]
FUSED = [name for name in FEATURE_MAPS.shipped() if FEATURE_MAPS[name].op is not None]


def tokens(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, HEADS, WIDTH, dtype=torch.float64)


def random_pair(name: str, **options) -> tuple[nn.Module, nn.Module]:
    """Two maps in float64 whose parameters are nothing in particular."""
    pair = tuple(make_feature_map("test", name, HEADS, WIDTH, **options).double() for _ in range(2))
    with torch.no_grad():
        for parameter in (*pair[0].parameters(), *pair[1].parameters()):
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return pair


def normalised(products: torch.Tensor) -> torch.Tensor:
    return products / products.sum(-1, keepdim=True)


def products(query_map, key_map, q, k):
    return torch.einsum("ihf,jhf->hij", query_map(q), key_map(k))


def test_exponential_map_is_a_sum_of_cosh():
    query_map, key_map = random_pair("hedgehog_exp", bias=True)
    q, k = tokens(5), tokens(7)
    uq, uk = query_map.project(q), key_map.project(k)
    cosh = 2 * torch.cosh(uq[:, None] + uk[None]).sum(-1).permute(2, 0, 1)
    torch.testing.assert_close(products(query_map, key_map, q, k), cosh, rtol=1e-12, atol=0)


def test_exponential_map_for_small_features_is_monotone_in_the_dot_product():
    """2 f + |uq|^2 + |uk|^2 + 2 uq.uk + O(u^4): 2 cosh(x) is 2 + x^2 to x^4 / 12 (1 + x^2 / 29 at x < 1)."""
    make = FEATURE_MAPS["hedgehog_exp"](HEADS, WIDTH).double()
    q, k = tokens(5, scale=0.02), tokens(7, scale=0.02)
    dots = torch.einsum("ihf,jhf->hij", q, k)
    squares = q.square().sum(-1).T[:, :, None] + k.square().sum(-1).T[:, None]
    sums = (q[:, None] + k[None]).abs().amax()
    expected = 2 * WIDTH + squares + 2 * dots
    torch.testing.assert_close(products(make, make, q, k), expected, rtol=0, atol=float(WIDTH * sums**4 / 11))


def test_which_scales_cancel():
    """A factor for each query cancels in the normalised weights, one for each key does not."""
    exponential, joint, split = (
        FEATURE_MAPS[name](HEADS, WIDTH).double() for name in ("hedgehog_exp", "hedgehog_joint", "hedgehog_split")
    )
    q, k = tokens(5), tokens(7)
    base = normalised(products(exponential, exponential, q, k))
    torch.testing.assert_close(normalised(products(joint, exponential, q, k)), base, rtol=1e-12, atol=0)
    for queries, keys in ((split, exponential), (exponential, joint), (exponential, split)):
        assert (normalised(products(queries, keys, q, k)) - base).abs().max() > 0.01


def test_one_dimension_rises_beyond_the_mirrored_query():
    """With uq = c > 0 the weight rises with uk only for uk > -c."""
    make = FEATURE_MAPS["hedgehog_exp"](1, 1).double()
    uk = torch.linspace(-3, 3, 121, dtype=torch.float64)
    weight = make(torch.full((1, 1, 1), 0.75, dtype=torch.float64)).flatten() @ make(uk.view(-1, 1, 1)).squeeze(1).T
    slope = weight.diff()
    middle = (uk[1:] + uk[:-1]) / 2
    assert ((slope > 0) == (middle > -0.75)).all()


def test_full_and_packed_taylor_have_the_same_products():
    packed, full = (FEATURE_MAPS[name](HEADS, 16) for name in ("taylor", "taylor_full"))
    q, k = torch.randn(2, 3, 5, HEADS, 16, dtype=torch.float64).unbind(0)
    assert (packed.output_dim, full.output_dim) == (153, 273)
    assert full(q).shape[-1] == 273
    pair = [(one(q) * one(k)).sum(-1) for one in (packed, full)]
    torch.testing.assert_close(*pair, rtol=1e-13, atol=1e-13)


def test_doubled_joint_is_joint_of_twice_the_weight():
    doubled, _ = random_pair("hedgehog_joint_doubled", bias=True)
    joint = make_feature_map("test", "hedgehog_joint", HEADS, WIDTH, bias=True).double()
    with torch.no_grad():
        joint.weight.copy_(2 * doubled.weight)
        joint.bias.copy_(2 * doubled.bias)
    x = tokens(3, 4)
    torch.testing.assert_close(doubled(x), joint(x), rtol=1e-13, atol=0)


def test_t2r_is_relu_of_a_linear_map_for_each_head():
    made, _ = random_pair("t2r", bias=True, feature_dim=4)
    x = tokens(3, 5)
    for head in range(HEADS):
        expected = (x[..., head, :] @ made.weight[head] + made.bias[head]).relu()
        torch.testing.assert_close(made(x)[..., head, :], expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", ["hedgehog_split", "hedgehog_joint"])
def test_softmax_maps_sum_to_their_number_of_softmaxes(name):
    made, _ = random_pair(name)
    total = {"hedgehog_split": 2.0, "hedgehog_joint": 1.0}[name]
    torch.testing.assert_close(made(tokens(9, scale=30.0)).sum(-1), torch.full((9, HEADS), total).double())


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("options", [{}, dict(feature_dim=3, bias=True), dict(init="kaiming", shared=True)])
def test_parameters(name, options):
    made = make_feature_map("test", name, HEADS, WIDTH, **options)
    width, heads = options.get("feature_dim", WIDTH), 1 if options.get("shared") else HEADS
    shapes = {key: tuple(value.shape) for key, value in made.state_dict().items()}
    expected = {"weight": (heads, WIDTH, width), **({"bias": (heads, width)} if options.get("bias") else {})}
    assert shapes == expected
    if options.get("init") == "kaiming":
        # uniform with variance 2 / width: 36 draws, and the bound is 1 where their root mean square is sqrt(1/3)
        assert 0 < made.weight.abs().max() <= (6 / WIDTH) ** 0.5
    else:
        assert torch.equal(made.weight, torch.eye(WIDTH, width).expand(HEADS, -1, -1))
    assert made(torch.randn(4, HEADS, WIDTH)).shape == (4, HEADS, made.output_dim)
    with torch.device("meta"):
        empty = make_feature_map("test", name, HEADS, WIDTH, **options)
    empty.to_empty(device="cpu").reset_parameters()
    assert all(torch.isfinite(p).all() for p in empty.parameters())
    twin = copy.deepcopy(made)
    assert twin.weight.data_ptr() != made.weight.data_ptr()
    assert torch.equal(twin.weight, made.weight)


@pytest.mark.parametrize("name", FEATURE_MAPS.shipped())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(name, dtype):
    """Entries up to 15, whose exponentials float16 does not hold, and whose softmax has weights down to e^-30."""
    made = make_feature_map("test", name, HEADS, WIDTH).to(dtype)
    x = torch.linspace(-15, 15, 4 * HEADS * WIDTH).view(4, HEADS, WIDTH).to(dtype)
    with torch.autocast("cpu", dtype=dtype):
        found = made(x)
    expected = copy.deepcopy(made).double()(x.double())
    assert found.dtype == (torch.float32 if name in LEARNED else dtype)
    # float32 arithmetic on exponents up to 15: a relative error of 15 eps; then the rounding to the dtype returned
    tolerance = 64 * torch.finfo(torch.float32).eps + (0 if name in LEARNED else torch.finfo(dtype).eps)
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    if name in LEARNED and name != "t2r":
        assert (found > 0).all()  # no feature is clamped or lost


def test_paired_features_are_finite_where_features_are_not_and_equal_where_they_are():
    query_map, key_map = random_pair("hedgehog_exp")
    q, k = tokens(2, 5), tokens(2, 7)
    plain = normalised(torch.einsum("bihf,bjhf->bhij", query_map(q), key_map(k)))
    stable = normalised(torch.einsum("bihf,bjhf->bhij", *paired_features(query_map, key_map, q, k)))
    torch.testing.assert_close(stable, plain, rtol=1e-12, atol=0)
    valid = torch.tensor([[True] * 7, [False] * 3 + [True] * 4])
    huge = torch.where(valid[..., None, None], 40 * k, 1e4 * k).float()
    phi_q, phi_k = paired_features(query_map.float(), key_map.float(), 40 * q.float(), huge, valid)
    weights = normalised(torch.einsum("bihf,bjhf->bhij", phi_q, phi_k))
    assert torch.isfinite(weights).all()
    assert (weights[1, :, :, :3] == 0).all()
    alone = paired_features(query_map, key_map, 40 * q[1:].float(), huge[1:, 3:])
    torch.testing.assert_close(weights[1:, :, :, 3:], normalised(torch.einsum("bihf,bjhf->bhij", *alone)))


@pytest.mark.parametrize("name", FUSED)
def test_fused_map_is_the_module(name):
    """Outputs of the fused op, and gradients to q, k and the maps' parameters, are those of the module's features."""
    options = dict(bias=True, feature_dim=4) if name in LEARNED else {}
    pair = random_pair(name, **options)
    q, k, v = (tokens(2, 9).requires_grad_() for _ in range(3))
    normalize = pair[0].nonnegative
    y, _ = _attend(pair, q, k, v, normalize)
    weights = torch.einsum("bihf,bjhf->bhij", *paired_features(*pair, q, k) if normalize else (pair[0](q), pair[1](k)))
    weights = weights.tril()
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + pair[0].epsilon)
    expected = torch.einsum("bhij,bjhp->bihp", weights, v)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    leaves = [q, k, v, *pair[0].parameters(), *pair[1].parameters()]
    cotangent = torch.randn_like(y)
    found, wanted = (torch.autograd.grad((out * cotangent).sum(), leaves) for out in (y, expected))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def _attend(pair, q, k, v, normalize):
    q, k, maps = fused(*pair, q, k)
    epsilon = None if maps["feature_map"] == "hedgehog_exp" else pair[0].epsilon
    return feature_attention(q, k, v, normalize=normalize, epsilon=epsilon, **maps)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hedgehog_exp", dict(feature_dim=7), "the identity of width 6 has no 7 columns"),
        ("hedgehog_exp", dict(feature_dim=0), "feature_dim is 0"),
        ("t2r", dict(init="ones"), "init is 'ones'; expected 'identity' or 'kaiming'"),
        ("elu", dict(feature_dim=3), "feature_dim=3 is for learned maps; feature_map='elu' has no parameters"),
        ("relu", dict(bias=True), "bias=True is for learned maps"),
        ("hedgehog", {}, "unknown feature map 'hedgehog'"),
    ],
)
def test_bad_arguments(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_feature_map("test", name, HEADS, WIDTH, **options)


def test_keys_of_fewer_heads_are_refused_by_the_module():
    with pytest.raises(ValueError, match=r"expected \(..., 2, 6\).*grouped keys are repeated"):
        FEATURE_MAPS["hedgehog_exp"](HEADS, WIDTH)(torch.randn(1, 3, 1, WIDTH))


def test_kaiming_variance_is_that_of_one_head():
    torch.manual_seed(0)
    weight = FEATURE_MAPS["t2r"](4, 64, init="kaiming").weight.detach()  # 16,384 draws: the variance is known to 1 %
    assert 0.95 < float(weight.var()) / (2 / 64) < 1.05
    assert float(weight.abs().max()) <= (6 / 64) ** 0.5
