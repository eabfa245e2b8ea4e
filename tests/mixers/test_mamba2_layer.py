"""Mamba-2 as a layer: released names, and the published form of its recurrence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seqmodels.mixers import Mamba2


def test_released_names_and_shapes() -> None:
    layer = Mamba2(32, d_state=12, head_dim=8, num_groups=2)
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    assert shapes == {
        "in_proj.weight": (2 * 64 + 2 * 2 * 12 + 8, 32),
        "conv1d.weight": (64 + 2 * 2 * 12, 1, 4),
        "conv1d.bias": (64 + 2 * 2 * 12,),
        "dt_bias": (8,),
        "A_log": (8,),
        "D": (8,),
        "norm.weight": (64,),
        "out_proj.weight": (32, 64),
    }


@pytest.mark.parametrize(("groups", "norm_first"), [(1, False), (2, False), (1, True), (2, True)])
def test_against_the_published_recurrence(groups: int, norm_first: bool) -> None:
    """Token by token with torch's own convolution and norm: S = exp(dt A) S + dt x B^T, y = S C + D x."""
    layer = Mamba2(
        16, d_state=6, head_dim=8, num_groups=groups, norm_before_gate=norm_first, dtype=torch.float64, dt_max=1.0
    )
    with torch.no_grad():
        for parameter in (layer.D, layer.norm.weight, layer.dt_bias):
            parameter.add_(0.3 * torch.randn_like(parameter))
    u = torch.randn(2, 11, 16, dtype=torch.float64)
    z, xbc, dt = layer.in_proj(u).split([32, 32 + 2 * groups * 6, 4], dim=-1)
    conv = torch.nn.functional.conv1d(
        F.pad(xbc.mT, (3, 0)), layer.conv1d.weight, layer.conv1d.bias, groups=xbc.shape[-1]
    )
    x, b, c = F.silu(conv.mT).split([32, groups * 6, groups * 6], dim=-1)
    x = x.view(2, 11, 4, 8)
    b, c = (part.view(2, 11, groups, 6).repeat_interleave(4 // groups, dim=2) for part in (b, c))
    dt = F.softplus(dt + layer.dt_bias)
    state, outputs = torch.zeros(2, 4, 8, 6, dtype=torch.float64), []
    for t in range(11):
        decay = torch.exp(-dt[:, t] * layer.A_log.exp())
        state = state * decay[..., None, None]
        state = state + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        outputs.append((state * c[:, t, :, None]).sum(-1) + layer.D[:, None] * x[:, t])
    y = torch.stack(outputs, dim=1).flatten(2)
    parts = (y if norm_first else y * F.silu(z)).chunk(groups, dim=-1)
    normed = torch.cat([part * (part.square().mean(-1, keepdim=True) + 1e-5).rsqrt() for part in parts], dim=-1)
    expected = layer.out_proj(normed * layer.norm.weight * (F.silu(z) if norm_first else 1))
    torch.testing.assert_close(layer(u).y, expected, rtol=1e-12, atol=1e-12)


def test_initial_values() -> None:
    layer = Mamba2(256, head_dim=4)
    a = layer.A_log.exp()
    assert a.min() >= 1
    assert a.max() <= 16
    dt = F.softplus(layer.dt_bias)
    assert dt.min() >= 0.00099
    assert dt.max() <= 0.101


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num_groups=3), "not divisible by num_groups=3"),
        (dict(head_dim=7), "not divisible by head_dim=7"),
        (dict(a_range=(0.0, 1.0)), "a_range is"),
        (dict(dt_min=0.2), "dt_min=0.2"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba2(32, **{"head_dim": 8, **options})
