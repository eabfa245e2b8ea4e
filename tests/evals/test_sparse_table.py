"""The measurement of sparse gradients runs and leaves rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from evals.results import read
from evals.sparse_table import main


def test_rows_of_both_gradients(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    main(tmp_path, width=8, num_subkeys=40, tokens=[1, 16], repeats=1)
    torch.set_num_threads(threads)
    found = {(row["case"], row["metric"]): row["value"] for row in read(tmp_path)}
    assert found["1 tokens", "gradient, dense"] == 40**2 * 8 * 4
    # One token reads at most 4 heads x 32 rows of 8 numbers, each with an index.
    assert 0 < found["1 tokens", "gradient, sparse"] <= 128 * (8 * 4 + 8)
    assert 0 < found["1 tokens", "share of rows read"] < found["16 tokens", "share of rows read"] <= 1
    assert found["16 tokens", "step time, dense over sparse"] > 0
    assert "dense / sparse" in capsys.readouterr().out
