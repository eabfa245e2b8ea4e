"""What docs/models.md shows runs, and its table of defaults is the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from seqmodels.configuration import convert, parse_yaml
from seqmodels.models import LanguageModel, ModelConfig

TEXT = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python(code: str) -> None:
    names: dict = {}
    exec(code, names)
    assert [len(text) for text in names["texts"]] == [10, 10]


@pytest.mark.parametrize(("text", "sites", "weights"), zip(blocks("yaml"), (12, 10), (11, 10), strict=True))
def test_yaml(text: str, sites: int, weights: int) -> None:
    model = LanguageModel(convert(parse_yaml(text), ModelConfig), device="meta")
    assert len(model.backbone.order) == sites
    assert len(model.backbone.blocks) == weights


def test_defaults() -> None:
    rows = re.findall(r"^\| `([^|]*)` \| `([^|]*)` \|", TEXT, re.MULTILINE)
    assert len(rows) == 13
    defaults = ModelConfig(vocab_size=1, d_model=1, pattern="mlp")
    for names, values in rows:
        for name, value in zip(names.split("`, `"), values.split("`, `"), strict=True):
            found = defaults
            for part in name.split("."):
                found = getattr(found, part)
            assert found == parse_yaml(value), name
