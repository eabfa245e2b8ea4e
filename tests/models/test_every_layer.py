"""Every registered layer works inside a language model, as a configuration names it."""

from __future__ import annotations

import pytest
import torch

from seqmodels.configuration import convert, dump_yaml, parse_yaml
from seqmodels.layout import Layout
from seqmodels.models import LanguageModel, ModelConfig, account, parameter_hints
from seqmodels.models.arguments import default_arguments, layer_class, layer_names

WHAT_HAS_NO_DEFAULT = {"num_heads": 2}
NAMES = [name for name in layer_names() if not name.startswith("test_")]


def config(name: str) -> ModelConfig:
    arguments = {
        key: WHAT_HAS_NO_DEFAULT[key] for key, default in default_arguments(layer_class(name)).items() if default is ...
    }
    objective = "prefix" if layer_class(name).causality == "prefix" else "next_token"
    values = {"vocab_size": 31, "d_model": 64, "pattern": f"{name} swiglu", "layers": {name: arguments}}
    return convert({**values, "objective": objective}, ModelConfig)


@pytest.mark.parametrize("name", NAMES)
def test_layer_in_a_model(name: str) -> None:
    if layer_class(name).causality == "bidirectional":
        with pytest.raises(ValueError, match="is bidirectional"):
            LanguageModel(config(name))
        return
    torch.manual_seed(0)
    model = LanguageModel(config(name), dtype=torch.float64)
    assert convert(parse_yaml(dump_yaml(model.config)), ModelConfig) == model.config
    ids = torch.randint(0, 31, (2, 12))
    prefixes = [4, 6] if model.config.objective == "prefix" else None
    layout = None if prefixes is None else Layout.full(2, 12, prefix_lengths=prefixes)
    model.loss(ids, layout=layout).loss.backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
    assert set(parameter_hints(model)) <= {key for key, _ in model.named_parameters()}
    model.eval()

    state = model.init_state(2, max_length=12)
    assert state.nbytes == model.state_bytes(12, batch_size=2)
    rows = account(model.config, length=12, dtype=torch.float64)
    assert rows[-1].parameters == model.num_parameters()
    assert 2 * rows[-1].state_bytes == state.nbytes
    assert rows[-1].flops > 0
    whole = model(ids, state, layout=layout, return_state=True)
    if prefixes is None:
        stepped = torch.stack([model.step(ids[:, t], state) for t in range(12)], 1)
        torch.testing.assert_close(stepped, whole.logits, rtol=1e-8, atol=1e-10)
