"""Product-key memory: exact top-k against brute force over all pairs, gradients, usage, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import rms_norm, silu

from seqmodels.channel import ProductKeyMemory
from seqmodels.layout import Layout

SIZES = dict(num_heads=3, top_k=4, query_dim=8, num_subkeys=7, value_dim=5, dropout=0.0)


def make(**changes) -> ProductKeyMemory:
    torch.manual_seed(0)
    return ProductKeyMemory(6, **(SIZES | changes)).double()


def brute_force(layer: ProductKeyMemory, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All n^2 sums of every head."""
    query = layer.query_proj(x).unflatten(-1, (layer.num_heads, -1))
    first, second = rms_norm(query, query.shape[-1:], layer.query_norm).chunk(2, dim=-1)
    sums = (first.unsqueeze(-2) @ layer.subkeys[0].mT).squeeze(-2).unsqueeze(-1) + (
        second.unsqueeze(-2) @ layer.subkeys[1].mT
    ).squeeze(-2).unsqueeze(-2)
    top, rows = sums.flatten(-2).topk(layer.top_k, dim=-1)
    return rows, top.softmax(-1)


def test_top_k_and_output_are_those_of_brute_force_with_gradients():
    layer = make()
    x = torch.randn(2, 11, 6, dtype=torch.float64, requires_grad=True)
    rows, weights = layer.lookup(x)
    expected_rows, expected_weights = brute_force(layer, x)
    assert torch.equal(rows, expected_rows)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-12, atol=1e-14)
    read = (expected_weights.unsqueeze(-1) * layer.values[expected_rows]).sum((-2, -3))
    expected = torch.sigmoid(layer.gate_proj(x) - 2) * layer.out_proj(read * silu(layer.swish_proj(x)))
    y = layer(x).y
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)
    leaves = [x, *layer.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in (y, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("top_k", [1, 2, 6, 7])
def test_the_best_are_found_for_every_top_k_and_among_equals(top_k):
    """One, and as many as there are sub-keys; whole scores, so that many sums are the same."""
    layer = make(top_k=top_k)
    x = torch.randn(40, 6, dtype=torch.float64)
    rows, weights = layer.lookup(x)
    expected, shares = brute_force(layer, x)
    assert torch.equal(rows, expected)
    torch.testing.assert_close(weights, shares, rtol=1e-12, atol=1e-14)
    scores = torch.randint(3, (2, 500, 7)).sort(-1, descending=True).values
    first, second = layer._best_pairs(scores[..., :top_k])
    found = scores[0].gather(-1, first) + scores[1].gather(-1, second)
    sums = (scores[0].unsqueeze(-1) + scores[1].unsqueeze(-2)).flatten(-2)
    assert torch.equal(found, sums.topk(top_k).values)
    assert all(len(set(pairs)) == top_k for pairs in (first * 7 + second).tolist())


def test_a_sparse_gradient_holds_the_rows_read_and_the_same_numbers():
    dense, sparse = make(), make(sparse=True)
    x = torch.randn(2, 2, 6, dtype=torch.float64)
    for layer in (dense, sparse):
        layer(x).y.sum().backward()
    grad = sparse.values.grad
    assert grad.is_sparse
    assert (grad._indices().diff() > 0).all()  # each row once, in order
    grad = grad.coalesce()
    assert set(grad.indices()[0].tolist()) == set(sparse.lookup(x)[0].flatten().tolist())
    torch.testing.assert_close(grad.to_dense(), dense.values.grad, rtol=1e-12, atol=1e-15)
    for name, parameter in dense.named_parameters():
        if name != "values":
            assert torch.equal(parameter.grad, sparse.get_parameter(name).grad), name
    optimizer = torch.optim.SparseAdam([sparse.values], lr=0.1)
    before = sparse.values.detach().clone()
    optimizer.step()
    changed = (sparse.values != before).any(1).nonzero().flatten().tolist()
    assert set(changed) <= set(grad.indices()[0].tolist())


def test_usage_counts_what_is_read_and_not_padding():
    layer = make(num_heads=1, top_k=1)
    x = torch.randn(1, 1, 6, dtype=torch.float64).expand(1, 5, 6)
    aux = layer(x).aux
    assert aux["touched"].item() == pytest.approx(1 / 49)
    assert aux["usage_divergence"].item() == pytest.approx(2 * math.log(7))
    gate = torch.sigmoid(layer.gate_proj(x[0, 0]) - 2).item()
    assert aux["gate"].item() == pytest.approx(gate)
    padded = torch.cat([torch.full((1, 3, 6), float("nan"), dtype=torch.float64), x], dim=1)
    again = layer(padded, layout=Layout.left_padded([5], 8)).aux
    assert {name: value.item() for name, value in again.items()} == pytest.approx(
        {name: value.item() for name, value in aux.items()}
    )


def test_the_table_has_its_own_learning_rate_and_no_decay():
    hint = make(value_learning_rate=5e-4).parameter_hints["values"]
    assert (hint.weight_decay, hint.learning_rate) == (0.0, 5e-4)


def test_parameters_are_those_of_the_table():
    """n^2 dv + 2 H n (query / 2) + query H d + 2 d dv, and the query norm and the gate."""
    layer = ProductKeyMemory(32, num_heads=4, query_dim=16, num_subkeys=8, top_k=2, value_dim=24)
    expected = 8**2 * 24 + 2 * 4 * 8 * 8 + 16 * 4 * 32 + 2 * 32 * 24 + 16 + 32
    assert sum(parameter.numel() for parameter in layer.parameters()) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(query_dim=7), "query_dim is 7; expected an even number"),
        (dict(top_k=8), "top_k is 8 of num_subkeys=7; expected at most"),
        (dict(dropout=1.0), "dropout is 1.0"),
        (dict(num_heads=0), "num_heads"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)
