"""The layer in docs/your_own_layer.md, and all code on that page and in docs/laws.md, run as printed."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest

from seqmodels.mixers import MIXERS

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["your_own_layer.md", "laws.md"])
def test_code_on_the_page_runs(page, monkeypatch):
    module = types.ModuleType("code_of_" + page.removesuffix(".md"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(MIXERS, "_classes", dict(MIXERS._classes))  # what the page registers goes with it
    code = blocks(page)
    assert code
    for block in code:
        exec(compile(block, str(DOCS / page), "exec", dont_inherit=True), vars(module))


def test_example_is_short():
    layer = blocks("your_own_layer.md")[0].strip().splitlines()
    assert "class Retention(Mixer):" in layer
    assert len(layer) < 40
