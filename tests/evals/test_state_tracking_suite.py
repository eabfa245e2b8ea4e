"""The state tracking suite: fair grids, honest choices, runs that survive a kill, controls that can fail."""

from __future__ import annotations

import io
import json
import os
import sys
from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from rich.console import Console

from evals.results import Results, read
from evals.state_tracking import cell as cell_module
from evals.state_tracking import runner
from evals.state_tracking.__main__ import main
from evals.state_tracking.cell import Outcome
from evals.state_tracking.display import LiveTable
from evals.state_tracking.published import SOURCES, published
from evals.state_tracking.report import write_report
from evals.state_tracking.suites import FOLDER, Cell, Suite, grid_cells, load_suite, more_seeds
from evals.state_tracking.summary import collect, judge, summarise
from seqmodels.configuration import ConfigError, dump_yaml, load_yaml
from seqmodels.tasks.state_tracking import accuracy_by_length, generate

TINY = {
    "device": "cpu",
    "tasks": {
        "parity": {
            "blocks": 1,
            "training": {
                "stages": [{"steps": 4, "batch_size": 4, "min_length": 3, "max_length": 8}],
                "validation_length": 8,
                "validation_count": 16,
                "validate_every": 2,
                "every_token": True,
            },
            "grid": {
                "learning_rate": [0.01],
                "d_model": [16],
                "time_step": {"default": [0.001, 0.1], "wide": [0.3, 1.5]},
            },
            "test_lengths": [4, 12],
            "test_count": 16,
        }
    },
    "arms": {
        "mamba3": {
            "layer": "mamba3",
            "arguments": {"d_state": 8, "head_dim": 16},
            "published": "Mamba-3",
            "control": "solves",
        },
        "gated_conv": {"layer": "gated_conv", "arguments": {"expand": 1}, "control": "fails"},
    },
}


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Silent:
    """Hears everything, shows nothing."""

    def __init__(self):
        self.heard = Counter()

    def plan(self, cells):
        self.heard["planned"] += len(list(cells))

    def progress(self, cell, message):
        self.heard["progress"] += 1

    def done(self, cell, run, kept):
        self.heard["kept" if kept else "done"] += 1

    def failed(self, cell, reason):
        self.heard["failed"] += 1


def suite_file(folder, **changes) -> str:
    path = folder / "tiny.yaml"
    path.write_text(dump_yaml({**TINY, **changes}))
    return str(path)


def tiny(folder, **changes) -> tuple[Suite, list[Cell]]:
    suite = load_suite(suite_file(folder, **changes))
    return suite, grid_cells("tiny", suite)


def outcome(validation=1.0, loss=0.5, test=(16, 16), seconds=1.0) -> Outcome:
    return Outcome(1234, 4, validation, loss, {4: (test[0], 16), 12: (test[1], 16)}, seconds)


# Protocols


@pytest.mark.parametrize("name", ["cpu", "paper"])
def test_every_arm_of_a_shipped_protocol_gets_the_same_runs_and_builds(name):
    suite = load_suite(name)
    cells = grid_cells(name, suite)
    counts = Counter((cell.task, cell.arm) for cell in cells)
    assert len(set(counts.values())) == 1
    assert len({cell.digest for cell in cells}) == len(cells)
    for task, plan in suite.tasks.items():
        for arm in suite.arms:
            searched = [cell for cell in cells if (cell.task, cell.arm) == (task, arm)]
            later = more_seeds(searched[0], plan.grid, searched)
            assert len(later) == plan.grid.seeds - 1
            assert not {cell.digest for cell in later} & {cell.digest for cell in searched}
    for cell in {(cell.task, cell.arm, cell.d_model): cell for cell in cells}.values():
        cell_module.build_model(cell, device="meta")


