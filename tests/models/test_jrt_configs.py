"""The published JRT-RNN and Based models: layout and parameters, counted from the papers' tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from seqmodels.models import LanguageModel, load_config

FOLDER = Path(__file__).parents[2] / "configs" / "models"
SITES = {  # layers from 0: d, number of layers, linear attention, sliding window
    "jrt-360m": (1024, 26, [1, 6, 11, 16, 21], [2, 7, 12, 17, 22]),
    "based-360m": (1024, 27, [1, 6, 11, 16, 21], [2, 7, 12, 17, 22]),
    "jrt-1.3b": (1792, 36, [1, 6, 11, 16, 21, 27, 33], [2, 7, 12, 17, 22, 28, 34]),
    "based-1.3b": (1792, 36, [1, 6, 11, 16, 21, 27, 33], [2, 7, 12, 17, 22, 28, 34]),
}
VOCABULARY, FEATURES = 50264, 16 * 16


@pytest.mark.parametrize("name", SITES)
def test_layout_and_parameters(name):
    d, layers, linear, windows = SITES[name]
    model = LanguageModel(load_config(FOLDER / f"{name}.yaml"), device="meta")
    mixer = "prefix_linear_attention" if name.startswith("jrt") else "based"
    kinds = [spec.name for spec, _, _ in model.backbone.named_layers()]
    assert kinds[1::2] == ["swiglu"] * layers
    expected = [mixer if i in linear else "attention" if i in windows else "gated_conv" for i in range(layers)]
    assert kinds[::2] == expected

    gated_conv = (4 * d * d + 4 * d) + 2 * d * 3 + (2 * d * d + d)
    attention = 4 * d * d
    causal = 2 * d * FEATURES + 2 * d * d  # q, k; v, out
    encoder = d * FEATURES + d * d  # k', v'
    swiglu = 3 * d * 2 * d
    count = VOCABULARY * d + d  # tied embedding, last norm
    count += layers * (swiglu + 2 * d)  # with a norm for each of a layer's two blocks
    count += len(windows) * attention + len(linear) * (causal + encoder * name.startswith("jrt"))
    count += (layers - len(linear) - len(windows)) * gated_conv
    assert model.num_parameters() == count
    stated = 360e6 if "360m" in name else 1.3e9
    assert abs(count / stated - 1) < 0.06

    head = d // 16
    state = len(linear) * 16 * 153 * (head + 1) * 4  # float32, with the normaliser
    state += len(windows) * (2 * 129 * d * 4 + 8)  # keys and values of the token and 128 back; a position
    state += (layers - len(linear) - len(windows)) * 2 * 2 * d * 4
    assert model.state_bytes(1000) == model.state_bytes(100_000) == state
    if name.startswith("jrt"):
        assert model.config.prefix_length == 1024
    assert model.config.initialization.residual_scale == "depth"
    assert model.config.residual_in_float32
