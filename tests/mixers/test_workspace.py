"""The workspace against its equations, one token at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import rms_norm

from seqmodels.mixers import Workspace

SIZES = dict(num_slots=5, rank=3, active=2, segment=4)


def make(**changes) -> Workspace:
    torch.manual_seed(0)
    layer = Workspace(6, **(SIZES | changes)).double()
    with torch.no_grad():  # slots that are far from empty
        layer.initial_slots.normal_()
    return layer


def by_definition(layer: Workspace, x: torch.Tensor) -> torch.Tensor:
    """(length, d_model): slots rewritten after each segment, every sum over tokens written out."""
    slots, root, outputs = layer.initial_slots, math.sqrt(layer.rank), []
    for start in range(0, len(x), layer.segment):
        part = x[start : start + layer.segment]
        key, value = (proj(rms_norm(slots, slots.shape[-1:])) for proj in (layer.read_key, layer.read_value))
        for token in part:
            weights = (key @ layer.read_query(token) / root).softmax(0)
            outputs.append(torch.sigmoid(layer.read_gate(token) - 2) * layer.read_out(weights @ value))
        if len(part) < layer.segment:
            break
        score = layer.write_key(part) @ layer.addresses.T / root  # (tokens, slots)
        gated = torch.sigmoid(layer.write_gate(part) - 1) * layer.write_value(part)
        candidate = layer.write_out(score.softmax(0).T @ gated)
        evidence = score.logsumexp(0) - math.log(layer.segment)
        z = torch.zeros(layer.num_slots, dtype=x.dtype)
        chosen = evidence.argsort(descending=True)[: layer.active]
        z[chosen] = torch.sigmoid(evidence[chosen] - 2)
        slots = (1 - z)[:, None] * slots + z[:, None] * candidate
    return torch.stack(outputs)


@pytest.mark.parametrize("length", [3, 4, 23])
def test_scan_is_the_loop_with_gradients(length):
    layer = make()
    x = torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x).y, torch.stack([by_definition(layer, row) for row in x])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)
    leaves = [x, *layer.parameters()]
    found, wanted = (
        torch.autograd.grad(out.square().sum(), leaves, materialize_grads=True, allow_unused=True)
        for out in (y, expected)
    )
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_the_first_segment_reads_the_initial_slots_alone_and_later_ones_reach_its_writes():
    layer = make()
    x = torch.randn(1, 12, 6, dtype=torch.float64)
    changed = x.clone()
    changed[:, :2] += 1
    y, other = layer(x).y, layer(changed).y
    assert torch.equal(y[:, 2:4], other[:, 2:4])
    assert (y[:, 4:] - other[:, 4:]).abs().amax(-1).min() > 1e-6
    for name in ("write_key", "write_value", "write_out", "write_gate"):
        weight = getattr(layer, name).weight
        (grad,) = torch.autograd.grad(layer(x).y[:, 4:].sum(), weight)
        assert grad.abs().max() > 0, name
        (early,) = torch.autograd.grad(layer(x).y[:, :4].sum(), weight, materialize_grads=True)
        assert early.abs().max() == 0, name


def test_slots_go_from_window_to_window_of_a_document_and_start_anew_with_the_next():
    layer = make()
    x = torch.randn(1, 16, 6, dtype=torch.float64)
    state = layer(x[:, :9], return_state=True).state
    torch.testing.assert_close(layer(x[:, 9:], state).y, layer(x).y[:, 9:], rtol=1e-12, atol=1e-13)
    assert not torch.allclose(layer(x[:, 9:]).y, layer(x).y[:, 9:])
    fresh = layer.init_state(1, dtype=torch.float64)
    assert torch.equal(fresh.slots[0], layer.initial_slots)


def test_autocast_leaves_the_sums_of_the_slots_in_float32():
    """Decode adds in float32; sums rounded to bfloat16 in forward (2^-9 of about 1) would part from it."""
    torch.manual_seed(0)
    layer = Workspace(16, num_slots=6, rank=8, active=3, segment=8)
    x = torch.randn(2, 21, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = layer(x, return_state=True).state
        stepped = layer.init_state(2)
        for t in range(21):
            layer.step(x[:, t], stepped)
    # The projections in front round in bfloat16 alike; float32 sums of 8 terms of size about 1.
    for (name, one), (_, two) in zip(whole.tensors(), stepped.tensors(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5, msg=name)


def test_equal_evidence_writes_the_first_slots():
    layer = make()
    with torch.no_grad():
        layer.addresses.zero_()
    x = torch.randn(1, 4, 6, dtype=torch.float64)
    slots = layer(x, return_state=True).state.slots[0]
    written = (slots != layer.initial_slots).any(1)
    assert written.tolist() == [True, True, False, False, False]


def test_metrics_of_gates_and_updates():
    layer = make(active=5)
    aux = layer(torch.zeros(1, 8, 6, dtype=torch.float64)).aux
    sigmoid = lambda value: 1 / (1 + math.exp(-value))  # noqa: E731
    assert aux["read_gate"].item() == pytest.approx(sigmoid(-2))
    assert aux["write_gate"].item() == pytest.approx(sigmoid(-1))
    assert aux["update"].item() == pytest.approx(sigmoid(-2))  # equal scores 0: e = log 4 - log 4


def test_errors():
    with pytest.raises(ValueError, match="active is 6 of num_slots=5; expected at most all"):
        make(active=6)
    with pytest.raises(ValueError, match="segment"):
        make(segment=0)