def test_arms_without_a_time_step_get_seeds_instead(tmp_path):
    _, cells = tiny(tmp_path)
    of = {arm: [cell for cell in cells if cell.arm == arm] for arm in ("mamba3", "gated_conv")}
    assert [(cell.seed, cell.time_step) for cell in of["mamba3"]] == [(0, "default"), (0, "wide")]
    assert [cell.arguments["dt_max"] for cell in of["mamba3"]] == [0.1, 1.5]
    assert [(cell.seed, cell.time_step) for cell in of["gated_conv"]] == [(0, "none"), (1, "none")]
    assert all("dt_max" not in cell.arguments for cell in of["gated_conv"])


def test_a_cell_is_repeated_from_its_json(tmp_path):
    _, cells = tiny(tmp_path)
    again = msgspec.json.decode(msgspec.json.encode(cells[0]), type=Cell)
    assert again == cells[0]
    assert again.digest == cells[0].digest
    assert msgspec.structs.replace(cells[0], seed=5).digest != cells[0].digest


def edited(path, value):
    """``TINY`` with the value at a dotted path replaced."""
    data = json.loads(json.dumps(TINY))
    *parents, last = path.split(".")
    at = data
    for name in parents:
        at = at[int(name)] if isinstance(at, list) else at[name]
    at[last] = value
    return data


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("tasks.parity.training.stages.0.min_length", 1, "expected 2 <= min_length"),
        ("tasks.parity.training.stages.0.max_length", 2, "lengths 3 to 2"),
        ("tasks.parity.training.stages", [], "stages is empty"),
        ("tasks.parity.training.validation_length", 1, "validation_length is 1"),
        ("tasks.parity.training.warmup_steps", 9, "warmup_steps=9 exceeds the 4 steps"),
        ("tasks.parity.test_lengths", [1], "test length 1 is too short"),
        ("tasks.parity.test_lengths", [], "test_lengths is empty"),
        ("tasks.parity.grid.d_model", [], "grid.d_model is empty"),
        ("tasks.parity.grid.learning_rte", [1.0], "learning_rte"),
        ("arms.mamba3.layer", "mamba33", "Did you mean mamba3"),
    ],
)
def test_bad_protocols_are_refused(tmp_path, path, value, message):
    file = tmp_path / "bad.yaml"
    file.write_text(dump_yaml(edited(path, value)))
    with pytest.raises(ValueError, match=message):
        load_suite(str(file))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [("arms.mamba3.arguments", {"d_stat": 8}, "d_state"), ("arms.mamba3.arguments", {"head_dim": 7}, "head_dim")],
)
def test_arguments_that_a_layer_refuses_stop_the_suite_before_it_trains(tmp_path, path, value, message):
    file = tmp_path / "bad.yaml"
    file.write_text(dump_yaml(edited(path, value)))
    with pytest.raises(ValueError, match=message):
        runner.run("bad", load_suite(str(file)), Results(tmp_path, "state_tracking"), 1, Silent())


def test_tasks_are_checked_for_what_they_have(tmp_path):
    plan = {**TINY["tasks"]["parity"], "test_lengths": [12]}
    file = tmp_path / "bad.yaml"
    file.write_text(dump_yaml({**TINY, "tasks": {"modular_arithmetic": plan}}))
    with pytest.raises(ConfigError, match="every_token"):
        load_suite(str(file))
    plan["training"] = {**plan["training"], "every_token": False}
    file.write_text(dump_yaml({**TINY, "tasks": {"modular_arithmetic": plan}}))
    with pytest.raises(ConfigError, match="no sequence has test length 12; the nearest is 11"):
        load_suite(str(file))
    file.write_text(dump_yaml({**TINY, "tasks": {"parrity": plan}}))
    with pytest.raises(ValueError, match=r"unknown task 'parrity'.*parity"):
        load_suite(str(file))


# One cell


def test_a_run_is_reproducible_and_tests_every_length(tmp_path):
    _, cells = tiny(tmp_path)
    heard = []
    first, second = cell_module.run(cells[0], heard.append), cell_module.run(cells[0])
    assert first._replace(seconds=0) == second._replace(seconds=0)
    assert [message["step"] for message in heard] == [2, 4]
    assert {length: asked for length, (_, asked) in first.test.items()} == {4: 16, 12: 16}
    assert first != cell_module.run(msgspec.structs.replace(cells[0], seed=1))._replace(seconds=first.seconds)


