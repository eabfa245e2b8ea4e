"""The C++ kernels of feature attention against float64, at every instruction set."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from feature_attention_cases import NAMES, Case, call, cast, error, run
from two_times_rule import check_against

import seqmodels
from seqmodels import Layout
from seqmodels.ops import extension
from seqmodels.ops.feature_attention import FEATURE_MAPS, FeatureState, feature_attention, feature_attention_step
from seqmodels.ops.feature_attention.maps import features, project
from seqmodels.ops.linear_attention import linear_attention

pytestmark = pytest.mark.skipif(extension.load() is not None, reason=str(extension.load()))
PACKED = Layout.packed([[65, 1, 20], [64, 23], [87]], 90, capacity=7)
LEFT_PADDED = Layout.left_padded([9, 70], 70)  # no padding behind the last document
LEVELS = ("default", "avx2", "avx512")
DECAYING = [name for name in FEATURE_MAPS if name != "hedgehog_exp"]


def cases(name: str) -> dict[str, Case]:
    plain = Case(name, length=70, width=6)
    found = {
        "plain": plain,
        "groups, packed": replace(plain, query_groups=1, key_groups=2, heads=4, state=False).with_layout(PACKED),
        "whole vectors": Case(name, batch=1, length=130, head_dim=32, width=16, value_dim=16),
        "one token": replace(plain, length=1),
    }
    if name != "t2r":
        found["no weights"] = replace(plain, width=None, query_groups=2, key_groups=1, heads=4)
        found["blocks of heads"] = Case(
            name, width=None, query_groups=1, key_groups=16, heads=16, length=67, head_dim=9
        )
    if name in DECAYING:
        found["decay, packed"] = replace(plain, decay=True).with_layout(PACKED)
    else:
        found["far keys"] = replace(plain, head_dim=16, width=16, scale=40.0)
        found["far keys, packed"] = replace(plain, scale=60.0).with_layout(PACKED)
    return found


CASES = {f"{name}, {key}": case for name in FEATURE_MAPS for key, case in cases(name).items()}


def at_level(level: str):
    """The kernels at one instruction set; skips where the machine lacks it."""
    try:
        with extension.capability(level):
            pass
    except RuntimeError as reason:
        pytest.skip(str(reason))
    return extension.capability(level)


@pytest.fixture(scope="module")
def judged():
    """Inputs of a case, the float64 truth, and a plain form's float32: made once for all levels.

    The chunked form is the definition to 1e-12 (test_feature_attention) and far faster; but it computes
    hedgehog_exp in float64 whatever the dtype, so there the definition is the plain form.
    """
    made = {}

    def of(name: str):
        if name not in made:
            case = CASES[name]
            inputs, plain = case.inputs(torch.float32), "torch" if case.feature_map in DECAYING else "reference"
            made[name] = inputs, run(inputs, case, "torch"), run(inputs, case, plain, torch.float32)
        return made[name]

    return of


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", CASES)
def test_within_twice_the_error_of_a_plain_form(name, level, judged):
    inputs, exact, low = judged(name)
    with at_level(level):
        check_against(run(inputs, CASES[name], "cpu", torch.float32), low, exact, name)


def gradients_through_a_rounded_mean(inputs, case: Case) -> dict[str, torch.Tensor]:
    """The gradients in float64, when the only rounding is that of the kept y.

    The divisor's gradient is -dY . y / divisor with y as it was handed out, in bfloat16; that rounding is the
    op's own (its memory is half of a float32 copy's), so it belongs to the bound.
    """
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs[:7]]
    q, k, v, query_weight, key_weight, log_decay, matrix = leaves
    with seqmodels.backend("torch"):
        wide = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
        sums, state = feature_attention(
            q, k, wide, query_weight, key_weight, feature_map=case.feature_map, log_decay=log_decay,
            initial_state=FeatureState(matrix, None), normalize=False,
        )  # fmt: skip
    divisor = sums[..., -1:].detach() + 1e-6
    y = (sums[..., :-1].detach() / divisor).bfloat16().double()
    generator = torch.Generator().manual_seed(1)
    grad_y, grad_state = (torch.randn(x.shape, generator=generator).bfloat16().double() for x in (y, state.matrix))
    grad_sums = torch.cat([grad_y / divisor, -(grad_y * y).sum(-1, keepdim=True) / divisor], dim=-1)
    present = [x for x in leaves if x is not None]
    found = iter(torch.autograd.grad([sums, state.matrix], present, [grad_sums, grad_state]))
    return {f"d {name}": next(found) for name, x in zip(NAMES[:7], leaves, strict=True) if x is not None}


@pytest.mark.parametrize("name", [name for name in FEATURE_MAPS if name not in ("hedgehog_exp", "identity")])
def test_bfloat16(name):
    case = Case(name, length=70, query_groups=1, key_groups=2, heads=4, width=6)
    inputs = case.inputs(torch.bfloat16)
    exact, low, found = (
        run(inputs, case, backend, dtype)
        for backend, dtype in (("torch", torch.float64), ("torch", torch.bfloat16), ("cpu", torch.bfloat16))
    )
    kept = gradients_through_a_rounded_mean(inputs, case)
    for key, value in exact.items():
        bound = 2 * error(low[key], value) + 2.0**-23
        if key in kept:
            bound += 2 * error(kept[key], value)
        assert error(found[key], value) <= bound, key


@pytest.mark.parametrize("name", ["hedgehog_exp", "identity"])
def test_bfloat16_rounds_results_once(name):
    """Sums are float32: what bfloat16 changes is v, y (which the normaliser's gradient reads) and the results."""
    case = Case(name, length=70, query_groups=1, key_groups=2, heads=4, width=6, state=False)
    inputs = case.inputs(torch.bfloat16)
    exact, found = run(inputs, case, "torch"), run(inputs, case, "cpu", torch.bfloat16)
    for key, value in exact.items():
        # 2^-9 each for the result, and for y inside dY . (v - y), whose terms are as large as their sum or larger.
        assert error(found[key], value) <= 4 * 2.0**-9, key


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_steps(name, dtype, level):
    case = Case(name, query_groups=1, heads=4, head_dim=20, width=17, value_dim=33, decay=name in DECAYING)
    inputs = case.inputs(dtype)

    def steps(backend, dtype):
        q, k, v, query_weight, key_weight, decay, matrix, scale = cast(inputs, dtype)
        state, rows = FeatureState(matrix.clone(), None if scale is None else scale.clone()), []
        with seqmodels.backend(backend):
            for t in range(3):
                now = None if decay is None else decay[:, t]
                rows.append(
                    feature_attention_step(
                        q[:, t], k[:, t], v[:, t], state, query_weight, key_weight, feature_map=name, log_decay=now,
                        normalize=case.normalize,
                    )
                )  # fmt: skip
        return {"y": torch.stack(rows).double(), **{key: x.double() for key, x in state.tensors()}}

    exact, low = steps("reference", torch.float64), steps("reference", dtype)
    with at_level(level):
        check_against(steps("cpu", dtype), low, exact, name)


@pytest.mark.parametrize("name", ["hedgehog_exp", "hedgehog_split", "taylor"])
def test_steps_end_where_the_sequence_ends(name):
    case = Case(name, length=70, state=False)
    q, k, v, query_weight, key_weight, *_ = inputs = cast(case.inputs(torch.float32), torch.float32)
    state = FeatureState.empty(v, case.batch, case.heads, case.width, case.value_dim, name)
    with seqmodels.backend("cpu"):
        y, final = call(inputs, case)
        for t in range(case.length):
            y_t = feature_attention_step(q[:, t], k[:, t], v[:, t], state, query_weight, key_weight, feature_map=name)
            torch.testing.assert_close(y_t, y[:, t])
    torch.testing.assert_close(dict(state.tensors()), dict(final.tensors()))
    if state.log_scale is not None:
        assert torch.equal(state.log_scale, final.log_scale)  # a maximum rounds nothing


@pytest.mark.parametrize("name", ["hedgehog_exp", "hedgehog_joint", "taylor"])
def test_the_same_bits_for_any_number_of_threads(name):
    case = Case(name, length=67, width=None, query_groups=1, key_groups=2, heads=4, head_dim=8)
    inputs, before = case.inputs(torch.float32), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run(inputs, case, "cpu", torch.float32))
    finally:
        torch.set_num_threads(before)
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


