"""Linear attention: the definition against its equation, the chunked form against the definition."""

from __future__ import annotations

import pytest
import torch
from linear_attention_cases import NAMES, Case, call, error, run

import seqmodels
from seqmodels import Layout
from seqmodels.ops.linear_attention import linear_attention, linear_attention_step

PACKED = Layout.packed([[5, 1, 6], [13]], 13, capacity=6)
CASES = {
    "plain": Case(absent=NAMES[3:]),
    "all": Case(),
    "decay": Case(absent=("past_weight", "diagonal_weight", "initial_state")),
    "past": Case(absent=("log_decay", "diagonal_weight")),
    "diagonal": Case(absent=("log_decay", "past_weight", "initial_state")),
    "ranks": Case(ranks=3, length=11),
    "query groups": Case(query_groups=1, key_groups=4, heads=4),
    "key groups": Case(query_groups=4, key_groups=2, heads=8),
    "odd groups": Case(query_groups=2, key_groups=3, heads=6, ranks=2),
    "normalised": Case(normalize=True, ranks=2),
    "normalised, no state": Case(normalize=True, absent=("initial_state", "past_weight")),
    "one token": Case(length=1),
    "packed": Case(ranks=2).with_layout(PACKED),
    "packed, normalised": Case(normalize=True, absent=("initial_state",)).with_layout(PACKED),
    "packed, no decay": Case(absent=("log_decay", "past_weight", "diagonal_weight")).with_layout(PACKED),
    "left padded": Case(key_groups=1).with_layout(Layout.left_padded([3, 9, 1])),
}


