"""`train`, `eval-text` and `demo` as a user runs them, on a corpus small enough for seconds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from training_cases import tiny_data, write_corpus
from typer.testing import CliRunner

from seqmodels.cli import app
from seqmodels.configuration import dump_yaml
from seqmodels.tasks.corpus import CorpusError
from seqmodels.tasks.evaluation import score_documents
from seqmodels.training.config import load_train_config
from seqmodels.training.data import load_text
from seqmodels.training.run_folder import RunFolder

ROOT = Path(__file__).parents[2]


def seqmodels(*arguments: object) -> str:
    """What the command prints, run in this process."""
    done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def refused(*arguments: object) -> str:
    """The one line on which a real process ends."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "seqmodels.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    write_corpus(folder / "corpus")
    (folder / "tiny.yaml").write_text(dump_yaml(tiny_data(folder)))
    output = seqmodels("train", folder / "tiny.yaml", "steps=4", "--out", folder / "run")
    assert re.search(r"step +4 +held-out bits per byte \d\.\d+", output)
    return folder


def test_train_again_needs_resume(trained):
    message = refused("train", trained / "tiny.yaml", "steps=4", "--out", trained / "run")
    assert message.startswith("seqmodels: ")
    assert "already holds a run" in message
    seqmodels("train", trained / "tiny.yaml", "steps=4", "--out", trained / "run", "--resume")


def test_an_unknown_key_is_one_line_with_the_nearest_name(trained):
    message = refused("train", trained / "tiny.yaml", "optimizer.learning_rat=1", "--out", trained / "x")
    assert message == (
        "seqmodels: unknown configuration key 'optimizer.learning_rat'. Did you mean optimizer.learning_rate?\n"
    )
    assert not (trained / "x").exists()


def test_eval_text_measures_what_the_library_measures(trained):
    from seqmodels.models.loading import load_model

    run = RunFolder.open(trained / "run")
    config = run.config()
    data = load_text(config.data, seed=config.seed, vocab_size=256)
    score = score_documents(load_model(run.path).model, *data.held_out)
    output = seqmodels("eval-text", run.path, "--data", "held-out")
    assert f"{score.bits_per_byte:.4f}" in output
    assert f"{score.perplexity:.3f}" in output
    assert f"{score.tokens:,}" in output
    whole = seqmodels("eval-text", run.path, "--data", trained / "corpus", "--window", 8)
    assert "on 12 documents" in whole
    with pytest.raises(CorpusError, match="does not exist"):
        seqmodels("eval-text", run.path, "--data", trained / "absent")


def test_the_demo_runs_and_writes_its_numbers(tmp_path):
    write_corpus(tmp_path / "corpus")
    changes = ["steps=2", "schedule.warmup_steps=1", "batch_size=1", "data.sequence_length=64", "validation_rows=1",
               f"data.source={tmp_path / 'corpus'}", f"data.cache={tmp_path / 'cache'}"]  # fmt: skip
    output = seqmodels("demo", "--out", tmp_path / "run", *changes)
    for expected in ("this model", "lzma", "zlib", "byte trigram", "attention only", "def read_config", "tokens/s"):
        assert expected in output
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert set(results["bits_per_byte"]) >= {"this model", "lzma", "zlib", "byte trigram"}
    assert all(0 < bits < 10 for bits in results["bits_per_byte"].values())
    sizes = results["state_bytes"]
    assert sizes["1024"]["this model"] == sizes["1048576"]["this model"]
    assert sizes["1048576"]["attention only"] > 1000 * sizes["1024"]["attention only"]
    assert (tmp_path / "run" / "loss.png").exists()


def test_the_demo_is_of_the_promised_size():
    from seqmodels.models import LanguageModel, load_config

    config = load_train_config(ROOT / "configs" / "train" / "demo.yaml")
    parameters = LanguageModel(config.model, device="meta").num_parameters()
    assert 2e6 < parameters < 4e6
    twin = load_config(ROOT / "configs" / "models" / "demo-attention.yaml")
    assert abs(LanguageModel(twin, device="meta").num_parameters() / parameters - 1) < 0.01
    assert {"mamba3", "attention"} <= set(config.model.pattern.split())
    assert config.data.source == "stdlib"
    assert config.precision == "float32"