@pytest.fixture
def unwritten_is_nan():
    """torch fills new memory with NaN: an element that nobody writes cannot be zero by luck."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.usefixtures("unwritten_is_nan")
@pytest.mark.parametrize("layout", [PACKED, LEFT_PADDED], ids=["packed", "left_padded"])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_padding_gets_no_gradient_and_no_output(name, layout):
    case = Case(name, decay=name in DECAYING).with_layout(layout)
    result = run(case.inputs(torch.float32), case, "cpu", torch.float32)
    for key, value in result.items():
        assert value.isfinite().all(), key
    for key in ("y", "d q", "d k", "d v", *(["d log_decay"] if case.decay else [])):
        assert (result[key][~layout.valid] == 0).all(), key


def test_later_tokens_change_no_earlier_output():
    """hedgehog_exp's scale holds later keys of a chunk: they cancel, however large."""
    case = Case("hedgehog_exp", length=100, head_dim=16, width=16, state=False)
    inputs = cast(case.inputs(torch.float32), torch.float32)
    changed = [None if x is None else x.clone() for x in inputs]
    changed[1][:, 71:] *= 100
    with seqmodels.backend("cpu"):
        y, louder = call(inputs, case)[0], call(changed, case)[0]
    # Each weight is e^x with |x| <= 20 here, and x is rounded relative to the scale, of which the larger is 1e3.
    assert (louder[:, :71] - y[:, :71]).abs().max() <= 4 * 1e3 * 2.0**-23 * inputs[2].abs().max()
    assert louder.isfinite().all()


