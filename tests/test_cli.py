"""The command line: help without torch, strict arguments, one-line errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from seqmodels import cli
from seqmodels.models import LanguageModel, ModelConfig, save_model

CONFIGS = Path(__file__).parents[1] / "configs" / "models"
runner = CliRunner(env={"COLUMNS": "200"})


def run(*args: str, status: int = 0) -> str:
    result = runner.invoke(cli.app, list(args))
    assert result.exit_code == status, result.output
    return result.output


def test_help_lists_every_command_without_importing_torch() -> None:
    code = (
        "import sys; sys.argv = ['seqmodels', '--help']\n"
        "from seqmodels import cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules and 'seqmodels.commands.info' not in sys.modules\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    for path in cli.FOLDER.glob("*.py"):
        if not path.stem.startswith("_"):
            assert f"\n  {path.stem.replace('_', '-')} " in shown
    assert "Continue prompts with a trained model." in shown


@pytest.mark.parametrize("name", ["info", "list", "generate"])
def test_every_command_has_help(name: str) -> None:
    assert "Usage" in run(name, "--help")


def test_an_unknown_command_is_refused_with_the_nearest() -> None:
    assert "unknown command 'inof'. Did you mean info" in run("inof", status=2)


def test_info_prints_the_account_of_a_config() -> None:
    output = run("info", str(CONFIGS / "demo-hybrid.yaml"), "vocab_size=300", "--length", "100")
    assert f"{300 * 192:,}" in output
    assert "mamba3" in output
    assert "one sequence of 100 tokens" in output


def test_info_without_a_config_says_what_is_missing_and_how_to_get_it() -> None:
    output = run("info")
    assert torch.__version__ in output
    for name in ("reference", "torch", "cpu", "triton", "cuda"):
        assert name in output
    if not torch.cuda.is_available():
        assert "no GPU" in output


def test_list_shows_layers_with_the_backends_of_their_ops() -> None:
    output = run("list")
    for name in ("attention", "gated_conv", "linear_attention", "swiglu", "mlp"):
        assert name in output
    assert "short_conv: reference, torch, cpu" in output
    output = run("list", "attention")
    assert "num_heads" in output
    assert "required" in output
    with pytest.raises(ValueError, match=r"unknown layer 'atention'\. Did you mean"):
        runner.invoke(cli.app, ["list", "atention"], catch_exceptions=False)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(vocab_size=256, d_model=16, pattern="gated_conv swiglu"))
    return save_model(model, tmp_path / "model")


def test_generate_streams_one_prompt_and_batches_several(saved: Path) -> None:
    one = run("generate", str(saved), "--prompt", "def f(", "--max-new-tokens", "20", "--seed", "5")
    assert one.startswith("def f(")
    assert "tokens a second" in one
    assert (
        one.splitlines()[0]
        == run("generate", str(saved), "--prompt", "def f(", "--max-new-tokens", "20", "--seed", "5").splitlines()[0]
    )
    two = run("generate", str(saved), "--prompt", "def f(", "--prompt", "x", "--max-new-tokens", "5", "--stop", "zzz")
    assert "--- 1 of 2\ndef f(" in two
    assert "--- 2 of 2\nx" in two


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "{tmp}/none", "--prompt", "x"], "holds no model: there is no config.yaml"),
        (["generate", "{saved}", "--prompt", ""], "prompt 0 is empty"),
        (["generate", "{saved}", "--prompt", "x", "--temperature", "-1"], "temperature is -1.0"),
        (["info", "{tmp}/none.yaml"], "none.yaml"),
        (["info", str(CONFIGS / "demo-hybrid.yaml"), "d_modle=3"], "d_modle"),
        (["info", str(CONFIGS / "demo-hybrid.yaml"), "--dtype", "int8"], "unknown dtype 'int8'"),
    ],
)
def test_errors_are_one_line_and_exit_1(
    arguments: list[str],
    message: str,
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["seqmodels", *(each.format(tmp=tmp_path, saved=saved) for each in arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("seqmodels: ")
    assert "Traceback" not in error
