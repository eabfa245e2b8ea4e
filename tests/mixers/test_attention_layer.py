"""The attention layer: its equation, its cache, its limits. The laws are in tests/test_laws.py."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from seqmodels import Layout
from seqmodels.mixers import Attention
from seqmodels.mixers.attention import AttentionState
from seqmodels.mixers.gated_conv import GatedConv
from seqmodels.state import State

VARIANTS = {
    "full": dict(num_heads=4),
    "window": dict(num_heads=4, window=16),
    "grouped": dict(num_heads=4, num_kv_heads=2, rotary_fraction=0.5, qk_norm=True, bias=True),
    "both_ways": dict(num_heads=4, num_kv_heads=2, bidirectional=True),
    "both_ways_window": dict(num_heads=4, window=5, bidirectional=True),
    "one_key_head": dict(num_heads=4, num_kv_heads=1, head_dim=6, window=5, rotary_fraction=0.0),
}


def by_definition(layer: Attention, x: Tensor) -> Tensor:
    """One query at a time, from the layer's weights."""
    heads, groups, dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
    projected = (x @ layer.in_proj.weight.T + (0 if layer.in_proj.bias is None else layer.in_proj.bias)).unflatten(
        -1, (-1, dim)
    )
    q, k, v = projected[:, :, :heads], projected[:, :, heads : heads + groups], projected[:, :, heads + groups :]

    def normalised(tensor: Tensor, norm: torch.nn.RMSNorm | None) -> Tensor:
        if norm is None:
            return tensor
        return tensor / (tensor.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight

    def turned(tensor: Tensor) -> Tensor:
        half = layer.rotary_dim // 2
        rate = torch.tensor([layer.rotary_base ** (-i / half) for i in range(half)], dtype=torch.float64)
        angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * rate
        pairs = torch.complex(tensor[..., :half], tensor[..., half : 2 * half]) * torch.polar(
            torch.ones_like(angle), angle
        )
        return torch.cat([pairs.real, pairs.imag, tensor[..., 2 * half :]], -1)

    q, k = turned(normalised(q, layer.q_norm)), turned(normalised(k, layer.k_norm))
    out = torch.zeros(*x.shape[:2], heads, dim, dtype=torch.float64)
    for i in range(x.shape[1]):
        first = 0 if layer.window is None else max(0, i - layer.window + 1)
        last = i if not layer.bidirectional else x.shape[1] - 1 if layer.window is None else i + layer.window - 1
        for h in range(heads):
            g = h * groups // heads
            scores = torch.einsum("bd,bjd->bj", q[:, i, h], k[:, first : last + 1, g]) / math.sqrt(dim)
            out[:, i, h] = torch.einsum("bj,bjd->bd", scores.softmax(-1), v[:, first : last + 1, g])
    y = out.flatten(-2) @ layer.out_proj.weight.T
    return y if layer.out_proj.bias is None else y + layer.out_proj.bias


@pytest.mark.parametrize("name", VARIANTS)
def test_equation(name: str) -> None:
    layer = Attention(32, **VARIANTS[name]).double()
    if layer.q_norm is not None and layer.k_norm is not None:
        torch.nn.init.uniform_(layer.q_norm.weight, 0.5, 2)
        torch.nn.init.uniform_(layer.k_norm.weight, 0.5, 2)
    x = torch.randn(2, 23, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x).y, by_definition(layer, x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", [name for name, options in VARIANTS.items() if not options.get("bidirectional")])
def test_512_steps_equal_forward_in_float32(name: str) -> None:
    layer = Attention(32, **VARIANTS[name])
    x = torch.randn(2, 512, 32)
    with torch.no_grad():
        whole = layer(x).y
        state = layer.init_state(2, max_length=512)
        steps = torch.stack([layer.step(x[:, t], state) for t in range(512)], dim=1)
    assert (steps - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_decoding_far_out_uses_the_same_memory() -> None:
    layer = Attention(32, num_heads=4, window=16).double()
    x = torch.randn(1, 60, 32, dtype=torch.float64)
    state = layer.init_state(1)
    start = layer(torch.randn(1, 40, 32, dtype=torch.float64), state, return_state=True).state
    far = AttentionState(start.key.clone(), start.value.clone(), start.position + 20_000 - 40)
    places = [tensor.data_ptr() for _, tensor in far.tensors()]
    size = far.nbytes
    expected = layer(x, far).y
    y = torch.stack([layer.step(x[:, t], far) for t in range(60)], dim=1)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    assert places == [tensor.data_ptr() for _, tensor in far.tensors()]
    assert far.nbytes == size
    assert far.position.tolist() == [20_060]


def test_rows_at_different_positions() -> None:
    layer = Attention(32, num_heads=4, window=7).double()
    x = torch.randn(3, 40, 32, dtype=torch.float64)
    whole = layer(x).y
    lengths = [5, 30, 11]
    prompt = torch.randn(3, 30, 32, dtype=torch.float64)
    for row, count in enumerate(lengths):
        prompt[row, 30 - count :] = x[row, :count]
    prefilled = layer(prompt, layer.init_state(3), layout=Layout.left_padded(lengths), return_state=True)
    for row, count in enumerate(lengths):
        torch.testing.assert_close(prefilled.y[row, 30 - count :], whole[row, :count], rtol=1e-10, atol=1e-12)
    state = prefilled.state
    assert state.position.tolist() == lengths
    chunk = torch.stack([x[row, count : count + 4] for row, count in enumerate(lengths)])
    after = layer(chunk, state, return_state=True)
    token = torch.stack([x[row, count + 4] for row, count in enumerate(lengths)])
    y = layer.step(token, after.state)
    for row, count in enumerate(lengths):
        torch.testing.assert_close(after.y[row], whole[row, count : count + 4], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(y[row], whole[row, count + 4], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [None, 16])
def test_lengths_recompile_nothing(window: int | None) -> None:
    layer = Attention(32, num_heads=4, window=window)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    frames = []
    for length in (20, 33, 12, 57):
        x = torch.randn(3, length, 32, requires_grad=True)
        layout = Layout.packed([[length - 5, 5], [length], [3]], length, capacity=6)
        state = layer.init_state(6, max_length=64)
        found, expected = (f(x, state, layout=layout, return_state=True) for f in (compiled, layer))
        torch.testing.assert_close(found.y, expected.y, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.state.key, expected.state.key, rtol=1e-5, atol=1e-6)
        found.y.sum().backward()
        frames.append(counter.frame_count)
    assert frames[1:] == [frames[1]] * 3  # the second length makes it dynamic, then nothing more


def test_step_compiles_whole() -> None:
    layer = Attention(32, num_heads=4, window=5)
    step = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    state, eager = layer.init_state(2), layer.init_state(2)
    for _ in range(12):
        x = torch.randn(2, 32)
        torch.testing.assert_close(step(x, state), layer.step(x, eager), rtol=1e-5, atol=1e-6)
    assert torch.equal(state.position, eager.position)
    torch.testing.assert_close(state.key, eager.key, rtol=1e-5, atol=1e-6)


def test_bfloat16_and_autocast() -> None:
    layer = Attention(32, num_heads=4, num_kv_heads=2, window=8)
    x = torch.randn(2, 30, 32)
    with torch.no_grad():
        exact = layer(x).y
        with torch.autocast("cpu", torch.bfloat16):
            mixed = layer(x, return_state=True)
        assert mixed.state.key.dtype == torch.float32
        half = layer.bfloat16()
        low = half(x.bfloat16(), return_state=True)
        assert low.state.key.dtype == torch.bfloat16
        state = half.init_state(2)
        steps = torch.stack([half.step(x.bfloat16()[:, t], state) for t in range(30)], dim=1)
    # Four roundings to bfloat16 on the way: x, the projections, attention's output, y.
    for y in (mixed.y, low.y, steps):
        assert (y - exact).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_accounting() -> None:
    full, ring = Attention(64, num_heads=4, num_kv_heads=2), Attention(64, num_heads=4, window=16)
    assert full.state_bytes(1000) == 2 * 2 * 16 * 1000 * 4 + 8
    assert ring.state_bytes(1000, batch_size=3, dtype=torch.bfloat16) == 3 * (2 * 4 * 16 * 16 * 2 + 8)
    assert ring.state_bytes(5) == 2 * 4 * 16 * 5 * 4 + 8
    assert ring.flops(100) == 2 * 100 * 4 * 64 * 64 + 4 * 64 * sum(min(t + 1, 16) for t in range(100))
    assert full.flops(10) == 2 * 10 * (64 + 64 + 64) * 64 + 4 * 64 * 55


def test_states_that_do_not_fit() -> None:
    full = Attention(32, num_heads=4)
    x = torch.randn(2, 6, 32)
    with pytest.raises(ValueError, match=r"init_state\(batch_size, max_length=\.\.\.\)"):
        full.init_state(2)
    with pytest.raises(ValueError, match="6 tokens after 0 do not fit a cache of 5"):
        full(x, full.init_state(2, max_length=5), return_state=True)
    state = full(x, full.init_state(2, max_length=8), return_state=True).state
    with pytest.raises(ValueError, match="6 tokens after 6 do not fit a cache of 8"):
        full(x, state, return_state=True)
    whole = full(torch.cat([x, x], 1)).y[:, 6:]
    torch.testing.assert_close(full(x, state).y, whole)  # what is not kept needs no room
    for t in range(2):
        full.step(x[:, t], state)
    kept = state.clone()
    with pytest.raises(ValueError, match="8 tokens are in a cache of 8"):
        full.step(x[:, 0], state)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(state.tensors(), kept.tensors(), strict=True))
    # A ring that max_length made smaller than its window cannot wrap either.
    ring = Attention(32, num_heads=4, window=9)
    with pytest.raises(ValueError, match="6 tokens after 0 do not fit a cache of 4"):
        ring(x, ring.init_state(2, max_length=4), return_state=True)
    with pytest.raises(ValueError, match="'key' is"):
        Attention(32, num_heads=4, window=3)(x, full.init_state(2, max_length=8))
    with pytest.raises(ValueError, match="'key' is"):
        full(x, full.init_state(3, max_length=8))
    foreign: State = GatedConv(32).init_state(2)
    with pytest.raises(TypeError, match="expected AttentionState"):
        full(x, foreign)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_heads=5), "d_model=32 is not divisible by num_heads=5"),
        (dict(num_heads=0), "num_heads is 0"),
        (dict(num_heads=-2), "num_heads is -2"),
        (dict(num_heads=4, num_kv_heads=3), "num_heads=4 is not divisible by num_kv_heads=3"),
        (dict(num_heads=4, num_kv_heads=0), "num_kv_heads is 0"),
        (dict(num_heads=4, window=0), "window is 0"),
        (dict(num_heads=4, head_dim=0), "head_dim is 0"),
        (dict(num_heads=4, head_dim=7), "rotates 7 entries"),
        (dict(num_heads=4, rotary_fraction=0.4), "rotates 3 entries"),
        (dict(num_heads=4, rotary_fraction=1.5), "rotary_fraction is 1.5"),
        (dict(num_heads=4, rotary_base=0), "rotary_base is 0"),
    ],
)
def test_refusals(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(32, **arguments)


def test_refused_inputs() -> None:
    layer = Attention(32, num_heads=4)
    with pytest.raises(ValueError, match=r"expected \(batch, length, 32\)"):
        layer(torch.randn(2, 6, 31))
    with pytest.raises(ValueError, match="layout is for a grid of"):
        layer(torch.randn(2, 6, 32), layout=Layout.left_padded([5, 5]))


def test_a_bidirectional_layer_has_no_state() -> None:
    layer = Attention(16, num_heads=2, window=3, bidirectional=True)
    x = torch.randn(2, 5, 16)
    state = Attention(16, num_heads=2, window=3).init_state(2)
    for call in (
        lambda: layer(x, return_state=True),
        lambda: layer(x, state),
        lambda: layer.init_state(2, max_length=5),
        lambda: layer.step(x[:, 0], state),
    ):
        with pytest.raises(ValueError, match=r"bidirectional layer cannot .*build it with bidirectional=False"):
            call()
    assert layer.state_bytes(100) == 0
    assert layer.causality == "bidirectional"
    assert Attention.causality == "causal"
    # Window 3 of 5 tokens, both ways: 3 + 4 + 5 + 4 + 3 pairs, two products of head_dim each in two heads.
    projections = 2 * 5 * (16 * 48 + 16 * 16)
    assert layer.flops(5) == projections + 4 * 16 * 19
