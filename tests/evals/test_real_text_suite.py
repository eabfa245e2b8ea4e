"""The real-text suite: rows from a tiny model and local fixtures, and the page made from them."""

from __future__ import annotations

import json

import pytest
import torch

from evals.recall.__main__ import main
from evals.results import FILE, read
from seqmodels.models import LanguageModel, ModelConfig, save_model

PAGE = {"text": "Device X was made in Oslo.", "key": "place", "value": "Oslo"}


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    layers = {"linear_attention": {"num_heads": 2}}
    return save_model(
        LanguageModel(ModelConfig(vocab_size=256, d_model=8, pattern="linear_attention", layers=layers)),
        tmp_path / "model",
    )


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    for task in ("fda", "swde"):
        (tmp_path / "data" / f"{task}.jsonl").write_text("\n".join([json.dumps(PAGE)] * 3))
    return tmp_path / "data"


def test_scores_become_rows_and_rows_a_page(model, data, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--suite", "real_text", "--models", str(model), "--data", str(data), "--tasks", "fda", "swde"]
    assert main([*command, "--out", str(out)]) == 0
    rows = read(out / FILE)
    scores = [row for row in rows if row["metric"] == "contains"]
    assert [(row["config"]["task"], row["config"]["layout"]) for row in scores] == [
        ("fda", "default"), ("fda", "twice"), ("swde", "default"), ("swde", "twice"),
    ]  # fmt: skip
    assert all(row["config"]["total"] == 3 and 0 <= row["value"] <= 1 for row in scores)
    (answers,) = (out / "answers").iterdir()
    kept = {path.name: path.read_bytes() for path in answers.iterdir()}
    assert len(kept) == 4
    assert main([*command, "--out", str(out)]) == 0  # every answer is there already
    assert {path.name: path.read_bytes() for path in answers.iterdir()} == kept
    assert main(["--report", str(out)]) == 0
    text = (out / "README.md").read_text()
    assert text.count(f"| {model} | default | 2048 |") == 1
    assert "| Mamba-3 paper, 1.5B | Transformer | 48.9 | 46.6 | 58.4 | 67.5 | 31.7 | 26.4 |" in text


def test_what_is_missing_is_named(model, data, tmp_path, capsys):
    def error(*arguments):
        assert main(["--suite", "real_text", "--out", str(tmp_path / "out"), *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "needs --models RUN" in error("--data", data)
    assert "unknown task 'fad'. Did you mean fda" in error("--models", model, "--data", data, "--tasks", "fad")
    assert "has neither nq.jsonl nor a data set folder" in error("--models", model, "--data", data, "--tasks", "nq")
    assert "no config.yaml" in error("--models", data, "--data", data, "--tasks", "fda")
