"""What docs/hybrids.md shows runs, in order, and its model decodes what it prefills."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from seqmodels.channel import CHANNELS
from seqmodels.configuration import convert, parse_yaml
from seqmodels.mixers import MIXERS
from seqmodels.models import LanguageModel, ModelConfig

TEXT = (Path(__file__).parents[2] / "docs" / "hybrids.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_python(capsys) -> None:
    names: dict = {}
    for code in blocks("python"):  # as one page: later blocks use the x of an earlier one
        exec(code, names)
    assert "['balance_loss', 'dead_experts', 'load_entropy', 'load_max', 'z_loss']" in capsys.readouterr().out
    assert names["chosen"].shape == (2, 16)
    assert names["later"].y.shape == (2, 40, 64)
    assert names["rows"].shape == (2, 100, 2, 8)


def test_every_layer_in_the_table_is_registered() -> None:
    listed = re.findall(r"^\| `([a-z_]+)` \|", TEXT, re.MULTILINE)
    assert len(listed) == 6
    assert set(listed) <= {*MIXERS.shipped(), *CHANNELS.shipped()}


def test_the_model_trains_and_decodes_what_it_prefills() -> None:
    (text,) = blocks("yaml")
    torch.manual_seed(0)
    model = LanguageModel(convert(parse_yaml(text), ModelConfig)).double().eval()
    tokens = torch.randint(256, (2, 50))
    output = model.loss(tokens)
    output.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    state = model.init_state(2, dtype=torch.float64)
    with torch.no_grad():
        whole = model(tokens).logits
        stepped = torch.stack([model.step(tokens[:, t], state) for t in range(50)], dim=1)
    # Sums of a few hundred float64 terms of size about 1 through ten layers.
    torch.testing.assert_close(stepped, whole, rtol=1e-9, atol=1e-9)
