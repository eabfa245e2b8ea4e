"""What docs/linear_attention.md shows runs, and names every map and layer there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from seqmodels.mixers import MIXERS
from seqmodels.mixers.feature_maps import FEATURE_MAPS

TEXT = (Path(__file__).parents[2] / "docs" / "linear_attention.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS)
def test_python(code: str) -> None:
    exec(code, {})


def test_names() -> None:
    named = set(re.findall(r"`(\w+)`", TEXT))
    assert set(FEATURE_MAPS.shipped()) <= named
    assert {"linear_attention", "based", "hedgehog", "hedgehog_window", "prefix_linear_attention"} <= named & set(
        MIXERS.shipped()
    )
