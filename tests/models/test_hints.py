from __future__ import annotations

import copy
from typing import ClassVar

import torch
from model_helpers import HYBRID, hybrid
from torch import nn

from seqmodels.mixers import ParameterHint
from seqmodels.models import LanguageModel, ModelConfig, parameter_hints

NAME = "backbone.blocks.0.layer.scale"
HINT = ParameterHint(weight_decay=0.0, learning_rate=1e-3)


def test_hints_are_found_by_name() -> None:
    model = hybrid(pattern="test_running_sum swiglu linear_attention")
    hints = parameter_hints(model)
    assert hints[NAME] == HINT
    assert set(hints) == {NAME, "backbone.blocks.2.layer.decay_bias"}
    assert set(hints) <= {name for name, _ in model.named_parameters()}


def test_hints_survive_what_loses_marks_on_tensors() -> None:
    config = ModelConfig(**{**HYBRID, "pattern": "test_running_sum swiglu"})
    model = LanguageModel(config)
    assert parameter_hints(copy.deepcopy(model))[NAME] == HINT
    empty = LanguageModel(config, device="meta").to_empty(device="cpu")
    empty.load_state_dict(model.state_dict(), assign=True)
    assert parameter_hints(empty)[NAME] == HINT
    assert parameter_hints(model.to(torch.bfloat16))[NAME] == HINT
    assert parameter_hints(nn.ModuleDict({"module": model}))[f"module.{NAME}"] == HINT


def test_shared_weights_have_one_hint_and_an_outer_module_decides() -> None:
    model = hybrid(pattern="s swiglu s", layers={"s": {"layer": "test_running_sum", "share": "a"}, **HYBRID["layers"]})
    assert set(parameter_hints(model)) == {NAME}

    class Outer(nn.Module):
        parameter_hints: ClassVar = {f"inner.{NAME}": ParameterHint(learning_rate=0.5)}

        def __init__(self) -> None:
            super().__init__()
            self.inner = model

    assert parameter_hints(Outer())[f"inner.{NAME}"].learning_rate == 0.5
