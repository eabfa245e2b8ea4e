"""SwiGLU and MLP: their equations, widths and refusals. The laws are in tests/test_laws.py."""

from __future__ import annotations

import pytest
import torch

from seqmodels.channel import CHANNELS, MLP, SwiGLU
from seqmodels.mixers import Attention
from seqmodels.state import EmptyState


def test_swiglu_equation() -> None:
    layer = SwiGLU(12, d_hidden=20, bias=True).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    gate, up = layer.in_proj.weight[:20], layer.in_proj.weight[20:]
    gate_bias, up_bias = layer.in_proj.bias[:20], layer.in_proj.bias[20:]
    z = x @ gate.T + gate_bias
    hidden = z / (1 + (-z).exp()) * (x @ up.T + up_bias)
    torch.testing.assert_close(layer(x).y, hidden @ layer.out_proj.weight.T + layer.out_proj.bias)


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("gelu", lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2),
        ("gelu_tanh", lambda z: z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))) / 2),
        ("relu", lambda z: z.clamp(min=0)),
        ("relu2", lambda z: z.clamp(min=0) ** 2),
        ("silu", lambda z: z * torch.sigmoid(z)),
    ],
)
@pytest.mark.parametrize("gated", [False, True])
def test_mlp_equation(activation: str, function, gated: bool) -> None:
    layer = MLP(12, d_hidden=20, activation=activation, gated=gated).double()
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    hidden = function(x @ layer.in_proj.weight[:20].T)
    if gated:
        hidden = hidden * (x @ layer.in_proj.weight[20:].T)
    torch.testing.assert_close(layer(x).y, hidden @ layer.out_proj.weight.T)
    assert layer.in_proj.bias is None


def test_widths() -> None:
    assert SwiGLU(768).d_hidden == 2048
    assert SwiGLU(100).d_hidden == 320
    assert SwiGLU(96, multiple_of=1).d_hidden == 256
    assert SwiGLU(1024, expansion=2).d_hidden == 2048
    assert MLP(10).d_hidden == 40
    assert MLP(3, expansion=8 / 3).d_hidden == 8
    parameters = sum(parameter.numel() for parameter in SwiGLU(768).parameters())
    assert parameters == 3 * 768 * 2048
    assert MLP(10).flops(7) == 7 * 2 * 2 * 10 * 40


@pytest.mark.parametrize("name", ["swiglu", "mlp"])
def test_contract_of_a_layer_without_state(name: str) -> None:
    layer = CHANNELS[name](16)
    x = torch.randn(2, 5, 16)
    assert layer(x).state is None
    output = layer(x, layer.init_state(2), return_state=True)
    assert isinstance(output.state, EmptyState)
    assert layer.state_bytes(10_000, batch_size=8) == 0
    torch.testing.assert_close(layer.step(x[:, 3], output.state), output.y[:, 3])
    assert not layer.step(x[:, 3], output.state).requires_grad
    with pytest.raises(TypeError, match="has no state; got AttentionState"):
        layer(x, Attention(16, num_heads=2).init_state(2, max_length=5))
    with pytest.raises(ValueError, match=r"expected \(batch, length, 16\)"):
        layer(x[..., :3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(d_hidden=0), "d_hidden is 0"),
        (dict(expansion=0), "expansion is 0"),
        (dict(expansion=-1.0), "expansion is -1.0"),
        (dict(expansion=float("nan")), "expansion is nan"),
        (dict(multiple_of=0), "multiple_of is 0"),
        (dict(activation="swish"), "unknown activation 'swish'; expected one of gelu"),
    ],
)
def test_refusals(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MLP(16, **arguments)
    with pytest.raises(ValueError, match="d_model is 0"):
        SwiGLU(0)


def test_unknown_channel_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown channel module 'swigul'\. Did you mean swiglu"):
        CHANNELS["swigul"]
