"""GatedConv, beyond the laws."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import conv1d, pad, silu

from seqmodels.mixers import GatedConv


@pytest.mark.parametrize(("expand", "kernel_size"), [(2, 3), (1, 1), (4, 5)])
def test_equation(expand, kernel_size):
    layer = GatedConv(6, expand=expand, kernel_size=kernel_size).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    u, gate = layer.in_proj(x).split(6 * expand, dim=-1)
    inputs = pad(u.transpose(1, 2), (kernel_size - 1, 0))
    u = conv1d(inputs, layer.conv_weight.unsqueeze(1), groups=6 * expand).transpose(1, 2)
    torch.testing.assert_close(layer(x).y, layer.out_proj(silu(u) * gate), rtol=1e-12, atol=1e-12)


def test_sizes_of_the_paper():
    # JRT: d -> 4 d, a depthwise kernel of 3 without bias, 2 d -> d (specification of BaseConv).
    layer = GatedConv(1024)
    assert sum(p.numel() for p in layer.parameters()) == 1024 * 4096 + 4096 + 2048 * 3 + 2048 * 1024 + 1024
    assert layer.flops(10) == 2 * 10 * (1024 * 4096 + 2048 * 1024 + 2048 * 3)


@pytest.mark.parametrize("arguments", [dict(expand=0), dict(kernel_size=0)])
def test_bad_arguments(arguments):
    with pytest.raises(ValueError, match="expected a positive integer"):
        GatedConv(8, **arguments)
