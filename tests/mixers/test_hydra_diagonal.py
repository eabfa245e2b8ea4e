"""The diagonal path of Hydra against its recurrence, token by token."""

from __future__ import annotations

import torch
from torch.nn.functional import softplus

from seqmodels.mixers import MIXERS


def test_output_is_the_recurrence_and_a_token_sees_itself_through_the_skip_alone():
    torch.manual_seed(0)
    layer = MIXERS["hydra_diag"](6).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    state = torch.randn(2, 6, dtype=torch.float64)
    start = layer.init_state(2, dtype=torch.float64).map(lambda _: state.clone())
    out = layer(x, start, return_state=True)
    for t in range(9):
        step, b, c, u = (x[:, t] @ layer.in_proj.weight.T).split(6, dim=-1)
        torch.testing.assert_close(out.y[:, t], c * state + x[:, t] @ layer.skip_proj.weight.T, rtol=1e-12, atol=1e-12)
        state = torch.exp(-softplus(step) * softplus(layer.decay_rate)) * state + b * u
    torch.testing.assert_close(out.state.scalar, state, rtol=1e-12, atol=1e-12)


def test_parameters_are_those_of_the_table():
    layer = MIXERS["hydra_diag"](32)
    assert sum(parameter.numel() for parameter in layer.parameters()) == 5 * 32**2 + 32


def test_time_scales_at_the_start():
    torch.manual_seed(0)
    layer = MIXERS["hydra_diag"](4096)
    tokens = 1 / (softplus(layer.decay_rate.detach()) * softplus(torch.zeros(())))
    assert 4 < tokens.min() < 6
    assert 600 < tokens.max() < 730