@pytest.mark.parametrize(
    ("validations", "best"),
    [
        ([(0.5, 1.0), (0.9, 2.0), (0.8, 0.1)], 4),
        ([(1.0, 0.3), (1.0, 0.2), (1.0, 0.25)], 4),
        ([(0.1, 1.0), (0.2, 1.0), (0.3, 1.0)], 6),
    ],
)
def test_the_weights_of_the_best_validation_are_tested(tmp_path, monkeypatch, validations, best):
    _, cells = tiny(tmp_path)
    stage = msgspec.structs.replace(cells[0].training.stages[0], steps=6)
    training = msgspec.structs.replace(cells[0].training, stages=(stage,))
    weights, tested = [], []

    def validate(model, cell, examples):
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return validations[len(weights) - 1]

    def predict(model, examples, device):
        tested.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        return np.where(examples.targets >= 0, examples.targets, 0)

    monkeypatch.setattr(cell_module, "_validate", validate)
    monkeypatch.setattr(cell_module, "_predictions", predict)
    found = cell_module.run(msgspec.structs.replace(cells[0], training=training))
    assert found.step == best
    assert (found.validation_accuracy, found.validation_loss) == validations[best // 2 - 1]
    assert torch.equal(tested[0], weights[best // 2 - 1])
    assert not torch.equal(weights[0], weights[1])
    assert found.test == {4: (16, 16), 12: (16, 16)}


class Oracle:
    """A language model that knows the parity of up to ``horizon`` bits, and says the opposite after that."""

    def __init__(self, horizon):
        self.horizon = horizon

    def __call__(self, tokens):
        odd = (tokens == 2).cumsum(1) % 2
        late = torch.arange(tokens.shape[1]) >= self.horizon
        answers = 1 + (odd ^ late.long())
        return type("Output", (), {"logits": torch.nn.functional.one_hot(answers, 3).float() * 9})

    def encode(self, tokens):
        return type("Hidden", (), {"hidden": self(tokens).logits})

    def logits(self, hidden):
        return hidden


def test_evaluation_sees_an_oracle_fail_where_it_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(cell_module, "TOKENS_AT_ONCE", 64)  # several pieces, the last one shorter
    _, cells = tiny(tmp_path)
    examples = generate("parity", 50, 20, 20, seed=1, every_token=True)
    found = accuracy_by_length("parity", cell_module._predictions(Oracle(10), examples, "cpu"), examples)
    assert found == {length: (50 if length <= 11 else 0, 50) for length in range(2, 21)}
    for length, accuracy in ((11, 1.0), (12, 0.0)):
        last = generate("parity", 50, length, length, seed=1)
        assert cell_module._validate(Oracle(10), cells[0], last)[0] == accuracy


def test_a_loss_that_is_not_finite_ends_the_cell(tmp_path, monkeypatch):
    _, cells = tiny(tmp_path)
    monkeypatch.setattr(cell_module, "_loss", lambda *_: torch.tensor(torch.nan, requires_grad=True))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2"):
        cell_module.run(cells[0])


# Many cells

SCRIPT = """
import json, os, pathlib, sys, time
cell = json.load(sys.stdin)
with open({log!r}, "a") as log:
    log.write(cell["arm"] + "/" + cell["time_step"] + "/" + str(cell["seed"]) + "\\n")
{before}
good = cell["time_step"] == "wide"
print(json.dumps({{"step": 1, "steps": 2, "loss": 0.1, "validation": 0.5}}), flush=True)
print(json.dumps({{"outcome": {{"parameters": 7, "step": 2, "validation_accuracy": 1.0 if good else 0.5,
    "validation_loss": 0.2, "test": {{"4": [16, 16], "12": [16 if good else 8, 16]}}, "seconds": 0.5}}}}), flush=True)
"""


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """Cells that answer at once instead of training; what they do before that is the argument."""
    log = tmp_path / "started.log"

    def use(before=""):
        script = tmp_path / "script.py"
        script.write_text(SCRIPT.format(log=str(log), before=before))
        monkeypatch.setattr(runner, "COMMAND", (sys.executable, str(script)))
        log.write_text("")
        return lambda: log.read_text().split()

    return use


def test_grid_then_seeds_at_the_point_that_validated_best(tmp_path, scripted):
    started = scripted()
    plan = {**TINY["tasks"]["parity"], "grid": {**TINY["tasks"]["parity"]["grid"], "seeds": 3}}
    suite, _ = tiny(tmp_path, tasks={"parity": plan})
    results, display = Results(tmp_path / "out", "state_tracking"), Silent()
    runs, complete = runner.run("tiny", suite, results, 2, display)
    assert complete
    assert display.heard == {"planned": 8, "done": 8, "progress": 8}
    assert sorted(started()) == sorted(
        ["mamba3/default/0", "mamba3/wide/0", "mamba3/wide/1", "mamba3/wide/2"]
        + [f"gated_conv/none/{seed}" for seed in range(4)]
    )
    (mamba3,) = (summary for summary in summarise(runs) if summary.arm == "mamba3")
    assert mamba3.about["point"] == "lr=0.01,d=16,dt=wide"
    assert [run.seed for run in mamba3.chosen] == [0, 1, 2]
    assert mamba3.median == 1
    rows = read(results.path)
    assert Counter(row["metric"] for row in rows) == {
        "scaled_accuracy": 16, "validation_accuracy": 8, "validation_loss": 8, "run_time": 8,
    }  # fmt: skip
    (row,) = (row for row in rows if row["case"] == "parity/mamba3/lr=0.01,d=16,dt=default/L12")
    assert (row["suite"], row["layer"], row["value"], row["seed"]) == ("state_tracking", "mamba3", 0.0, 0)


def test_finished_cells_are_kept_failed_ones_are_tried_again(tmp_path, scripted):
    suite, _ = tiny(tmp_path)
    results, display = Results(tmp_path / "out", "state_tracking"), Silent()
    scripted('if cell["time_step"] == "wide": raise RuntimeError("broken on purpose")')
    runs, complete = runner.run("tiny", suite, results, 2, display)
    assert not complete
    assert len(runs) == 3
    assert display.heard["failed"] == 1
    (failed,) = (row for row in read(results.path) if row["metric"] == "failed")
    assert failed["config"]["reason"] == "RuntimeError: broken on purpose"
    started, display = scripted(), Silent()
    runs, complete = runner.run("tiny", suite, results, 2, display)
    assert complete
    assert started() == ["mamba3/wide/0"]
    assert display.heard == {"planned": 4, "kept": 3, "done": 1, "progress": 1}
    changed = {**TINY["tasks"]["parity"], "test_count": 17}
    other, _ = tiny(tmp_path, tasks={"parity": changed})
    started = scripted()
    runner.run("tiny", other, results, 2, Silent())
    assert len(started()) == 4  # another protocol: nothing of the first one counts


def test_an_interrupted_suite_stops_its_processes_and_goes_on(tmp_path, scripted):
    suite, _ = tiny(tmp_path)
    results = Results(tmp_path / "out", "state_tracking")
    pid = tmp_path / "pid"
    scripted(f"""
if cell["arm"] == "gated_conv":
    pathlib.Path({str(pid)!r}).write_text(str(os.getpid()))
    time.sleep(60)""")

    class Interrupting(Silent):
        def done(self, cell, run, kept):
            super().done(cell, run, kept)
            if self.heard["done"] == 2:
                while not pid.exists() or not pid.read_text():
                    pass
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runner.run("tiny", suite, results, 3, Interrupting())
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert len(collect(read(results.path))) == 2
    started = scripted()
    assert runner.run("tiny", suite, results, 2, Silent())[1]
    assert sorted(started()) == ["gated_conv/none/0", "gated_conv/none/1"]


def test_real_cells_in_processes_of_their_own(tmp_path):
    suite, cells = tiny(tmp_path, arms={"gated_conv": TINY["arms"]["gated_conv"]})
    runs, complete = runner.run("tiny", suite, Results(tmp_path / "out", "state_tracking"), 2, Silent())
    assert complete
    here = cell_module.run(cells[0])
    (same,) = (run for run in runs if run.about["digest"] == cells[0].digest)
    assert same.curve == {length: 2 * right / asked - 1 for length, (right, asked) in here.test.items()}


# From rows to verdicts


def written(folder, cells, outcomes):
    results = Results(folder, "state_tracking")
    for cell, found in zip(cells, outcomes, strict=True):
        runner.write_rows(results, cell, found)
    return results


def test_the_point_is_chosen_by_validation_and_not_by_the_test(tmp_path):
    _, cells = tiny(tmp_path)
    outcomes = [outcome(0.75, test=(16, 16)), outcome(0.875, test=(16, 4)), outcome(1, 0.3), outcome(1, 0.2)]
    results = written(tmp_path / "out", cells, outcomes)
    arms = {summary.arm: summary for summary in summarise(collect(read(results.path)).values())}
    mamba3, conv = arms["mamba3"], arms["gated_conv"]
    assert mamba3.about["point"].endswith("dt=wide")
    assert mamba3.median == -0.5  # 4 of 16 answers, chance 1/2
    assert mamba3.best == 1
    assert [run.seed for run in conv.chosen] == [0, 1]


@pytest.mark.parametrize(
    ("solver", "failer", "holds"),
    [(16, 8, [True, True]), (15, 8, [False, True]), (16, 10, [True, False]), (8, 8, [False, True])],
)
def test_controls_hold_and_fail(tmp_path, solver, failer, holds):
    """15 of 16 is 0.875 scaled, below 0.95; 10 of 16 is 0.25, above 0.2, and one such run is enough."""
    _, cells = tiny(tmp_path)
    outcomes = [outcome(0.5, test=(8, 8)), outcome(test=(16, solver)), outcome(test=(9, 8)), outcome(test=(9, failer))]
    results = written(tmp_path / "out", cells, outcomes)
    verdicts = dict(judge(summarise(collect(read(results.path)).values())))
    solves, fails = (next(text for text in verdicts if arm in text) for arm in ("mamba3", "gated_conv"))
    assert [verdicts[solves], verdicts[fails]] == holds
    assert "median" in solves
    assert "of 2 runs" in fails


def test_a_cell_without_its_last_row_does_not_count(tmp_path):
    _, cells = tiny(tmp_path)
    results = written(tmp_path / "out", cells[:2], [outcome(), outcome()])
    lines = results.path.read_text().splitlines()
    results.path.write_text("\n".join(lines[:-1]) + "\n")
    assert set(collect(read(results.path))) == {cells[0].digest}


def test_only_the_newest_protocol_of_a_suite_is_compared(tmp_path):
    _, cells = tiny(tmp_path)
    other = msgspec.structs.replace(cells[2], test_count=99)
    results = written(tmp_path / "out", [cells[0], other], [outcome(), outcome()])
    rows = read(results.path)
    for row, newer in ((row, row["config"]["digest"] == other.digest) for row in rows):
        row["time"] = f"{2001 if newer else 2000}-01-01T00:00:00+00:00"
    assert [summary.arm for summary in summarise(collect(rows).values())] == ["gated_conv"]


def test_report_from_rows_alone(tmp_path):
    _, cells = tiny(tmp_path)
    written(tmp_path / "a", cells[:2], [outcome(0.5, test=(16, 8)), outcome()])
    written(tmp_path / "b", cells[2:], [outcome(test=(8, 8)), outcome(test=(8, 6))])
    page = write_report(tmp_path / "a", [tmp_path / "a", tmp_path / "b"]).read_text()
    (line,) = (line for line in page.splitlines() if line.startswith("| mamba3 | 1,234 |"))
    cells_of_line = [part.strip() for part in line.strip("|").split("|")]
    assert cells_of_line == ["mamba3", "1,234", "lr=0.01,d=16,dt=wide", "1.000", "1.000", "1.000 (2)", "1.000", "1.000"]
    assert (tmp_path / "a" / "parity-tiny.png").stat().st_size > 5000
    assert "Control holds: tiny/parity/mamba3" in page
    assert "Not measured in this suite: modular_arithmetic, modular_arithmetic_brackets" in page
    assert "| Grazzi et al. | sLSTM | 1.000 | 0.787 | 0.173 |" in page
    assert "| mamba3 | lr=0.01,d=16,dt=default | 0.000 |" in page
    assert "has not finished" not in page
    unfinished = write_report(tmp_path / "c", [tmp_path / "a", written(tmp_path / "c", cells[2:3], [outcome()]).path])
    assert "runs by arm so far: gated_conv 1, mamba3 2" in unfinished.read_text()
    assert "| gated_conv | lr=0.01,d=16,dt=none | 0.000, -0.250 |" in page


def test_published_rows_named_by_arms_exist():
    names = {name for table in SOURCES.values() for name in table}
    for file in FOLDER.glob("*.yaml"):
        assert {arm["published"] for arm in load_yaml(file)["arms"].values() if "published" in arm} <= names
    assert published("Mamba-3", "modular_arithmetic") == 0.9851
    assert published(None, "parity") is None


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_shown(tmp_path, terminal):
    _, cells = tiny(tmp_path)
    results = written(tmp_path / "out", cells[:1], [outcome(test=(16, 12))])
    run = collect(read(results.path))[cells[0].digest]
    text = io.StringIO()
    with LiveTable(Console(file=text, force_terminal=terminal, width=160)) as display:
        display.plan(cells)
        display.progress(cells[1], {"step": 2, "steps": 4, "loss": 0.25, "validation": 0.75})
        display.done(cells[0], run, kept=False)
        display.failed(cells[2], "RuntimeError: broken")
    shown = text.getvalue()
    assert "0.500 at 12" in shown
    assert "failed: RuntimeError: broken" in shown
    if terminal:
        assert "2 of 4 cells" in shown
        assert "step 2 of 4: accuracy 0.750 (validation), loss 0.250" in shown
    else:
        assert shown.count("\n") == 2


# The command


def test_command_line(tmp_path, scripted, capsys):
    scripted()
    out = str(tmp_path / "out")
    arguments = ["--suite", suite_file(tmp_path), "--out", out]
    assert main([*arguments, "--arms", "mamba3"]) == 0
    assert "control holds: tiny/parity/mamba3 at length 12: median 1.000 of 1 seeds" in capsys.readouterr().out
    assert main([*arguments, "--arms", "gated_conv", "--jobs", "1"]) == 0
    assert main(["--report", out]) == 0
    scripted('cell["time_step"] = "default"')  # from here on nothing solves anything
    assert main(["--suite", suite_file(tmp_path), "--out", str(tmp_path / "other"), "--arms", "mamba3"]) == 1
    assert "control FAILS: tiny/parity/mamba3" in capsys.readouterr().out
    assert main([*arguments, "--list"]) == 0
    assert "parity/gated_conv/lr=0.01,d=16,dt=none seed 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "cpuu", "--list"], "Did you mean cpu?"),
        (["--suite", "cpu", "--arms", "mamba33", "--list"], "Did you mean mamba3"),
        (["--suite", "cpu", "--tasks", "modular_arithmetic", "--list"], "cpu.yaml has no task"),
        (["--report", "/nowhere"], "no finished state_tracking runs in /nowhere"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_full_protocol_without_a_gpu_says_what_can_be_done(tmp_path, capsys):
    assert main(["--suite", "paper", "--out", str(tmp_path)]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_missing_arguments():
    for arguments in ([], ["--suite", "cpu"], ["--suite", "cpu", "--jobs", "0", "--out", "x"]):
        with pytest.raises(SystemExit):
            main(arguments)
    assert not Path("x").exists()
