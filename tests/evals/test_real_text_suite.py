"""The real-text suite: rows from a tiny model and local fixtures, and the page made from them."""

from __future__ import annotations

import json

import pytest
import torch

from evals.recall import real_text
from evals.recall.__main__ import main
from evals.results import FILE, read
from seqmodels.models import LanguageModel, ModelConfig, save_model

NQ = {"context": "Rome is old.", "question": "Rome is", "orig_question": "what is Rome", "answers": ["old"]}
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


def test_several_limits_are_several_tables(model, tmp_path, monkeypatch):
    asked = []

    def load(task, source, *, nq_size):
        asked.append((task, nq_size))
        return [PAGE if task == "fda" else {**NQ, "context": NQ["context"] * 180}]

    monkeypatch.setattr(real_text, "load_examples", load)
    command = ["--suite", "real_text", "--models", str(model), "--tasks", "fda", "nq", "--limits", "100", "512", "4096"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert asked[3:] == [("nq", 512), ("nq", 512), ("nq", 2048)]  # the hub's own size, or the next larger one
    rows = [row["config"] for row in read(tmp_path / "out" / FILE) if row["metric"] == "contains"]
    assert {(row["task"], row["layout"], row["limit"]) for row in rows} == {
        (task, layout, limit) for task in ("fda", "nq") for layout in ("default", "twice") for limit in (100, 512, 4096)
    }
    assert len(rows) == 12
    assert main(["--report", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert all(text.count(f"| {model} | twice | {limit} |") == 1 for limit in (100, 512, 4096))
    marked = [line for line in text.splitlines() if "(1)\\*" in line]
    assert len(marked) == 2  # 2,160 bytes once and twice, uncut at 4096, in a window of 2048
    assert all("| 4096 |" in line for line in marked)
    assert "lost their beginning" in text


def test_what_is_missing_is_named(model, data, tmp_path, capsys):
    def error(*arguments):
        assert main(["--suite", "real_text", "--out", str(tmp_path / "out"), *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "needs --models RUN" in error("--data", data)
    assert "unknown task 'fad'. Did you mean fda" in error("--models", model, "--data", data, "--tasks", "fad")
    assert "has neither nq.jsonl nor a data set folder" in error("--models", model, "--data", data, "--tasks", "nq")
    assert "limit is 50; expected more" in error("--models", model, "--data", data, "--limits", "50")
    assert "is no folder; expected a run folder" in error("--models", "absent")
    assert "no config.yaml" in error("--models", data, "--data", data, "--tasks", "fda")
