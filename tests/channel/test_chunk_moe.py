"""The chunk-routed mixture of experts: its definition, causal routing, balance, capacity, decoding."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import silu

import seqmodels
from seqmodels.channel import ChunkMoE
from seqmodels.layout import Layout
from seqmodels.ops.grouped_linear import grouped_linear
from seqmodels.testing import LawViolation, check_law

SIZES = dict(num_experts=4, experts_per_token=2, d_hidden=6, chunk_size=5)


def make(seed: int = 0, **changes) -> ChunkMoE:
    torch.manual_seed(seed)
    layer = ChunkMoE(8, **(SIZES | changes)).double()
    with torch.no_grad():
        layer.selection_bias.copy_(torch.linspace(-0.2, 0.2, layer.num_experts))
    return layer


def by_definition(
    layer: ChunkMoE, x: torch.Tensor, kept=lambda chunk, rank: True
) -> tuple[torch.Tensor, list[list[int]]]:
    """One sequence (length, d_model), token by token, every expert a dense function."""
    total, count, outputs, routes = torch.zeros_like(x[0]), 0, [], []
    expert: list[int] = []
    for t, token in enumerate(x):
        total, count = total + token, count + 1
        if t % layer.chunk_size == 0:
            mean, total, count = total / count, torch.zeros_like(token), 0
            logits = layer.router.weight @ mean / layer.temperature
            expert = (logits + layer.selection_bias).argsort(descending=True)[: layer.experts_per_token].tolist()
            weight = logits[expert].softmax(0)
            routes.append(expert)
        terms = []
        for rank, e in enumerate(expert):
            if kept(t // layer.chunk_size, rank):
                gate, up = (layer.in_weight[e] @ token).chunk(2)
                terms.append(weight[rank] * (layer.out_weight[e] @ (silu(gate) * up)))
        outputs.append(torch.stack(terms).sum(0) if terms else torch.zeros_like(token))
    return torch.stack(outputs), routes


@pytest.mark.parametrize("chunk_size", [1, 3, 5, 40])
def test_grouped_execution_is_the_dense_definition_with_gradients(chunk_size):
    """More chunks than experts and an odd tail: a transposed weight matrix or a wrong chunk would show."""
    layer = make(chunk_size=chunk_size, temperature=0.6)
    x = torch.randn(2, 23, 8, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([by_definition(layer, row)[0] for row in x])
    y = layer(x).y
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(y)
    leaves = [x, layer.router.weight, layer.in_weight, layer.out_weight]
    for ours, theirs in zip(*(torch.autograd.grad(out, leaves, grad) for out in (y, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def routes_of(layer: ChunkMoE, x: torch.Tensor, pieces: tuple[int, ...]) -> list[list[list[int]]]:
    """The decision in force behind each token, by forward over pieces."""
    state, seen, start = layer.init_state(x.shape[0], dtype=torch.float64), [], 0
    for size in pieces:
        state = layer(x[:, start : start + size], state, return_state=True).state
        start += size
        seen.append(state.expert.tolist())
    return seen


def test_training_prefill_and_decode_choose_the_same_experts():
    layer = make()
    x = torch.randn(2, 23, 8, dtype=torch.float64)
    routes = [by_definition(layer, row)[1] for row in x]
    state = layer.init_state(2, dtype=torch.float64)
    for t in range(23):
        layer.step(x[:, t], state)
        assert state.expert.tolist() == [route[t // 5] for route in routes]
    for pieces in ((7, 9, 7), (5, 5, 13), (1,) * 23):
        ends = torch.tensor(pieces).cumsum(0).tolist()
        for end, expert in zip(ends, routes_of(layer, x, pieces), strict=True):
            assert expert == [route[(end - 1) // 5] for route in routes]


@pytest.mark.parametrize("capacity_factor", [None, 0.5])
def test_no_later_token_changes_a_route_or_an_output(capacity_factor):
    layer = make(capacity_factor=capacity_factor).train()
    x = torch.randn(1, 23, 8, dtype=torch.float64)
    y = layer(x).y
    for t in (1, 5, 11):
        changed = x.clone()
        changed[:, t:] = torch.randn_like(changed[:, t:])
        # The same tokens meet the same products, but grouped with other rows: equal to rounding.
        torch.testing.assert_close(layer(changed).y[:, :t], y[:, :t], rtol=1e-12, atol=1e-13)


def test_the_published_routers_mean_over_the_chunk_is_caught():
    arguments = dict(d_model=16, **SIZES)
    check_law("causality", ChunkMoE, **arguments)
    with pytest.raises(LawViolation, match="causality"):
        check_law("causality", ChunkMoE, **arguments, router_input="paper_mean")
    layer = make(router_input="paper_mean")
    with pytest.raises(ValueError, match="no state and no step; build the layer with router_input='past'"):
        layer.step(torch.zeros(1, 8, dtype=torch.float64), make().init_state(1, dtype=torch.float64))


def test_switch_loss_is_its_weight_when_even_and_has_a_router_gradient():
    layer = make(num_experts=4, experts_per_token=1, chunk_size=1)
    with torch.no_grad():  # token i goes to expert i, with the same probabilities up to order
        layer.router.weight.zero_()
        layer.router.weight[:, :4] = torch.eye(4)
        layer.selection_bias.zero_()
    aux = layer(torch.eye(8, dtype=torch.float64)[None, :4]).aux
    assert aux["balance_loss"].item() == pytest.approx(1e-2, rel=1e-12)
    assert aux["load_max"].item() == pytest.approx(1.0)
    assert aux["load_entropy"].item() == pytest.approx(math.log(4))
    aux = layer(torch.randn(2, 9, 8, dtype=torch.float64)).aux
    (grad,) = torch.autograd.grad(aux["balance_loss"], layer.router.weight, retain_graph=True)
    assert grad.abs().max() > 1e-5
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0, 0, 0, 0, 0]], dtype=torch.float64)
    z = layer(logits[None]).aux["z_loss"].item()
    assert z == pytest.approx(1e-3 * torch.tensor([1.0, 2, 3, 4], dtype=torch.float64).logsumexp(0).item() ** 2)


def test_selection_bias_moves_toward_balance_and_only_in_training():
    layer = make(balance="bias", experts_per_token=1, chunk_size=1)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[2] = 1.0
        layer.selection_bias.zero_()
    x = torch.ones(1, 12, 8, dtype=torch.float64)
    layer.eval()(x)
    layer.after_optimizer_step()
    assert layer.selection_bias.tolist() == [0, 0, 0, 0]
    assert "balance_loss" not in layer.train()(x).aux
    layer.after_optimizer_step()
    assert layer.selection_bias.tolist() == pytest.approx([1e-3, 1e-3, -1e-3, 1e-3])
    assert layer.assigned.abs().sum() == 0


def test_a_layer_in_bfloat16_counts_past_256():
    layer = make(balance="bias", experts_per_token=1, chunk_size=1).bfloat16().train()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.selection_bias.copy_(torch.tensor([3.0, 0, 0, 0]))
    layer(torch.ones(1, 300, 8, dtype=torch.bfloat16))
    layer(torch.ones(1, 1, 8, dtype=torch.bfloat16))
    assert layer.assigned.tolist() == [301, 0, 0, 0]


def test_equal_logits_choose_the_first_experts():
    layer = make()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.selection_bias.zero_()
    x = torch.randn(3, 12, 8, dtype=torch.float64)
    state = layer(x, return_state=True).state
    assert state.expert.tolist() == [[0, 1]] * 3
    layer.step(x[:, 0], state)
    assert state.expert.tolist() == [[0, 1]] * 3


def test_capacity_drops_exactly_the_latest_terms():
    """All chunks want experts 0 then 1. Of 4 chunks times 2 terms over 4 experts, factor 1 gives each room for 2."""
    layer = make(capacity_factor=1.0).train()
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.selection_bias.copy_(torch.tensor([3.0, 2.0, 1.0, 0.0]))
    x = torch.randn(2, 10, 8, dtype=torch.float64)  # 2 rows of 2 chunks
    out = layer(x)
    assert out.aux["dropped"].item() == pytest.approx(0.5)
    expected = torch.stack([by_definition(layer, row, kept=lambda chunk, rank: chunk == 0)[0] for row in x])
    torch.testing.assert_close(out.y, expected, rtol=1e-12, atol=1e-13)
    assert out.y[:, 5:].abs().max() == 0  # everything dropped: the residual stream passes
    assert all(
        g.isfinite().all() for g in torch.autograd.grad(out.y.sum(), list(layer.parameters()), allow_unused=True)
    )
    torch.testing.assert_close(layer.eval()(x).y, torch.stack([by_definition(layer, row)[0] for row in x]))


@pytest.mark.parametrize(
    ("shape", "kept"),
    [
        # Two chunks of a row: the later one loses both its terms, though expert 1 is its first choice.
        ((1, 2), [[True, True], [False, False]]),
        # The first chunks of two rows: first choices come before second ones, whichever the row.
        ((2, 1), [[True, False], [True, False]]),
    ],
)
def test_room_goes_to_earlier_chunks_then_higher_choices(shape, kept):
    """Token 0 wants experts 0, 1, token 1 wants 1, 0. Half of 2 chunks times 2 terms over 2 experts is room for 1."""
    layer = make(num_experts=2, chunk_size=1, capacity_factor=0.5).train()
    with torch.no_grad():
        layer.router.weight.copy_(torch.eye(2, 8))
        layer.selection_bias.zero_()
    x = torch.randn(2, 8, dtype=torch.float64)
    x[:, :2] = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    y = layer(x.view(*shape, 8)).y.view(2, 8)
    for token, found, terms in zip(x, y, kept, strict=True):
        expected = by_definition(layer, token[None], kept=lambda chunk, rank, terms=terms: terms[rank])[0][0]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_ample_capacity_is_dropless():
    layer = make(capacity_factor=float("inf")).train()
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    out = layer(x)
    assert out.aux["dropped"] == 0
    assert torch.equal(out.y, layer.eval()(x).y)


def test_padding_is_not_routed_nor_counted():
    layer = make()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    x[1, :4] = float("nan")
    out = layer(x, layout=Layout.left_padded([9, 5]))
    torch.testing.assert_close(out.y[1:, 4:], layer(x[1:, 4:]).y, rtol=1e-12, atol=1e-12)
    assert out.y[1, :4].abs().max() == 0
    assert out.aux["balance_loss"].isfinite()


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
def test_rows_behind_the_last_group_are_zero_whatever_they_hold(backend):
    x = torch.full((5, 3), float("nan"), dtype=torch.float64)
    x[:3] = torch.arange(9.0).view(3, 3)
    weight = torch.randn(2, 4, 3, dtype=torch.float64)
    with seqmodels.backend(backend):
        y = grouped_linear(x, weight, torch.tensor([1, 3], dtype=torch.int32))
    torch.testing.assert_close(y[:3], torch.stack([weight[0] @ x[0], weight[1] @ x[1], weight[1] @ x[2]]))
    assert y[3:].abs().max() == 0
    with pytest.raises(ValueError, match="do not fit together"):
        grouped_linear(x, weight, torch.zeros(3, dtype=torch.int32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(experts_per_token=5), "experts_per_token is 5 of num_experts=4; expected at most all"),
        (dict(chunk_size=0), "chunk_size"),
        (dict(temperature=0.0), "temperature is 0.0"),
        (dict(balance="even"), "balance is 'even'"),
        (dict(router_input="mean"), "router_input is 'mean'"),
        (dict(capacity_factor=0.0), "capacity_factor is 0.0"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)
