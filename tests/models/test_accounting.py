from __future__ import annotations

import time

import pytest
import torch
from model_helpers import HYBRID, hybrid, tokens
from torch.utils.flop_counter import FlopCounterMode

from seqmodels.configuration import convert
from seqmodels.models import LanguageModel, ModelConfig, account

SHARED = {"again": {"layer": "attention", "num_heads": 2, "share": "a"}, **HYBRID["layers"]}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_head": False},
        {"norm_place": "post"},
        {"norm": "none"},
        {"pattern": "again gated_conv again swiglu again", "layers": SHARED},
    ],
)
def test_rows_are_what_is_allocated_to_the_unit(changes: dict) -> None:
    config = convert({**HYBRID, **changes}, ModelConfig)
    rows = account(config, length=33)
    model = LanguageModel(config)
    total = rows[-1]
    assert total.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert total.state_bytes == model.init_state(1, max_length=33).nbytes == model.state_bytes(33)
    assert total.flops == model.flops(33)
    for column in ("parameters", "state_bytes", "flops"):
        assert sum(getattr(row, column) for row in rows[:-1]) == getattr(total, column)


def test_flops_of_matrix_products_are_those_that_run() -> None:
    model = hybrid(pattern="3x swiglu mlp", dtype=torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens(1, 21))
    assert model.flops(21) == counter.get_total_flops()


def test_state_bytes_of_recurrent_layers_do_not_grow() -> None:
    model = hybrid(pattern="gated_conv swiglu linear_attention window")
    assert model.state_bytes(20) == model.state_bytes(1_000_000)
    growing = hybrid()
    assert growing.state_bytes(2000) - growing.state_bytes(1000) == 1000 * 2 * 16 * 8  # keys and values, float64


def test_a_large_model_takes_seconds() -> None:
    config = convert(
        {
            "vocab_size": 128_256,
            "d_model": 2048,
            "pattern": "24x(linear_attention swiglu)",
            "layers": {"linear_attention": {"num_heads": 32}, "swiglu": {"d_hidden": 5632}},
        },
        ModelConfig,
    )
    start = time.perf_counter()
    rows = account(config, length=2048, dtype=torch.bfloat16)
    assert time.perf_counter() - start < 10
    assert rows[-1].parameters > 1.4e9


def test_length_is_checked() -> None:
    with pytest.raises(ValueError, match="length is 0"):
        account(convert(HYBRID, ModelConfig), length=0)
