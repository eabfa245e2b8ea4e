"""GLU, and the S4 block that it closes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seqmodels.channel import GLU
from seqmodels.models import ClassifierConfig, SequenceClassifier


def test_equation() -> None:
    layer = GLU(6).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    g = x * (1 + torch.erf(x / 2**0.5)) / 2
    w, b = layer.activation.proj.weight, layer.activation.proj.bias
    expected = (g @ w[:6].T + b[:6]) * torch.sigmoid(g @ w[6:].T + b[6:])
    torch.testing.assert_close(layer(x).y, expected)
    torch.testing.assert_close(layer.step(x[:, 0], layer.init_state(2)), expected[:, 0])


def test_dropout_is_tied_over_positions() -> None:
    torch.manual_seed(0)
    layer = GLU(64, gate="half_glu1", dropout=0.5, dropout_tied=True)
    y = layer(torch.ones(2, 9, 64)).y
    dropped = y == 0
    assert 0.3 < dropped.float().mean() < 0.7
    assert (dropped == dropped[:, :1]).all()
    assert not (dropped[0] == dropped[1]).all()
    assert (layer.eval()(torch.ones(2, 9, 64)).y != 0).all()
    with pytest.raises(ValueError, match=r"dropout is -0\.1"):
        GLU(4, dropout=-0.1)
    with pytest.raises(ValueError, match="unknown gate 'glu'"):
        GLU(4, gate="glu")  # type: ignore[arg-type]


def test_s4_block_is_a_configuration() -> None:
    """x + GLU(W GELU(conv(norm x) + D)) with batch norm first, bidirectional."""
    torch.manual_seed(0)
    config = ClassifierConfig(
        input_size=1,
        num_classes=3,
        d_model=8,
        pattern="2x(s4d>glu)",
        norm="batch",
        layers={"s4d": {"d_state": 8, "bidirectional": True, "init": "lin"}},
    )
    model = SequenceClassifier(config).eval()
    h = torch.randn(2, 10, 8)
    block = model.backbone.blocks[0]
    s4d, glu = block.layers()
    with torch.no_grad():
        inner = s4d(block.norm(h, None)).y
        proj = glu.activation.proj
        expected = h + F.glu(F.linear(F.gelu(inner), proj.weight, proj.bias))
        found, _, _ = block(h, None, None, False, torch.float32)
        torch.testing.assert_close(found, expected)
    model.train()
    loss, _ = model.loss(torch.randn(2, 10, 1), torch.tensor([0, 2]))
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
