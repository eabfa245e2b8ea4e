"""The C++ kernels of linear attention against float64, at every instruction set."""

from __future__ import annotations

import pytest
import torch
from linear_attention_cases import NAMES, Case, call, cast, check, error, run_on

import seqmodels
from seqmodels import Layout
from seqmodels.ops import extension
from seqmodels.ops.linear_attention import linear_attention_step

pytestmark = pytest.mark.skipif(extension.load() is not None, reason=str(extension.load()))
PACKED = Layout.packed([[65, 1, 20], [64, 23], [87]], 90, capacity=7)
CASES = {
    "plain": Case(length=130, absent=NAMES[3:]),
    "all": Case(length=70, key_dim=20, value_dim=33),
    "one token": Case(length=1, key_dim=16, value_dim=16),
    "whole tiles": Case(batch=1, length=128, key_dim=64, value_dim=32, absent=("past_weight", "diagonal_weight")),
    "normalised": Case(length=130, key_dim=20, value_dim=16, normalize=True),
    "normalised ranks": Case(length=40, ranks=2, key_dim=18, value_dim=7, normalize=True, absent=("initial_state",)),
    "three ranks": Case(length=50, ranks=3, key_groups=1, absent=("log_decay",)),
    "many ranks": Case(length=9, ranks=20, key_dim=16),
    "blocks of heads": Case(length=67, query_groups=1, key_groups=2, heads=24, key_dim=16, value_dim=4),
    "odd groups": Case(length=67, query_groups=4, key_groups=6, heads=12, absent=("past_weight",)),
    "seventeen heads": Case(length=20, query_groups=1, key_groups=17, heads=17),
    "packed": Case(ranks=2, key_dim=16, value_dim=8).with_layout(PACKED),
    "packed, normalised": Case(normalize=True, key_groups=1, absent=("initial_state",)).with_layout(PACKED),
    "left padded": Case(absent=NAMES[4:]).with_layout(Layout.left_padded([3, 80, 1])),
}
LEVELS = ("default", "avx2", "avx512")


def at_level(level: str):
    """The kernels at one instruction set; skips where the machine lacks it."""
    try:
        with extension.capability(level):
            pass
    except RuntimeError as reason:
        pytest.skip(str(reason))
    return extension.capability(level)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", CASES)
def test_within_twice_the_error_of_the_chunked_form(name, level, dtype):
    with at_level(level):
        check(CASES[name], "cpu", dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "case",
    [
        Case(absent=NAMES[3:6], key_dim=9, value_dim=70),
        Case(key_dim=16, value_dim=64, normalize=True, query_groups=1, key_groups=2, heads=4),
        *(Case(ranks=ranks, key_dim=7, value_dim=37) for ranks in (2, 3, 4, 6)),
    ],
    ids=lambda case: f"{case.ranks} ranks" if isinstance(case, Case) else None,
)
def test_step(case, level, dtype):
    inputs = case.inputs(dtype)

    def step(backend, dtype):
        given = cast(inputs, dtype)
        state = given[6].clone()
        token = [None if x is None else x[:, 0] for x in given[:6]]
        with seqmodels.backend(backend):
            y = linear_attention_step(
                *token[:4], state, past_weight=token[4], diagonal_weight=token[5], normalize=case.normalize
            )
        return y.double(), state.double()

    with at_level(level):
        results = zip(step("reference", torch.float64), step("torch", dtype), step("cpu", dtype), strict=True)
        for truth, plain, found in results:
            assert error(found, truth) <= 2 * error(plain, truth) + 2.0**-23


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["blocks of heads", "normalised", "packed"])
def test_the_same_bits_for_any_number_of_threads(name, dtype):
    # 1 thread walks the chunks, 3 threads take the states first and then all chunks at once.
    case = CASES[name]
    inputs = case.inputs(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(run_on(inputs, case, "cpu", dtype))
    finally:
        torch.set_num_threads(before)
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


def test_packed_documents_are_alone_to_the_bit():
    case = Case(key_dim=16, value_dim=8).with_layout(PACKED)
    inputs = cast(case.inputs(torch.float32), torch.float32)
    with seqmodels.backend("cpu"):
        y, state = call(inputs, case)
        assert (y[~PACKED.valid] == 0).all()
        assert torch.equal(state[6], inputs[6][6])
        for slot in range(6):
            row, column = divmod(PACKED.starts[slot].item(), PACKED.length)
            tokens = slice(column, column + PACKED.lengths[slot].item())
            alone = [x[row : row + 1, tokens] for x in inputs[:6]] + [inputs[6][slot : slot + 1]]
            y_alone, state_alone = call(alone, Case())
            assert torch.equal(y[row : row + 1, tokens], y_alone)
            assert torch.equal(state[slot : slot + 1], state_alone)


def test_padding_gets_no_gradient():
    case = Case(key_dim=16).with_layout(PACKED)
    result = run_on(case.inputs(torch.float32), case, "cpu", torch.float32)
    for name in NAMES[:6]:
        gradient = result[f"d {name}"]
        assert gradient.isfinite().all(), name
        assert (gradient[~PACKED.valid] == 0).all(), name


@pytest.mark.parametrize("reset", [-1e4, -float("inf")])
def test_strong_decays_cost_no_precision(reset):
    case = Case(batch=1, length=200)
    inputs = case.inputs(torch.float32)
    inputs[3] = torch.where(torch.rand(1, 200, 2) < 0.1, reset, -1e-3).float().double()
    truth, plain, found = (
        run_on(inputs, case, backend, dtype)
        for backend, dtype in (("reference", torch.float64), ("torch", torch.float32), ("cpu", torch.float32))
    )
    for key, value in truth.items():
        assert error(found[key], value) <= 2 * error(plain[key], value) + 2.0**-23, key


def test_later_tokens_change_no_earlier_bit():
    case = Case(length=100, key_dim=16)
    inputs = cast(case.inputs(torch.float32), torch.float32)
    changed = [x.clone() for x in inputs]
    for tensor in changed[:6]:
        tensor[:, 71:] += 1
    changed[3].clamp_max_(0)
    with seqmodels.backend("cpu"):
        assert torch.equal(call(inputs, case)[0][:, :71], call(changed, case)[0][:, :71])


def test_the_bound_catches_a_wrong_weight():
    case = CASES["all"]
    inputs = case.inputs(torch.float32)
    truth = run_on(inputs, case, "torch", torch.float64)
    chunked = run_on(inputs, case, "torch", torch.float32)
    inputs[4][0, 5, 1] *= 1 + 1e-3
    found = run_on(inputs, case, "cpu", torch.float32)
    assert error(found["y"], truth["y"]) > 2 * error(chunked["y"], truth["y"]) + 2.0**-23


@pytest.mark.skipif(extension.missing_cpu() is not None, reason="the C++ extension is not built")
@pytest.mark.parametrize("shape", [(1, 3, 0, 2, 4), (1, 3, 1, 2, 0), (1, 3, 1, 0, 4)])
def test_empty_axes_are_refused_below_the_public_function_too(shape):
    """Sizes are divided by: an axis of 0 ended the process."""
    extension.load()
    q = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=r"ranks|at least 1|groups"):
        torch.ops.seqmodels_cpu.linear_attention(q, q, q, None, None, None, None, None, None, False, 0.0)