def equation(case: Case) -> torch.Tensor:
    """The double sum over i and j as it stands in the op's docstring, for one document a row."""
    q, k, v, log_decay, past, diagonal, state = case.inputs()
    q, k = (x.repeat_interleave(case.heads // x.shape[3], dim=3) for x in (q, k))
    rows = []
    for i in range(case.length):
        total = torch.einsum("brhn,bhnp->brhp", q[:, i], state) * log_decay[:, : i + 1].sum(1).exp()[:, None, :, None]
        for j in range(i + 1):
            decay = log_decay[:, j + 1 : i + 1].sum(1).exp() * (past[:, j] if j < i else 1)
            weight = diagonal[:, i] if j == i else decay
            scores = torch.einsum("brhn,bshn->brsh", q[:, i], k[:, j]) * weight[:, None, None]
            total = total + torch.einsum("brsh,bshp->brhp", scores, v[:, j])
        rows.append(total)
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equation(backend):
    case = Case(length=9, ranks=2, query_groups=1, key_groups=2, heads=4)
    with seqmodels.backend(backend):
        y, _ = call(case.inputs(), case)
    torch.testing.assert_close(y, equation(case), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_size", [1, 4, 12, 64])
@pytest.mark.parametrize("name", CASES)
def test_chunks_are_the_recurrence(name, chunk_size):
    case = CASES[name]
    truth, found = run(case, "reference"), run(case, "torch", chunk_size=chunk_size)
    for key, value in truth.items():
        assert value.isfinite().all(), key
        assert error(found[key], value) < 1e-12, key


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("layout", [None, Layout.packed([[2, 1], [2]], 4, capacity=4)])
def test_gradcheck(backend, normalize, layout):
    case = Case(length=4, ranks=2, query_groups=1, key_dim=2, value_dim=2, normalize=normalize)
    case = case if layout is None else case.with_layout(layout)
    leaves = [x.nan_to_num(0.5).requires_grad_() for x in case.inputs()]
    with seqmodels.backend(backend):
        assert torch.autograd.gradcheck(lambda *inputs: call(list(inputs), case, chunk_size=6), leaves)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_packed_documents_are_alone(backend):
    case = Case(ranks=2, key_groups=1).with_layout(PACKED)
    inputs = case.inputs()
    with seqmodels.backend(backend):
        y, state = call(inputs, case)
        assert (y[~PACKED.valid] == 0).all()
        for slot in range(4):
            row, column = divmod(PACKED.starts[slot].item(), 13)
            tokens = slice(column, column + PACKED.lengths[slot].item())
            alone = [x[row : row + 1, tokens] for x in inputs[:6]] + [inputs[6][slot : slot + 1]]
            y_alone, state_alone = call(alone, Case())
            torch.testing.assert_close(y[row : row + 1, tokens], y_alone, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(state[slot : slot + 1], state_alone, rtol=1e-12, atol=1e-12)
    assert torch.equal(state[4:], inputs[6][4:])  # unused slots keep their state


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("cut", [1, 4, 12])
def test_split(backend, normalize, cut):
    case = Case(normalize=normalize, ranks=2)
    inputs = [x.requires_grad_() for x in case.inputs()]

    def split(*leaves):
        first, middle = call([*(x[:, :cut] for x in leaves[:6]), leaves[6]], case, chunk_size=8)
        second, last = call([*(x[:, cut:] for x in leaves[:6]), middle], case, chunk_size=8)
        return torch.cat([first, second], dim=1), last

    with seqmodels.backend(backend):
        whole, parts = call(inputs, case, chunk_size=8), split(*inputs)
        weights = [torch.randn_like(out) for out in whole]
        truth = torch.autograd.grad(whole, inputs, weights)
        found = torch.autograd.grad(parts, inputs, weights)
    for a, b in zip((*whole, *truth), (*parts, *found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", ["plain", "all", "ranks", "odd groups", "normalised"])
def test_steps_are_the_whole(backend, name):
    case = CASES[name]
    inputs = case.inputs()
    with seqmodels.backend(backend):
        y, final = call(inputs, case)
        state = torch.zeros_like(final) if inputs[6] is None else inputs[6].clone()
        for t in range(case.length):
            q, k, v, log_decay, past, diagonal = (None if x is None else x[:, t] for x in inputs[:6])
            y_t = linear_attention_step(
                q, k, v, log_decay, state, past_weight=past, diagonal_weight=diagonal, normalize=case.normalize
            )
            torch.testing.assert_close(y_t, y[:, t], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_ranks_are_optional(backend):
    case = Case()
    inputs = case.inputs()
    with seqmodels.backend(backend):
        y, state = call(inputs, case)
        flat = [x.squeeze(2) for x in inputs[:3]]
        y_flat, state_flat = linear_attention(
            *flat, inputs[3], past_weight=inputs[4], diagonal_weight=inputs[5], initial_state=inputs[6]
        )
    assert torch.equal(y.squeeze(2), y_flat)
    assert torch.equal(state, state_flat)


def test_fewer_values_than_heads():
    q, k, v = torch.randn(1, 6, 4, 5), torch.randn(1, 6, 2, 5), torch.randn(1, 6, 2, 3)
    y, state = linear_attention(q, k, v)
    assert y.shape == (1, 6, 4, 3)
    assert state.shape == (1, 4, 5, 3)
    torch.testing.assert_close(y, linear_attention(q, k, v.repeat_interleave(2, dim=2))[0])


def strong_decays() -> torch.Tensor:
    """Resets among weak decays: differences of running sums would cancel."""
    return torch.where(torch.rand(1, 200, 2) < 0.1, -1e4, -1e-3)


@pytest.mark.parametrize("reset", [-1e4, -float("inf")])
def test_strong_decays_cost_no_precision(reset):
    inputs = Case(batch=1, length=200).inputs()
    inputs[3] = torch.where(strong_decays() < -1, reset, -1e-3).double()
    case = Case(batch=1, length=200)
    with seqmodels.backend("reference"):
        truth = call(inputs, case)
        plain = call([x.float() for x in inputs], case)
    with seqmodels.backend("torch"):
        found = call([x.float() for x in inputs], case)
        exact = call(inputs, case)
    for a, b, c, d in zip(truth, plain, found, exact, strict=True):
        assert error(c, a) <= 2 * error(b, a) + 2.0**-23
        assert error(d, a) < 1e-12


def test_a_wrong_decay_is_caught():
    case = Case()
    truth = run(case, "reference")
    inputs = case.inputs()
    inputs[3][0, 3, 0] *= 1 + 1e-9
    y, _ = call(inputs, case)
    assert error(y, truth["y"]) > 1e-12
