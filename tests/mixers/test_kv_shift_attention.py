"""KV-shifting attention: the hand-built heads of its theory, its loss formula, carried raw keys, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

import seqmodels
from seqmodels.mixers import Attention, KVShiftAttention
from seqmodels.ops.kv_shift import kv_shift, kv_shift_step

SEQUENCE = [3, 7, 1, 9, 4, 7, 1, 3]
VOCABULARY, SHARPNESS = 16, 12.0


def hand_built(keys: tuple[float, float], values: tuple[float, float]) -> KVShiftAttention:
    """One head on one-hot tokens: W_k = W_v = W_out = 1, scores ``SHARPNESS`` q . k, no positions."""
    layer = KVShiftAttention(VOCABULARY, num_heads=1, rotary_fraction=0.0, dtype=torch.float64)
    identity = torch.eye(VOCABULARY, dtype=torch.float64)
    with torch.no_grad():
        layer.in_proj.weight.copy_(torch.cat([SHARPNESS * math.sqrt(VOCABULARY) * identity, identity, identity]))
        layer.out_proj.weight.copy_(identity)
        layer.k_mix.copy_(torch.tensor([keys]))
        layer.v_mix.copy_(torch.tensor([values]))
    return layer


def one_hot(tokens: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor([tokens]), VOCABULARY).double()


def test_one_layer_is_an_exact_induction_head():
    """Keys are the previous token, values the current one: token x attends to what followed earlier x.

    Weights are e^c for the m positions whose previous token is x and 1 for the other t + 1 - m.
    """
    y = hand_built(keys=(0, 1), values=(1, 0))(one_hot(SEQUENCE)).y[0]
    for t, token in enumerate(SEQUENCE):
        expected = torch.zeros(VOCABULARY, dtype=torch.float64)
        weights = [math.exp(SHARPNESS) if s >= 1 and SEQUENCE[s - 1] == token else 1.0 for s in range(t + 1)]
        for s, weight in enumerate(weights):
            expected[SEQUENCE[s]] += weight / sum(weights)
        torch.testing.assert_close(y[t], expected, rtol=1e-12, atol=1e-14)
    assert y[5:].argmax(-1).tolist() == [1, 9, 7]
    assert y[5:].amax(-1).min() > 0.99996
    assert y[4, [3, 7, 1, 9, 4]].tolist() == pytest.approx([0.2] * 5)  # nothing matches: the mean of what was seen


def test_the_other_way_round_it_is_a_predecessor_head():
    y = hand_built(keys=(1, 0), values=(0, 1))(one_hot(SEQUENCE)).y[0]
    assert y[5, [3, 4]].tolist() == pytest.approx([0.49999, 0.49999], abs=5e-6)


def test_without_previous_tokens_it_is_plain_attention_bit_for_bit():
    torch.manual_seed(0)
    plain, shifted = (kind(24, num_heads=4, num_kv_heads=2) for kind in (Attention, KVShiftAttention))
    shifted.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        shifted.k_mix.copy_(torch.tensor([1.0, 0.0]).expand(2, 2))
        shifted.v_mix.copy_(torch.tensor([1.0, 0.0]).expand(2, 2))
    x = torch.randn(2, 37, 24)
    assert torch.equal(plain(x).y, shifted(x).y)


def test_loss_of_the_induction_layer_in_closed_form():
    """Theorem 3 with the corrected weight of x_{i-1} and x_T (e^{a1}, not e^{a2})."""
    a, b, size, last = (0.3, 0.7), (0.8, 0.2), 12, 4
    tokens = [*range(size), last]
    total = 2 * math.exp(a[0]) + math.exp(a[1]) + (size - 2)
    logits = torch.full((size,), (b[0] + b[1]) / total, dtype=torch.float64)
    logits[last + 1] = (b[0] * math.exp(a[1]) + b[1]) / total
    logits[last] = (2 * b[0] * math.exp(a[0]) + b[1] * math.exp(a[1])) / total
    logits[last - 1] = (b[0] + b[1] * math.exp(a[0])) / total
    logits[size - 1] = (b[0] + b[1] * math.exp(a[0])) / total
    x = torch.eye(size, dtype=torch.float64)[tokens][None]
    layer = KVShiftAttention(size, num_heads=1, rotary_fraction=0.0, dtype=torch.float64)
    identity = torch.eye(size, dtype=torch.float64)
    with torch.no_grad():
        layer.in_proj.weight.copy_(torch.cat([math.sqrt(size) * identity, identity, identity]))
        layer.out_proj.weight.copy_(identity)
        layer.k_mix.copy_(torch.tensor([a], dtype=torch.float64))
        layer.v_mix.copy_(torch.tensor([b], dtype=torch.float64))
    y = layer(x).y[0, -1]
    torch.testing.assert_close(y, logits, rtol=1e-12, atol=1e-14)
    loss = cross_entropy(y, torch.tensor(last + 1)).item()
    assert loss == pytest.approx(2.4445311935, abs=1e-10)  # known to ten digits


@pytest.mark.parametrize("width", [1, 2, 4])
def test_shift_is_its_definition(width):
    """Against a loop over tokens; gradients by the formula dk_t = sum_j a_j dy_{t+j}, da_j = sum_t dy_t k_{t-j}."""
    generator = torch.Generator().manual_seed(width)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, mix, before = draw(2, 7, 3, 5).requires_grad_(), draw(3, width).requires_grad_(), draw(2, width - 1, 3, 5)
    y, final = kv_shift(x, mix, initial_state=before)
    history = torch.cat([before, x.detach()], dim=1)
    expected = torch.zeros_like(y)
    for t in range(7):
        for j in range(width):
            expected[:, t] += mix.detach()[:, j, None] * history[:, t + width - 1 - j]
    torch.testing.assert_close(y, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(final, history[:, 7:], rtol=0, atol=0)
    grad = draw(2, 7, 3, 5)
    grad_x, grad_mix = torch.autograd.grad(y, (x, mix), grad)
    padded = torch.cat([grad, torch.zeros(2, width, 3, 5, dtype=grad.dtype)], dim=1)
    expected_x = sum(mix.detach()[:, j, None] * padded[:, j : j + 7] for j in range(width))
    torch.testing.assert_close(grad_x, expected_x, rtol=1e-13, atol=1e-13)
    for j in range(width):
        at = history[:, width - 1 - j : width - 1 - j + 7]
        torch.testing.assert_close(grad_mix[:, j], (grad * at).sum((0, 1, 3)), rtol=1e-12, atol=1e-12)
    state = before.clone()
    stepped = torch.stack([kv_shift_step(x[:, t].detach(), mix.detach(), state) for t in range(7)], dim=1)
    torch.testing.assert_close(stepped, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(state, final.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["reference", "torch", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shift_and_step_agree_in_half_precision(dtype, backend):
    """bfloat16 inputs, and float32 ones under autocast: outputs are bfloat16, the carried tokens float32 and raw."""
    torch.manual_seed(0)
    x, mix, state = torch.randn(2, 7, 3, 5, dtype=dtype), torch.rand(3, 2), torch.zeros(2, 1, 3, 5)
    with seqmodels.backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        y, final = kv_shift(x, mix)
        stepped = torch.stack([kv_shift_step(x[:, t], mix, state) for t in range(7)], dim=1)
    assert y.dtype == stepped.dtype == torch.bfloat16
    assert final.dtype == torch.float32
    assert torch.equal(final[:, 0], x[:, -1].bfloat16().float())
    assert torch.equal(state, final)
    raw = x.bfloat16().double()
    exact = mix[:, 0, None] * raw + mix[:, 1, None] * torch.cat([torch.zeros_like(raw[:, :1]), raw[:, :-1]], dim=1)
    for found in (y, stepped):
        # One rounding of the sum, 2^-9 of it, and of float32 products of size below 4.
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)


def test_the_carried_keys_are_raw():
    """What the published listing carries, the shifted key, would give another next token."""
    torch.manual_seed(0)
    layer = KVShiftAttention(8, num_heads=2, window=8, dtype=torch.float64)
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    last = layer(x, return_state=True).state.last
    raw = layer.in_proj(x[:, -1:]).unflatten(-1, (-1, 4))[..., 2:, :]
    assert torch.equal(last, raw)


def test_gate_weights_sum_to_one_and_clamped_ones_stay_inside():
    torch.manual_seed(0)
    gate = KVShiftAttention(8, num_heads=2, weights="gate").mix()
    torch.testing.assert_close(gate.sum(-1), torch.ones(4))
    clamped = KVShiftAttention(8, num_heads=2, weights="clamp")
    with torch.no_grad():
        clamped.k_mix.fill_(3.0)
        clamped.v_mix.fill_(-1.0)
    assert clamped.mix().unique().tolist() == [0.0, 1.0]
    free = KVShiftAttention(8, num_heads=2)
    torch.testing.assert_close(free.mix().sum(-1), torch.ones(4))
    assert 0 <= free.mix()[:, 0].min() <= free.mix()[:, 0].max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(shift="vk"), "shift is 'vk'; expected 'kv', 'k', 'v' or 'qkv'"),
        (dict(weights="softmax"), "weights is 'softmax'; expected 'free', 'gate' or 'clamp'"),
        (dict(shift_width=1), "shift_width is 1; expected 2 or more"),
        (dict(shift_width=3, weights="gate"), "2 with weights='gate'"),
    ],
)
def test_errors_name_value_and_way_out(arguments, message):
    with pytest.raises(ValueError, match=message):
        KVShiftAttention(8, num_heads=2, **arguments)


def test_shift_refuses_weights_of_other_heads():
    with pytest.raises(ValueError, match=r"mix has shape \(3, 2\); expected \(2, W\)"):
        kv_shift(torch.zeros(1, 4, 2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="expected \\(batch, length, heads, head_dim\\)"):
        kv_shift(torch.zeros(4, 2, 3), torch.zeros(2, 2))
