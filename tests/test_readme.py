"""The README's Python code runs, block by block, as a reader would paste it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "README.md").read_text(), re.S)


def test_the_readme_has_its_two_examples() -> None:
    assert len(BLOCKS) == 2


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.split("\n")[1])
def test_block_runs(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})
