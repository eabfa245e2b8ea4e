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


@pytest.mark.parametrize("length", [3, 4, 8, 23])
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


@pytest.mark.parametrize("length", [1, 4, 5, 8, 11])
def test_rows_that_begin_documents_need_no_tables(length):
    """Sliced segments (no state given) and gathered ones (a new state given) are the same layer."""
    layer = make()
    x = torch.randn(2, length, 6, dtype=torch.float64)
    sliced = layer(x, return_state=True)
    gathered = layer(x, layer.init_state(2, dtype=torch.float64), return_state=True)
    torch.testing.assert_close(sliced.y, gathered.y, rtol=1e-12, atol=1e-13)
    for (name, one), (_, two) in zip(sliced.state.tensors(), gathered.state.tensors(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13, msg=name)
    for name, value in sliced.aux.items():
        torch.testing.assert_close(value, gathered.aux[name], rtol=1e-12, atol=0, msg=name)


def test_every_weight_meets_a_gradient_where_no_segment_is_read():
    """Data-parallel training waits for all of them; those of the writes are zeros."""
    layer = make()
    layer(torch.randn(1, 3, 6, dtype=torch.float64)).y.sum().backward()
    grads = {name: weight.grad for name, weight in layer.named_parameters()}
    assert all(grad is not None for grad in grads.values())
    assert {name for name, grad in grads.items() if not grad.any()} == {
        "write_key.weight", "write_value.weight", "write_out.weight", "write_gate.weight", "addresses",
    }  # fmt: skip


def test_hand_made_weights_recall_pairs_exactly():
    """One slot a key: pairs are written as they come, kept over segments without them, and read by their key.

    u is (key, value, 1 for a pair, 1). With scores of +100 for a pair with the slot's key and -100 and less for all
    others, each softmax and gate is 0 or 1 to within e^-90: the equations can do the task, whatever training finds.
    """
    keys, values, segment, segments = 3, 4, 8, 5
    width, large = keys + values, 200.0
    d_model = width + 2
    layer = Workspace(d_model, num_slots=keys, rank=width, active=keys, segment=segment).double()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.zero_()
        content = torch.eye(width, d_model, dtype=torch.float64)  # key and value of u or of a slot
        layer.read_query.weight[:keys, :keys] = large * torch.eye(keys, dtype=torch.float64)
        layer.read_key.weight[:keys] = content[:keys]
        layer.read_value.weight[keys:] = content[keys:] * (2 / d_model) ** 0.5  # of the norm of two ones in d_model
        layer.read_out.weight.copy_(content.T)
        layer.read_gate.weight[0, -1] = large
        layer.write_key.weight[:keys, :keys] = large * torch.eye(keys, dtype=torch.float64)
        layer.write_key.weight[keys, -2:] = torch.tensor([large, -1.5 * large])  # a pair, a constant
        layer.addresses[:, :keys] = torch.eye(keys, dtype=torch.float64) * width**0.5
        layer.addresses[:, keys] = width**0.5
        layer.write_value.weight.copy_(content)
        layer.write_out.weight.copy_(content.T)
        layer.write_gate.weight[0, -1] = large
    generator = torch.Generator().manual_seed(1)
    known: dict[int, int] = {}
    x = torch.zeros(1, segments * segment, d_model, dtype=torch.float64)
    x[..., -1] = 1
    asked, answers = [], []
    for c in range(segments):
        new = dict.fromkeys(torch.randperm(keys, generator=generator)[: 2 if c % 2 == 0 else 0].tolist())
        for place, key in enumerate([*known, *new]):
            t = c * segment + place
            x[0, t, key] = 1
            if place < len(known):  # a question, in the segments after the pair's
                asked.append(t)
                answers.append(known[key])
            else:
                new[key] = int(torch.randint(values, (), generator=generator))
                x[0, t, keys + new[key]] = x[0, t, -2] = 1
        known |= new
    expected = torch.eye(values, dtype=torch.float64)[answers]
    assert len(answers) >= 10
    assert len(set(answers)) > 1
    y = layer(x).y[0, asked]
    torch.testing.assert_close(y[:, keys:width], expected, rtol=0, atol=1e-9)


def test_slots_choose_tokens_from_the_start():
    """The share of a slot that one of 128 tokens of unit normal inputs has, as the docstring derives it."""
    torch.manual_seed(0)
    shares = {}
    for address_std in (1.0, 8.0):
        layer = Workspace(64, address_std=address_std)
        u = torch.randn(32, 128, 64)
        score, _ = layer._write(u, torch.ones(32, 128))
        assert score.std().item() == pytest.approx(0.577 * address_std, rel=0.1)  # 1/sqrt(3): nn.Linear's weights
        shares[address_std] = score.softmax(1).amax(1).median().item()
    assert shares[1.0] < 0.1 < 0.5 < shares[8.0]


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


def test_decoding_rows_at_different_places_of_a_segment():
    """Segments end in one row and not in another, or in none; each step is the equations."""
    layer = make()
    x = torch.randn(3, 19, 6, dtype=torch.float64)
    begun = (0, 2, 7)
    state = layer.init_state(3)
    for row, count in enumerate(begun):
        if count:
            alone = layer(x[row : row + 1, :count], return_state=True).state
            for (_, to), (_, value) in zip(state.tensors(), alone.tensors(), strict=True):
                to[row] = value[0].detach()
    found = torch.stack([layer.step(x[range(3), [count + t for count in begun]], state) for t in range(12)], 1)
    for row, count in enumerate(begun):
        torch.testing.assert_close(found[row], by_definition(layer, x[row])[count : count + 12].detach())


def test_a_state_is_made_where_and_as_large_as_asked():
    state = make().init_state(3, device="meta")
    assert {tensor.device.type for _, tensor in state.tensors()} == {"meta"}
    assert all(tensor.is_contiguous() and len(tensor) == 3 for _, tensor in state.tensors())
    with pytest.raises(ValueError, match="Workspace: batch_size is 0; expected a positive integer"):
        make().init_state(0)


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
    for std in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="address_std"):
            make(address_std=std)
