"""Feature attention: the definition against explicit sums, the chunked form and steps against the definition."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from feature_attention_cases import Case, call, cast, error, run

import seqmodels
from seqmodels import Layout, backends
from seqmodels.ops.feature_attention import (
    FEATURE_MAPS,
    FeatureState,
    feature_attention,
    feature_attention_step,
    feature_state,
    feature_width,
)
from seqmodels.ops.feature_attention.maps import features
from seqmodels.ops.linear_attention import linear_attention, linear_attention_state

PACKED = Layout.packed([[5, 1, 6], [13]], 13, capacity=6)
DECAYING = [name for name in FEATURE_MAPS if name != "hedgehog_exp"]


def cases(name: str) -> dict[str, Case]:
    plain = Case(name)
    found = {
        "plain": plain,
        "no state": replace(plain, state=False),
        "groups": replace(plain, query_groups=1, key_groups=2, heads=4),
        "one token": replace(plain, length=1),
        "packed": plain.with_layout(PACKED),
    }
    if name != "t2r":
        found["no weights"] = replace(plain, width=None, query_groups=2, key_groups=1, heads=4)
    if name != "hedgehog_exp":
        found["decay, packed"] = replace(plain, decay=True).with_layout(PACKED)
    return found


CASES = {f"{name}, {key}": case for name in FEATURE_MAPS for key, case in cases(name).items()}


def assert_same(found: FeatureState, wanted: FeatureState) -> None:
    torch.testing.assert_close(dict(found.tensors()), dict(wanted.tensors()), rtol=1e-12, atol=1e-12)


def naive(u: torch.Tensor, name: str) -> torch.Tensor:
    return torch.cat([u.exp(), (-u).exp()], dim=-1) if name == "hedgehog_exp" else features(u, name)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_equation(name, backend):
    case = Case(name, query_groups=1, heads=2, decay=name in DECAYING)
    inputs = case.inputs()
    q, k, v, query_weight, key_weight, log_decay, matrix, log_scale = inputs
    phi_q = naive(torch.einsum("blhd,hdf->blhf", q.expand(-1, -1, 2, -1), query_weight), name)
    phi_k = naive(torch.einsum("blhd,hdf->blhf", k, key_weight), name)
    values = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1) if case.normalize else v
    state = matrix if log_scale is None else matrix * log_scale.exp()[..., None]
    rows = []
    for t in range(case.length):
        state = state if log_decay is None else state * log_decay[:, t].exp()[..., None, None]
        state = state + torch.einsum("bhf,bhp->bhfp", phi_k[:, t], values[:, t])
        rows.append(torch.einsum("bhf,bhfp->bhp", phi_q[:, t], state))
    y = torch.stack(rows, dim=1)
    if case.normalize:  # epsilon, beside sums of weights of the order of 1
        y = y[..., :-1] / (y[..., -1:] + (0 if name == "hedgehog_exp" else 1e-6))
    with seqmodels.backend(backend):
        found, final = call(inputs, case, chunk_size=4)
    torch.testing.assert_close(found, y, rtol=1e-12, atol=1e-12)
    absolute = final.matrix if final.log_scale is None else final.matrix * final.log_scale.exp()[..., None]
    torch.testing.assert_close(absolute, state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_chunks_are_the_definition(name):
    case = CASES[name]
    inputs = case.inputs()
    truth, found = run(inputs, case, "reference"), run(inputs, case, "torch", chunk_size=4)
    assert truth.keys() == found.keys()
    for key, value in truth.items():
        assert value.isfinite().all(), key
        assert error(found[key], value) < 1e-12, key


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_gradcheck(name):
    layout = Layout.packed([[2, 1], [2]], 4, capacity=4)
    case = Case(name, query_groups=1, head_dim=2, width=2, value_dim=2, decay=name in DECAYING).with_layout(layout)
    *inputs, log_scale = [None if x is None else x.nan_to_num(0.5) for x in case.inputs()]
    present = [x.requires_grad_() for x in inputs if x is not None]

    def function(*leaves):
        given = iter(leaves)
        y, state = call([*(None if x is None else next(given) for x in inputs), log_scale], case)
        # S alone changes with its scale, which is constant for gradients; S e^m does not.
        return y, state.matrix if log_scale is None else state.matrix * state.log_scale.exp()[..., None]

    with seqmodels.backend("reference"):
        assert torch.autograd.gradcheck(function, present)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_packed_documents_are_alone(name, backend):
    case = Case(name).with_layout(PACKED)
    inputs = case.inputs()
    with seqmodels.backend(backend):
        y, state = call(inputs, case)
        assert (y[~PACKED.valid] == 0).all()
        for slot in range(4):
            row, column = divmod(PACKED.starts[slot].item(), 13)
            tokens = slice(column, column + PACKED.lengths[slot].item())
            alone = [x[row : row + 1, tokens] for x in inputs[:3]] + inputs[3:5] + [None]
            alone += [None if x is None else x[slot : slot + 1] for x in inputs[6:]]
            y_alone, state_alone = call(alone, Case(name))
            torch.testing.assert_close(y[row : row + 1, tokens], y_alone, rtol=1e-12, atol=1e-12)
            assert_same(state.select(torch.tensor([slot])), state_alone)
    for given, found in ((inputs[6], state.matrix), (inputs[7], state.log_scale)):
        assert given is None or torch.equal(found[4:], given[4:])  # unused slots keep their state


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_split_is_whole(name, backend):
    case = Case(name, decay=name in DECAYING)
    *inputs, log_scale = case.inputs()
    present = [x.requires_grad_() for x in inputs if x is not None]

    def split(cut):
        *given, matrix = inputs
        first, state = call([*_cut(given, slice(cut)), matrix, log_scale], case, chunk_size=4)
        second, state = call([*_cut(given, slice(cut, None)), state.matrix, state.log_scale], case, chunk_size=4)
        return torch.cat([first, second], dim=1), state

    with seqmodels.backend(backend):
        whole, state = call([*inputs, log_scale], case, chunk_size=4)
        weights = [torch.randn_like(whole), torch.randn_like(state.matrix)]
        truth = torch.autograd.grad([whole, state.matrix], present, weights)
        for cut in (1, 6):
            parts, last = split(cut)
            found = torch.autograd.grad([parts, last.matrix], present, weights)
            assert_same(last, state)  # the scale too, with no canonical form
            for a, b in zip((whole, *truth), (parts, *found), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def _cut(given, tokens):
    """q, k, v and decay of some tokens; weights as they are."""
    return [x if x is None or index in (3, 4) else x[:, tokens] for index, x in enumerate(given)]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_steps_are_the_whole(name, backend):
    case = Case(name, query_groups=1, heads=2, decay=name in DECAYING, state=False)
    q, k, v, query_weight, key_weight, log_decay, _, _ = inputs = case.inputs()
    with seqmodels.backend(backend):
        y, final = call(inputs, case)
        state = FeatureState.empty(v, case.batch, case.heads, case.width, case.value_dim, name, case.normalize)
        for t in range(case.length):
            decay = None if log_decay is None else log_decay[:, t]
            y_t = feature_attention_step(
                q[:, t], k[:, t], v[:, t], state, query_weight, key_weight, feature_map=name, log_decay=decay,
                normalize=case.normalize,
            )  # fmt: skip
            torch.testing.assert_close(y_t, y[:, t], rtol=1e-12, atol=1e-12)
    assert_same(state, final)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_state_without_queries(name, backend):
    case = Case(name, decay=name in DECAYING).with_layout(PACKED)
    *inputs, log_scale = case.inputs()
    leaves = [x.requires_grad_() for x in (inputs[1], inputs[2], inputs[4], inputs[6])]
    initial = FeatureState(inputs[6], log_scale)
    with seqmodels.backend(backend):
        _, whole = call([*inputs, log_scale], case, chunk_size=4)
        state = feature_state(
            inputs[1], inputs[2], inputs[4], feature_map=name, log_decay=inputs[5], initial_state=initial,
            normalize=case.normalize, layout=PACKED, chunk_size=4,
        )  # fmt: skip
        weight = torch.randn_like(whole.matrix)
        truth = torch.autograd.grad(whole.matrix, leaves, weight)
        found = torch.autograd.grad(state.matrix, leaves, weight)
    assert_same(state, whole)
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("layout", [None, PACKED])
def test_state_of_linear_attention_without_queries(backend, layout):
    generator = torch.Generator().manual_seed(0)
    k, v, past = (torch.randn(2, 13, 2, *width, generator=generator).double() for width in ((5,), (3,), ()))
    log_decay = -past.abs() / 4
    initial = torch.randn(2 if layout is None else 6, 2, 5, 3, generator=generator).double()
    leaves = [x.requires_grad_() for x in (k, v, past, initial)]
    options = dict(past_weight=past, initial_state=initial, layout=layout, chunk_size=4)
    with seqmodels.backend(backend):
        state = linear_attention_state(k, v, log_decay, **options)
        _, truth = linear_attention(k, k, v, log_decay, **options)
    torch.testing.assert_close(state, truth, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(state)
    for a, b in zip(
        torch.autograd.grad(state, leaves, weight), torch.autograd.grad(truth, leaves, weight), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exponentials_that_overflow(dtype, backend):
    case = Case("hedgehog_exp", length=70, head_dim=16, width=16, scale=40.0, state=False)
    inputs = case.inputs(dtype)
    uk = torch.einsum("blhd,hdf->blhf", inputs[1], inputs[4])
    assert uk.abs().max() > math.log(torch.finfo(torch.float32).max)  # e^u is infinite
    truth, found = run(inputs, case, "reference"), run(inputs, case, backend, dtype)
    for key, value in found.items():
        assert value.isfinite().all(), key
        assert truth[key].abs().max() > 0, key
    # Weights are powers of e of sums near 100: rounding u alone moves them by 100 roundings of float32, so
    # that the output moves by at most 2 x 100 (num and divisor) of them, beside the output's own rounding.
    bound = 200 * 2.0**-23 + torch.finfo(dtype).eps
    assert (found["y"] - truth["y"]).abs().max() <= bound * inputs[2].abs().max()


def test_rows_of_attention_weights_are_means():
    for name in ("hedgehog_exp", "hedgehog_split", "hedgehog_joint", "taylor", "elu"):
        case = Case(name, state=False)
        inputs = case.inputs()
        inputs[2] = torch.ones_like(inputs[2])
        y, _ = call(inputs, case)
        torch.testing.assert_close(y, torch.ones_like(y), rtol=0, atol=1e-4)


def test_joint_queries_are_exponential_queries():
    """A positive factor for each query cancels; a factor for each key does not."""
    case = Case("hedgehog_joint", state=False)
    q, k, v, query_weight, key_weight, *_ = case.inputs()
    tiny = 1e-30
    y, _ = feature_attention(q, k, v, query_weight, key_weight, feature_map="hedgehog_joint", epsilon=tiny)
    uq, uk = torch.einsum("blhd,hdf->blhf", q, query_weight), torch.einsum("blhd,hdf->blhf", k, key_weight)
    phi_q, phi_k = naive(uq, "hedgehog_exp"), features(uk, "hedgehog_joint")
    with_exp, _ = linear_attention(phi_q, phi_k, v, normalize=True, epsilon=tiny)
    torch.testing.assert_close(y, with_exp, rtol=1e-12, atol=1e-12)
    other, _ = feature_attention(q, k, v, query_weight, key_weight, feature_map="hedgehog_exp")
    assert (other - y).abs().max() > 1e-3


def test_packed_taylor_is_the_full_expansion():
    q, k = torch.randn(2, 3, 5, 1, 16).double()
    s = (q * k).sum(-1) / 4
    found = (features(q, "taylor") * features(k, "taylor")).sum(-1)
    torch.testing.assert_close(found, 1 + s + s * s / 2, rtol=1e-14, atol=1e-14)
    assert features(q, "taylor").shape[-1] == feature_width("taylor", 16) == 153


@pytest.mark.parametrize(
    ("name", "layout", "backend"),
    [
        ("hedgehog_exp", None, "torch"),
        ("taylor", PACKED, "torch"),
        ("hedgehog_exp", PACKED, "cpu"),
        ("taylor", None, "cpu"),
    ],
)
def test_opcheck(name, layout, backend):
    if backends.missing(backend) is not None:
        pytest.skip(backends.missing(backend))
    case = Case(name, length=13)
    case = case if layout is None else case.with_layout(layout)
    *inputs, log_scale = [None if x is None else x.nan_to_num(0.5) for x in cast(case.inputs(), torch.float32)]
    leaves = [None if x is None else x.requires_grad_() for x in inputs]
    documents = (None, None) if layout is None else (layout.starts, layout.lengths)
    arguments = (*leaves, log_scale, *documents, name, True, 1e-6, 64, backend)
    torch.library.opcheck(torch.ops.seqmodels.feature_attention.default, arguments)
    state_arguments = (leaves[1], leaves[2], leaves[4], None, leaves[6], log_scale, *documents, name, True, 64, backend)
    torch.library.opcheck(torch.ops.seqmodels.feature_state.default, state_arguments)
    if layout is None:
        token = [x.detach()[:, 0] for x in leaves[:3]]
        step = (
            *token,
            leaves[3].detach(),
            leaves[4].detach(),
            None,
            leaves[6].detach(),
            log_scale,
            name,
            True,
            0.0,
            "torch",
        )
        torch.library.opcheck(torch.ops.seqmodels.feature_attention_step.default, step)


def shapes(**changes):
    given = dict(q=(2, 6, 2, 4), k=(2, 6, 2, 4), v=(2, 6, 2, 3)) | changes
    return {name: torch.randn(size) if isinstance(size, tuple) else size for name, size in given.items()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (shapes(feature_map="cosine"), "unknown feature_map 'cosine'; expected one of hedgehog_exp"),
        (shapes(k=(2, 6, 2, 5)), "equal width of q and k"),
        (shapes(k=(2, 6, 3, 4), v=(2, 6, 4, 3)), "do not divide the 4 heads"),
        (shapes(q=(2, 7, 2, 4)), "equal leading sizes"),
        (shapes(q=(2, 0, 2, 4), k=(2, 0, 2, 4), v=(2, 0, 2, 3)), "length 0"),
        (shapes(query_weight=(2, 5, 4)), r"query_weight has shape \(2, 5, 4\); expected \(2, 4, f\)"),
        (shapes(key_weight=(2, 4, 7)), "queries are mapped to width 4 and keys to 7"),
        (shapes(feature_map="t2r"), "'t2r' is relu"),
        (shapes(feature_map="identity"), "does not keep positive"),
        (shapes(feature_map="hedgehog_exp", log_decay=(2, 6, 2)), "has no decay"),
        (shapes(feature_map="hedgehog_exp", normalize=False), "needs normalize=True"),
        (shapes(log_decay=(2, 6)), r"log_decay has shape \(2, 6\); expected \(2, 6, 2\)"),
        (shapes(epsilon=-1.0), "epsilon is -1.0"),
        (shapes(feature_map="hedgehog_exp", epsilon=-1.0), "epsilon is -1.0"),
        (shapes(q=(2, 6, 2, 0), k=(2, 6, 2, 0)), "widths of at least 1"),
        (shapes(v=(2, 6, 2, 0)), "widths of at least 1"),
        (shapes(query_weight=(2, 4, 0), key_weight=(2, 4, 0)), "f at least 1"),
        (shapes(chunk_size=0), "chunk_size is 0"),
        (shapes(layout=PACKED), "layout is for a grid"),
        (shapes(initial_state=FeatureState(torch.zeros(2, 2, 4, 4), None)), r"expected \(2, 2, 15, 4\)"),
        (shapes(initial_state=FeatureState(torch.zeros(2, 2, 15, 4), torch.zeros(1))), "log_scale is given"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        feature_attention(**{"feature_map": "taylor", **arguments})


def test_bad_dtypes():
    given = shapes()
    with pytest.raises(TypeError, match="one floating-point dtype"):
        feature_attention(given["q"].double(), given["k"], given["v"], feature_map="taylor")


def test_step_refuses_a_state_it_cannot_update():
    token = [x[:, 0] for x in shapes().values()]
    state = FeatureState(torch.zeros(2, 2, 4, 4).transpose(2, 3), None)
    with pytest.raises(ValueError, match="not contiguous"):
        feature_attention_step(*token, state, feature_map="elu")
    for wrong, message in ((state.matrix, "is a Tensor; expected a FeatureState"), (None, "state is None")):
        with pytest.raises(TypeError, match=message):
            feature_attention_step(*token, wrong, feature_map="elu")
    q, k, v = token
    empty = FeatureState(torch.zeros(2, 2, 0, 4), None)
    with pytest.raises(ValueError, match="widths of at least 1"):  # the C++ step divides by the state's size
        feature_attention_step(q[..., :0], k[..., :0], v, empty, feature_map="elu")


def test_a_wrong_weight_is_caught():
    case = Case("hedgehog_split")
    inputs = case.inputs()
    truth = run(inputs, case, "reference")
    inputs[4][1, 2, 3] *= 1 + 1e-9
    assert error(run(inputs, case, "torch")["y"], truth["y"]) > 1e-12
