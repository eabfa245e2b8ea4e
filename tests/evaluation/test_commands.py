"""``seqmodels recall-text`` and ``seqmodels needle`` on a tiny run."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from seqmodels import cli
from seqmodels.models import LanguageModel, ModelConfig, save_model

PAGE = {"text": "Device X was made in Oslo.", "key": "place", "value": "Oslo"}


@pytest.fixture
def model(tmp_path):
    torch.manual_seed(0)
    layers = {"linear_attention": {"num_heads": 2}}
    config = ModelConfig(vocab_size=256, d_model=8, pattern="linear_attention", layers=layers)
    return save_model(LanguageModel(config), tmp_path / "model")


def run(*arguments, status=0):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(cli.app, list(map(str, arguments)))
    assert result.exit_code == status, result.output
    return result


def test_recall_text(model, tmp_path):
    (tmp_path / "fda.jsonl").write_text("\n".join([json.dumps(PAGE), json.dumps({**PAGE, "value": "O"})]))
    command = ["recall-text", model, "--data", tmp_path, "--out", tmp_path / "out", "--task", "fda"]
    output = run(*command, "--layout", "both").output
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "fda-default-2048.answers",
        "fda-twice-2048.answers",
    }
    assert output.count("fda") == 2
    assert "lost their beginning" not in output
    short = run(*command, "--layout", "twice", "--window", 100, "--out", tmp_path / "short").output
    assert "1 prompts lost their beginning to the window of 100 tokens" in short
    header, *answers = (tmp_path / "out" / "fda-twice-2048.answers").read_text().splitlines()
    assert json.loads(header)["header"]["layout"] == "twice"
    assert len(answers) == 1  # the answer of one character is left out
    run(*command, "--limit", "none")
    assert len((tmp_path / "out" / "fda-default-uncut.answers").read_text().splitlines()) == 3
    run(*[part for part in command if part not in ("--out", tmp_path / "out")])
    assert (model / "recall_text" / "fda-default-2048.answers").exists()  # beside the model
    for wrong, message in (
        (["--layout", "thrice"], "--layout is 'thrice'"),
        (["--limit", "many"], "--limit is 'many'"),
        (["--task", "dorp"], "Did you mean drop"),
        (["--limit", "50"], "more than the 50 tokens"),
    ):
        assert message in str(run(*command, *wrong, status=1).exception)


def test_needle(model, tmp_path):
    pytest.importorskip("matplotlib", reason="the heat map needs matplotlib")
    command = ["needle", model, "--out", tmp_path / "out", "--depths", 2, "--count", 1, "--max-new-tokens", 4]
    assert "256 tokens are too few" in str(run(*command, "--length", 256, status=1).exception)
    small = ["--depths", 2, "--count", 1, "--max-new-tokens", 4, "--length", 480]
    assert f"wrote {model / 'niah_single_1' / 'needle.png'}" in run("needle", model, *small).output
    assert "give --out FOLDER: hf:gpt2 has no run folder" in str(run("needle", "hf:gpt2", status=1).exception)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    binary = run(*command, "--variant", "niah_single_2", "--text", tmp_path / "binary", status=1)
    assert "binary is no UTF-8 text" in str(binary.exception)
    assert "unknown variant 'nia'" in str(run(*command, "--variant", "nia", status=1).exception)
    output = run(*command, "--length", 560, "--length", 480).output
    assert output.index("480 tokens") < output.index("560 tokens")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"needle.jsonl", "needle.json", "needle.png"}
    summary = json.loads((tmp_path / "out" / "needle.json").read_text())
    assert summary["lengths"] == [480, 560]
    assert summary["depths"] == [0, 1]
    assert len(summary["accuracy"]) == 2
