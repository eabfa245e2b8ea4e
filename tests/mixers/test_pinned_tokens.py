"""Pinned tokens: the first tokens of a document stay in sight of every later one, beyond the window."""

from __future__ import annotations

import pytest
import torch

from seqmodels.mixers import Attention, HedgehogWindow, KVShiftAttention, Mamba2, SparseGlobalAttention

DOUBLE = torch.float64


def test_globals_that_are_pinned_are_attention_with_pinned_tokens() -> None:
    """Without other globals both see the window and the pinned tokens, with nothing added to a logit."""
    torch.manual_seed(0)
    options = {"num_heads": 4, "num_kv_heads": 2, "window": 6, "pinned_tokens": 3, "rotary_fraction": 0.5}
    plain = Attention(32, **options).to(DOUBLE)
    scored = SparseGlobalAttention(32, **options, num_globals=0, block=4).to(DOUBLE)
    scored.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 41, 32, dtype=DOUBLE, requires_grad=True)
    first, second = plain(x), scored(x, return_state=True)
    torch.testing.assert_close(first.y, second.y)
    gradients = [
        torch.autograd.grad(output.y.square().sum(), [x, *map(layer.get_parameter, dict(plain.named_parameters()))])
        for layer, output in ((plain, first), (scored, second))
    ]
    torch.testing.assert_close(*gradients)
    assert second.state.global_position.tolist() == [[0, 1, 2]] * 2
    # The scores of pinned tokens are infinite: nothing passes through them, and no NaN.
    scored(x).y.square().sum().backward()
    assert torch.equal(scored.score_weight.grad, torch.zeros_like(scored.score_weight))
    assert torch.equal(scored.score_bias.grad, torch.zeros_like(scored.score_bias))


def test_scores_choose_beside_the_pinned_tokens() -> None:
    torch.manual_seed(0)
    layer = SparseGlobalAttention(16, num_heads=2, window=4, num_globals=2, block=4, pinned_tokens=3).to(DOUBLE)
    x = torch.randn(1, 40, 16, dtype=DOUBLE)
    positions = layer(x, return_state=True).state.global_position[0].tolist()
    others = layer.scores(x)[0, 3:].topk(2).indices + 3
    assert positions == [0, 1, 2, *others.tolist()]


@pytest.mark.parametrize("kind", [Attention, KVShiftAttention])
def test_accounting(kind: type[Attention]) -> None:
    layer = kind(64, num_heads=4, window=16, pinned_tokens=5)
    state = layer.init_state(3)
    assert state.key.shape == (3, 4, 21, 16)
    assert layer.state_bytes(1000, batch_size=3) == layer.state_bytes(21, batch_size=3) == state.nbytes
    assert layer.init_state(3, max_length=9).key.shape[2] == 9
    seen = sum(len({*range(max(0, t - 15), t + 1), *range(min(5, t + 1))}) for t in range(100))
    assert layer.flops(100) == 2 * 100 * 4 * 64 * 64 + 4 * 64 * seen


@pytest.mark.parametrize(("window", "pinned"), [(None, 0), (8, 3)])
def test_a_state_of_another_capacity_goes_on_alike(window: int | None, pinned: int) -> None:
    torch.manual_seed(0)
    layer = Attention(16, num_heads=2, window=window, pinned_tokens=pinned).to(DOUBLE)
    x = torch.randn(2, 30, 16, dtype=DOUBLE)
    small = layer(x[:, :4], layer.init_state(2, max_length=6), return_state=True).state
    wide = layer.with_capacity(small, 30)
    assert wide.key.shape[2] == layer.init_state(2, max_length=30).key.shape[2]
    torch.testing.assert_close(layer(x[:, 4:], wide, return_state=True).y, layer(x).y[:, 4:])
    assert layer.with_capacity(wide, 4).key.shape[2] == 4
    with pytest.raises(ValueError, match="4 tokens do not fit a cache of 3; make the state with max_length"):
        layer.with_capacity(wide, 3)
    assert layer.with_capacity(wide, 4, shrink=False).key.shape == wide.key.shape
    assert layer.with_capacity(small, 8, shrink=False).key.shape[2] == 8


def test_a_state_that_does_not_grow_has_any_capacity() -> None:
    layer = Mamba2(16, d_state=4, head_dim=8)
    state = layer.init_state(2)
    assert layer.with_capacity(state, 10) is state


def test_pin_adds_to_a_window_and_leaves_the_rest() -> None:
    for layer in (KVShiftAttention(16, num_heads=2, window=4, pinned_tokens=2), Attention(16, num_heads=2)):
        before = layer.pinned_tokens
        layer.pin(3)
        assert layer.pinned_tokens == (0 if layer.window is None else before + 3)
    with pytest.raises(ValueError, match="joins the linear sums, so 3 first tokens cannot stay"):
        HedgehogWindow(16, num_heads=2).pin(3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pinned_tokens": 2}, "pinned_tokens is 2; it is for a causal layer with a window"),
        ({"pinned_tokens": 2, "window": 3, "bidirectional": True}, "it is for a causal layer with a window"),
        ({"pinned_tokens": -1, "window": 3}, "pinned_tokens is -1; expected a number of tokens"),
        ({"pinned_tokens": 1.5, "window": 3}, "pinned_tokens is 1.5; expected a number of tokens"),
    ],
)
def test_refusals(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attention(16, num_heads=2, **options)