@pytest.mark.parametrize("name", ["hedgehog_split", "hedgehog_joint", "taylor", "elu", "t2r"])
def test_fused_is_unfused(name):
    """The same kernels with features in memory, gradients of the maps included: the same sums of the same float32
    features, in another order only where the fused kernel has a shorter way (Taylor's scores)."""
    case = Case(name, length=100, head_dim=16, width=16, state=False)
    inputs = cast(case.inputs(torch.float32), torch.float32)
    fused, unfused = ([x.clone().requires_grad_() for x in inputs[:5]] for _ in range(2))
    with seqmodels.backend("cpu"):
        y, _ = feature_attention(*fused, feature_map=name)
        q, k, v, query_weight, key_weight = unfused
        phi_q, phi_k = (features(project(x, w), name) for x, w in ((q, query_weight), (k, key_weight)))
        other, _ = linear_attention(phi_q, phi_k, v, normalize=True)
        weight = torch.randn_like(y)
        found, wanted = torch.autograd.grad(y, fused, weight), torch.autograd.grad(other, unfused, weight)
    exact = run(case.inputs(torch.float32), case, "torch")
    assert error(y, other) <= 100 * 2.0**-24 * 2  # two sums of at most 100 rounded terms
    for a, b in zip(found, wanted, strict=True):
        assert error(a, b) <= 100 * 2.0**-24 * 8  # chains of up to four such sums in each
    assert error(y.double(), exact["y"]) <= 100 * 2.0**-24


def test_the_bound_catches_a_wrong_weight():
    case = CASES["hedgehog_split, plain"]
    inputs = case.inputs(torch.float32)
    exact, low = run(inputs, case, "torch"), run(inputs, case, "reference", torch.float32)
    inputs[4][1, 2, 3] *= 1 + 1e-3
    with pytest.raises(AssertionError, match="bound"):
        check_against(run(inputs, case, "cpu", torch.float32), low, exact, "wrong")
