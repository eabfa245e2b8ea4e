"""The recall suite: protocols that parse, cells that train and score right, sweeps that survive, controls that fail."""

from __future__ import annotations

import io
import json
import math
import sys
from collections import Counter

import msgspec
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from evals import sweep
from evals.recall import cell as cell_module
from evals.recall import runner, speed
from evals.recall.__main__ import main
from evals.recall.cell import Outcome, Trainer, build_model, state_bytes
from evals.recall.data import TEST_SEED, labels_of, make, resident
from evals.recall.display import LiveTable
from evals.recall.layers import Layer, LayerDefaults, load_layers
from evals.recall.published import BASED_POINTS, SOURCES, ZOOLOGY_ACCURACY, published
from evals.recall.report import write_report
from evals.recall.suites import FOLDER, TUNING_SEED, Cell, Suite, grid_cells, load_suite, suite_names
from evals.recall.summary import collect, judge, summarise
from evals.recall.tuning import tuning_cells
from evals.results import Results, read
from seqmodels.configuration import ConfigError, dump_yaml
from seqmodels.mixers import MIXERS
from seqmodels.tasks.recall.examples import NO_TARGET, Examples

TINY = {
    "device": "cpu",
    "pattern": "{depth}x({layer})",
    "training": {"batch_size": 8, "epochs": 2},
    "grid": {"d_model": [16], "seeds": 2},
    "tasks": {
        "mqar": {
            "train": [{"count": 20, "settings": {"length": 16, "pairs": 2, "vocab_size": 32}}],
            "test": [
                {"count": 12, "settings": {"length": 16, "pairs": 2, "vocab_size": 32}},
                {"count": 12, "settings": {"length": 24, "pairs": 3, "vocab_size": 32}},
            ],
            "chance": 0.0625,
        }
    },
    "arms": {"attention": {"layer": "attention"}, "gated_conv": {"layer": "gated_conv", "published": "BaseConv"}},
    "controls": {"attention": "solves", "gated_conv": "fails"},
    "control_tasks": ["mqar"],
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
        self.heard["planned"] += len(cells)

    def progress(self, cell, message):
        self.heard["progress"] += 1

    def done(self, cell, run, kept):
        self.heard["kept" if kept else "done"] += 1

    def failed(self, cell, reason):
        self.heard["failed"] += 1


def edited(path, value):
    """``TINY`` with the value at a dotted path replaced."""
    data = json.loads(json.dumps(TINY))
    *parents, last = path.split(".")
    at = data
    for name in parents:
        at = at[int(name)] if isinstance(at, list) else at[name]
    at[last] = value
    return data


def tiny(folder, data=TINY) -> tuple[Suite, list[Cell]]:
    file = folder / "tiny.yaml"
    file.write_text(dump_yaml(data))
    suite = load_suite(str(file))
    return suite, grid_cells("tiny", suite)


def outcome(score=1.0, **changes) -> Outcome:
    return Outcome(
        **{
            "parameters": 1234, "epochs": 2, "steps": 6, "ended": "epochs", "loss": 0.5, "history": [0.1, score],
            "test": {"length=16,pairs=2": score, "length=24,pairs=3": score}, "train_seconds": 2.0,
            "tokens_per_second": 1e5, "seconds": 3.0, "state_bytes": 512, "mixer_bytes": 256, "digest": "abc",
            **changes,
        }
    )  # fmt: skip


# Protocols


@pytest.mark.parametrize("name", suite_names())
def test_shipped_suites_name_layers_tasks_and_settings_that_exist(name):
    cells = grid_cells(name, load_suite(name))
    assert len({(cell.digest, cell.seed) for cell in cells}) == len(cells)
    if name == "cpu":
        causal = {layer for layer in MIXERS.shipped() if MIXERS[layer].causality == "causal"}
        assert {cell.arm for cell in cells} == causal | {"short_conv_linear_attention"}
        runner.check([cell for cell in cells if cell.seed == 0])
    else:  # each task and arm once
        first = {(cell.task, cell.arm): cell for cell in cells if "[" not in cell.plan}
        for cell in first.values():
            build_model(cell, device="meta")


def test_the_cpu_suite_fits_its_time():
    """All cells at their caps, with 6 s to start and test, on 2 cores."""
    cells = grid_cells("cpu", load_suite("cpu"))
    assert all(cell.training.seconds + 4 <= 90 for cell in cells)
    assert sum(cell.training.seconds + 4 for cell in cells) / 2 <= 40 * 60


def test_a_cell_is_repeated_from_its_json(tmp_path):
    _, cells = tiny(tmp_path)
    again = msgspec.json.decode(msgspec.json.encode(cells[0]), type=Cell)
    assert again == cells[0]
    assert again.digest == cells[0].digest
    assert msgspec.structs.replace(cells[0], seed=5).digest != cells[0].digest
    # What a report says beside a run does not make it another run.
    assert msgspec.structs.replace(cells[0], control=None, published="x", chance=None).digest == cells[0].digest


def test_grid_and_variations(tmp_path):
    data = edited("tasks.mqar.vary", {"pairs": [1], "train": [10, 5]})
    data["grid"] = {"d_model": [16, 32], "learning_rate": [0.1, 0.2], "depth": [1, 3], "seeds": 1}
    _, cells = tiny(tmp_path, data)
    assert len(cells) == 4 * 2 * 2 * 2 * 2  # plans, arms, widths, depths, rates
    assert {cell.pattern for cell in cells} == {"1x(attention)", "3x(attention)", "1x(gated_conv)", "3x(gated_conv)"}
    by_plan = {cell.plan: cell for cell in cells}
    assert by_plan["mqar[pairs=1]"].train[0].settings["pairs"] == 1
    assert {one.settings["pairs"] for one in by_plan["mqar[pairs=1]"].test} == {1}
    assert by_plan["mqar[train=5]"].train[0].count == 5
    assert by_plan["mqar[train=5]"].test == by_plan["mqar"].test
    assert labels_of(by_plan["mqar"].test, "mqar") == ["length=16,pairs=2", "length=24,pairs=3"]
    assert labels_of(by_plan["mqar"].train, "mqar") == ["test"]


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("arms.attention.layer", "atention", "Did you mean attention"),
        ("arms.attention.arguments", {"num_head": 2}, "num_heads"),
        ("tasks.mqar.train.0.settings.pair", 3, "unknown setting 'pair'"),
        ("tasks.mqar.train.0.settings.pairs", 5, "length 16 is too short for 5 pairs"),
        ("tasks.mqar.test.1.settings.vocab_size", 20, "vocab_size 20 is too small"),
        ("tasks.mqar.test", [], "at least one training set and one test set"),
        ("tasks.mqar.task", "mqarr", "unknown task 'mqarr'"),
        ("grid.d_model", [], "grid.d_model is empty"),
        ("grid.widths", [1], "unknown configuration key 'grid.widths'"),
        ("controls", {"atention": "solves"}, "control 'atention' is no arm.*attention"),
        ("control_tasks", ["mqa"], "control task 'mqa' is no task"),
        ("pattern", "{layer} hydraa", "hydraa"),
    ],
)
def test_bad_protocols_are_refused_before_anything_trains(tmp_path, path, value, message):
    with pytest.raises(ValueError, match=message):
        runner.check(tiny(tmp_path, edited(path, value))[1])


def test_bidirectional_layers_are_refused(tmp_path):
    data = edited("arms.attention", {"layer": "s4d", "arguments": {"bidirectional": True}})
    with pytest.raises(ValueError, match="attention: layer S4D is bidirectional; recall needs layers that are causal"):
        runner.check(tiny(tmp_path, data)[1])


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"layer": "prefix_linear_attention"}, "attention reads all tokens but the last in both directions, so a task"),
        ({"layer": "attention", "reads": "twice"}, "attention reads twice, so a task may ask at the last token"),
    ],
)
def test_what_sees_answers_is_refused(tmp_path, arm, message):
    with pytest.raises(ValueError, match=message):
        runner.check(tiny(tmp_path, edited("arms.attention", arm))[1])


DISJOINTNESS = {"first": 2, "second": 3, "vocab_size": 16}


def disjointness(tmp_path) -> dict[str, Cell]:
    """A cell for each way to read; the data of set disjointness."""
    data = edited("tasks", {"set_disjointness": {
        "train": [{"count": 8, "settings": DISJOINTNESS}], "test": [{"count": 8, "settings": DISJOINTNESS}],
    }})  # fmt: skip
    arguments = {"num_heads": 2, "key_dim": 4}
    data |= {"pattern": "gated_conv {layer}", "controls": {}, "control_tasks": [], "arms": {
        "causal": {"layer": "linear_attention", "arguments": arguments},
        "twice": {"layer": "linear_attention", "arguments": arguments, "reads": "twice"},
        "prefix": {"layer": "prefix_linear_attention", "arguments": {"num_heads": 2, "feature_dim": 4}},
    }}  # fmt: skip
    cells = tiny(tmp_path, data)[1]
    runner.check(cells)
    return {cell.arm: cell for cell in cells if cell.seed == 0}


def test_reading_twice_puts_the_row_before_itself_and_asks_once(tmp_path):
    cells = disjointness(tmp_path)
    once, again = (make(cells[arm], cells[arm].test[0], "test", (0,)) for arm in ("causal", "twice"))
    assert np.array_equal(again.tokens, np.concatenate((once.tokens, once.tokens), 1))
    assert np.array_equal(again.targets[:, -1], once.targets[:, -1])
    assert (again.targets[:, :-1] == NO_TARGET).all()
    assert (cells["causal"].state_context, cells["twice"].state_context) == (8, 16)
    assert build_model(cells["twice"]).positions.shape == (16, 16)  # learned, of linear attention alone
    assert cells["causal"].digest != cells["twice"].digest
    assert "reads" not in msgspec.to_builtins(cells["causal"])  # cells of before keep their digest


@pytest.mark.parametrize("arm", ["causal", "twice", "prefix"])
def test_every_way_to_read_trains_and_is_tested(tmp_path, arm):
    found = cell_module.run(disjointness(tmp_path)[arm])
    assert (found.ended, found.steps) == ("epochs", 2)
    assert 0 <= found.score <= 1


def test_the_prefix_is_all_tokens_but_the_last(tmp_path):
    """In training and in tests: an earlier token sees a later one of the prefix, and none sees the last."""
    cells = disjointness(tmp_path)
    batch = resident(make(cells["prefix"], cells["prefix"].test[0], "test", (0,)), "cpu")
    length = batch.tokens.shape[1]
    for arm, sees in (("prefix", True), ("causal", False)):
        trainer = Trainer(cells[arm], lambda message: None)
        for train in (True, False):
            trainer.model.train(train)
            before = trainer.model(batch.tokens)[0]
            for changed, seen in ((length - 2, sees), (length - 1, False)):
                tokens = batch.tokens.clone()
                tokens[:, changed] = 5
                after = trainer.model(tokens)[0]
                assert torch.equal(before[:, 0], after[:, 0]) != seen


def test_unknown_suites_tasks_and_arms():
    with pytest.raises(ConfigError, match=r"unknown suite 'zoolgy'.*Did you mean zoology"):
        load_suite("zoolgy")
    with pytest.raises(ConfigError, match="unknown suite 'layers'"):
        load_suite("layers")
    with pytest.raises(ConfigError, match="has no task 'mqr'"):
        load_suite("cpu", ["mqr"])
    with pytest.raises(ConfigError, match="has no arm 'atention'"):
        load_suite("cpu", [], ["atention"])


def test_layers_that_are_not_listed_get_defaults():
    found = LayerDefaults({}, Layer({"num_heads": 2, "d_state": 4}, {"default": 0.1, "mqar": 0.2}))
    assert found.arguments("attention") == {"num_heads": 2}
    assert found.arguments("gated_conv") == {}
    assert (found.rate("attention", "mqar"), found.rate("attention", "other")) == (0.2, 0.1)
    with pytest.raises(ConfigError, match="layer 'attention' demands num_heads"):
        LayerDefaults({}, Layer()).arguments("attention")
    with pytest.raises(ConfigError, match="no learning rate is stored"):
        LayerDefaults({}, Layer()).rate("attention", "mqar")
    listed = load_layers(FOLDER / "layers.yaml")
    assert set(listed.layers) <= set(MIXERS.shipped())


# One cell


def test_labelled_positions_are_looked_up_once():
    targets = np.array([[NO_TARGET, 5, NO_TARGET, 7], [3, NO_TARGET, NO_TARGET, NO_TARGET]], np.int32)
    found = resident(Examples(np.zeros((2, 4), np.int32), targets), "cpu")
    assert found.positions.tolist() == [[1, 3], [0, 0]]
    assert found.answers.tolist() == [[5, 7], [3, NO_TARGET]]


def test_the_loss_is_that_of_all_logits(tmp_path):
    cell = msgspec.structs.replace(tiny(tmp_path)[1][0], task="in_context_recall")
    sets = tuple(msgspec.structs.replace(one, settings={"length": 12, "vocab_size": 8}) for one in cell.train)
    trainer = Trainer(msgspec.structs.replace(cell, train=sets, test=sets), lambda message: None)
    examples = make(cell, sets[0], "test", (0,))
    batch = resident(examples, "cpu")
    logits = trainer.model.logits(trainer.model.norm(trainer.model(batch.tokens)[0]))
    expected = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(examples.targets).long().flatten())
    assert trainer.loss(batch).item() == pytest.approx(expected.item(), rel=1e-5)


def solvable(tmp_path, **training) -> Cell:
    """Five keys and their values: a map that any layer learns in a second."""
    cell = next(cell for cell in tiny(tmp_path)[1] if cell.arm == "gated_conv")
    data = tuple(msgspec.structs.replace(one, count=64, settings={"length": 8, "vocab_size": 12}) for one in cell.train)
    options = {"epochs": 40, "stop_above": 0.99, **training}
    return msgspec.structs.replace(
        cell, task="memorization", train=data, test=data, learning_rate=0.02,
        training=msgspec.structs.replace(cell.training, **options),
    )  # fmt: skip


@pytest.mark.parametrize("schedule", ["epoch_cosine", "step_cosine", "constant"])
def test_a_cell_learns_stops_when_solved_and_repeats(tmp_path, schedule):
    cell = solvable(tmp_path, schedule=schedule)
    heard = []
    found = cell_module.run(cell, heard.append)
    assert found.ended == "solved"
    assert found.score > 0.99
    assert found.epochs < 40
    assert [one["score"] for one in heard] == found.history
    assert all(score <= 0.99 for score in found.history[:-1])
    assert found.steps == found.epochs * 8
    assert found.history == cell_module.run(cell).history


def test_why_a_cell_ends(tmp_path, monkeypatch):
    found = cell_module.run(solvable(tmp_path, epochs=2, stop_above=None))
    assert (found.ended, found.epochs, len(found.history)) == ("epochs", 2, 2)
    found = cell_module.run(solvable(tmp_path, epochs=4, stop_above=None, evaluate_every=3))
    assert (found.epochs, len(found.history)) == (4, 2)
    found = cell_module.run(solvable(tmp_path, seconds=1e-6))
    assert (found.ended, found.epochs, found.steps) == ("seconds", 1, 1)
    assert len(found.history) == 1
    monkeypatch.setattr(Trainer, "_loss", lambda *_: torch.tensor(math.nan, requires_grad=True))
    found = cell_module.run(solvable(tmp_path))
    assert (found.ended, found.epochs) == ("diverged", 1)


def test_fresh_examples_and_the_order_of_batches(tmp_path):
    def tokens(cell):
        trainer = Trainer(cell, lambda message: None)
        seen = []
        trainer.loss = lambda batch: (
            seen.append(batch.tokens.clone()) or next(parameter for parameter in trainer.model.parameters()).sum()
        )
        trainer.epoch(0)
        first = torch.cat(seen)
        seen.clear()
        trainer.epoch(1)
        return first, torch.cat(seen)

    def ordered(rows):
        return sorted(map(tuple, rows.tolist()))

    cell = solvable(tmp_path)
    data = torch.from_numpy(make(cell, cell.train[0], "train", (0, 0)).tokens)
    first, second = tokens(cell)
    assert ordered(first) == ordered(second) == ordered(data)
    assert not torch.equal(first, second)
    first, second = tokens(solvable(tmp_path, shuffle=False))
    assert torch.equal(first, data)
    assert torch.equal(second, data)
    first, second = tokens(solvable(tmp_path, shuffle=False, fresh=True))
    assert torch.equal(first, data)
    assert ordered(second) != ordered(data)


def test_batches_of_several_sets_are_mixed_and_none_is_lost(tmp_path):
    cell = solvable(tmp_path)
    sets = tuple(msgspec.structs.replace(cell.train[0], count=count) for count in (20, 17, 9))
    trainer = Trainer(msgspec.structs.replace(cell, train=sets), lambda message: None)
    found = [len(batch) for batch in trainer._batches(0)]
    assert sorted(found) == [1, 1, 4, 8, 8, 8, 8, 8]
    assert len(found) == trainer.total // 40
    assert found != [len(batch) for batch in trainer._batches(1)]
    trainer.plan = msgspec.structs.replace(trainer.plan, shuffle=False)
    assert [len(batch) for batch in trainer._batches(0)] == [8, 8, 4, 8, 8, 1, 8, 1]


def test_test_sets_do_not_depend_on_the_seed(tmp_path):
    cells = tiny(tmp_path)[1]
    assert {cell.seed for cell in cells} == {0, 1}
    assert TEST_SEED not in {cell.seed for cell in cells}
    one, other = (make(cells[at], cells[at].test[0], "test", (1, 0)).digest() for at in (0, 1))
    assert one == other
    one, other = (make(cells[at], cells[at].train[0], "train", (0, 0)).digest() for at in (0, 1))
    assert one != other


def test_rates_are_tried_on_examples_that_no_suite_sees(tmp_path):
    suite, cells = tiny(tmp_path)
    tried = tuning_cells("tiny", suite, [1e-3, 1e-2])
    assert [(cell.arm, cell.learning_rate, cell.seed) for cell in tried] == [
        (arm, rate, TUNING_SEED) for arm in ("attention", "gated_conv") for rate in (1e-3, 1e-2)
    ]
    assert {(cell.suite, cell.control) for cell in tried} == {("tiny_rates", None)}
    for split, data in (("train", cells[0].train[0]), ("test", cells[0].test[0])):
        stream = (cell_module.TRAIN if split == "train" else cell_module.TEST, 0)
        rows = [set(map(tuple, make(cell, data, split, stream).tokens.tolist())) for cell in (*cells[:2], tried[0])]
        assert not rows[2] & (rows[0] | rows[1])
    with pytest.raises(ValueError, match="learning rate 0"):
        tuning_cells("tiny", suite, [0.0])


class Oracle:
    """Reads ``examples`` in order; knows the answers at the first ``right`` labels of a row, says 0 at the others."""

    def __init__(self, examples, right, classes):
        self.batch, self.right, self.at = resident(examples, "cpu"), right, 0
        self.embedding = torch.nn.Embedding(classes, 1)

    def eval(self):
        pass

    def __call__(self, tokens):
        at, self.at = self.at, self.at + len(tokens)
        assert torch.equal(tokens, self.batch.tokens[at : self.at])
        return at, {}

    def read(self, at, positions):
        answers = self.batch.answers[at : at + len(positions)].clone()
        answers[:, self.right :] = 0
        return answers

    def logits(self, answers):
        return F.one_hot(answers, self.embedding.num_embeddings).float()


@pytest.mark.parametrize(("task", "expected"), [("mqar", 1 / 3), ("memorization", None)])
def test_scores_are_those_of_an_oracle(tmp_path, monkeypatch, task, expected):
    cell = tiny(tmp_path)[1][0]
    monkeypatch.setattr(cell_module, "TOKENS_AT_ONCE", 100)  # several pieces, the last one shorter
    trainer = Trainer(cell, lambda message: None)
    settings = {"mqar": {"length": 24, "pairs": 3, "vocab_size": 32}, "memorization": {"length": 6, "vocab_size": 11}}
    data = msgspec.structs.replace(cell.test[0], count=30, settings=settings[task])
    trainer.cell = msgspec.structs.replace(cell, task=task)
    examples = make(trainer.cell, data, "test", (1, 0))
    trainer.model = Oracle(examples, 1, 32)
    found = trainer._score(resident(examples, "cpu"))
    if expected is None:  # macro: the mean over the values of how often each one stands first
        answers = resident(examples, "cpu").answers.numpy()
        rates = [(answers[:, 0] == value).sum() / (answers == value).sum() for value in np.unique(answers)]
        expected = sum(rates) / (len(rates) + 1)  # and id 0, which is only said
    assert found == pytest.approx(expected)


def test_state_is_counted_by_the_layers(tmp_path):
    data = edited("pattern", "gated_conv {layer}")
    cells = {cell.arm: cell for cell in tiny(tmp_path, data)[1]}
    model = build_model(cells["attention"])
    convolution = 2 * 16 * 4  # kernel_size - 1 inputs of 16 channels
    cache = 2 * 16 * 24 * 4 + 8  # keys and values of 24 tokens, and the position
    assert state_bytes(model, 24) == (convolution + cache, cache)
    assert state_bytes(model, 24)[0] == sum(layer.state_bytes(24) for layer in model.layers())


# Many cells

SCRIPT = """
import json, pathlib, sys
cell = json.load(sys.stdin)
with open({log!r}, "a") as log:
    log.write(cell["arm"] + "/" + str(cell["seed"]) + "\\n")
{before}
found = json.loads({outcome!r})
if cell["arm"] == "gated_conv":
    found["test"] = {{name: 0.05 for name in found["test"]}}
print(json.dumps({{"epoch": 1, "epochs": 2, "loss": 0.1, "score": 0.5}}), flush=True)
print(json.dumps({{"outcome": found}}), flush=True)
"""


@pytest.fixture
def scripted(tmp_path, monkeypatch):
    """Cells that answer at once instead of training; what they do before that is the argument."""
    log = tmp_path / "started.log"

    def use(before=""):
        script = tmp_path / "script.py"
        answer = json.dumps(outcome()._asdict())
        script.write_text(SCRIPT.format(log=str(log), before=before, outcome=answer))
        monkeypatch.setattr(runner, "COMMAND", (sys.executable, str(script)))
        log.write_text("")
        return lambda: log.read_text().split()

    return use


def test_a_sweep_runs_every_cell_once_and_keeps_what_finished(tmp_path, scripted):
    started = scripted()
    _, cells = tiny(tmp_path)
    results, display = Results(tmp_path / "out", "recall"), Silent()
    runs, complete, usage = runner.run(cells, results, 2, display)
    assert complete
    assert display.heard == {"planned": 4, "done": 4, "progress": 4}
    assert sorted(started()) == ["attention/0", "attention/1", "gated_conv/0", "gated_conv/1"]
    assert 0 < usage.filled <= 1
    assert 0 < usage.share <= 1.05  # processor clocks tick in hundredths
    assert all(holds for _, holds in judge(summarise(runs)))
    started = scripted("raise SystemExit(9)")
    runs, complete, usage = runner.run(cells, results, 2, display)
    assert complete
    assert len(runs) == 4
    assert started() == []
    assert usage.wall == 0


def test_the_longest_cells_start_first(tmp_path, scripted):
    started = scripted()
    _, cells = tiny(tmp_path)
    seconds = {"attention": 5.0, "gated_conv": 9.0}
    cells = [
        msgspec.structs.replace(cell, training=msgspec.structs.replace(cell.training, seconds=seconds[cell.arm]))
        for cell in cells
    ]
    runner.run(cells, Results(tmp_path / "out", "recall"), 1, Silent())
    assert started() == ["gated_conv/0", "gated_conv/1", "attention/0", "attention/1"]


def test_a_cell_has_one_thread_and_keeps_its_memory(tmp_path, scripted, monkeypatch):
    seen = tmp_path / "seen.json"
    keys = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GLIBC_TUNABLES")
    before = f"import os; open({str(seen)!r}, 'w').write(json.dumps([os.environ.get(key) for key in {keys}]))"
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    cells = tiny(tmp_path)[1][:1]
    scripted(before)
    runner.run(cells, Results(tmp_path / "one", "recall"), 1, Silent())
    assert json.loads(seen.read_text()) == ["1", "1", sweep.KEEP_MEMORY["GLIBC_TUNABLES"]]
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=3")
    runner.run(cells, Results(tmp_path / "two", "recall"), 1, Silent())
    assert json.loads(seen.read_text())[2] == "glibc.malloc.check=3"


def test_each_slot_sees_one_of_the_gpus_given(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [runner.one_gpu(slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5")
    assert [runner.one_gpu(slot, 2)["CUDA_VISIBLE_DEVICES"] for slot in range(3)] == ["2", "GPU-5", "2"]


def test_a_killed_sweep_goes_on_and_a_half_written_row_is_cut(tmp_path, scripted):
    scripted("sys.exit('no memory') if cell['seed'] else None")
    _, cells = tiny(tmp_path)
    results, display = Results(tmp_path / "out", "recall"), Silent()
    _, complete, _ = runner.run(cells, results, 1, display)
    assert not complete
    assert display.heard["failed"] == 2
    assert {row["config"]["reason"] for row in read(results.path) if row["metric"] == "failed"} == {"no memory"}
    with results.path.open("a") as file:
        file.write('{"suite": "recall", "case": "tiny/mq')
    started = scripted()
    runs, complete, _ = runner.run(cells, Results(tmp_path / "out", "recall"), 1, Silent())
    assert complete
    assert len(runs) == 4
    assert sorted(started()) == ["attention/1", "gated_conv/1"]


def test_a_foreign_results_file_is_named(tmp_path, scripted):
    scripted()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").write_text('{"epoch": 1}\n')
    with pytest.raises(ValueError, match=r"results.jsonl:1 lacks"):
        runner.run(tiny(tmp_path)[1], Results(tmp_path / "out", "recall"), 1, Silent())


def test_rows_repeat_their_cell(tmp_path):
    cell = tiny(tmp_path)[1][0]
    rows = runner.write_rows(Results(tmp_path / "out", "recall"), cell, outcome(0.75))
    assert msgspec.convert(rows[-1]["config"]["cell"], Cell) == cell
    assert {row["metric"] for row in rows} == {"accuracy", "state_bytes", "tokens_per_second", "score"}
    (run,) = collect(read(tmp_path / "out")).values()
    assert (run.score, run.state_bytes, run.mixer_bytes, run.tokens_per_second) == (0.75, 512, 256, 1e5)
    assert run.test == {"length=16,pairs=2": 0.75, "length=24,pairs=3": 0.75}


# Judgement and page


def runs_of(tmp_path, scores, data=TINY):
    """One finished run a cell, with the score that ``scores`` gives it."""
    results = Results(tmp_path / "out", "recall")
    for cell in tiny(tmp_path, data)[1]:
        runner.write_rows(results, cell, outcome(scores(cell)))
    return collect(read(tmp_path / "out")).values()


@pytest.mark.parametrize(
    ("attention", "convolution", "expected"),
    [((1.0, 0.95), (0.1, 0.2), (True, True)), ((1.0, 0.8), (0.1, 0.3), (False, False))],
)
def test_controls(tmp_path, attention, convolution, expected):
    def score(cell):
        return (attention if cell.arm == "attention" else convolution)[cell.seed]

    verdicts = judge(summarise(runs_of(tmp_path, score)))
    assert tuple(holds for _, holds in verdicts) == expected
    assert "attention d=16" in verdicts[0][0]


def test_the_best_learning_rate_is_chosen_by_the_mean_over_seeds(tmp_path):
    data = edited("grid", {"d_model": [16], "learning_rate": [0.1, 0.2], "seeds": 2})
    scores = {(0.1, 0): 0.9, (0.1, 1): 0.1, (0.2, 0): 0.6, (0.2, 1): 0.7}
    points = summarise(runs_of(tmp_path, lambda cell: scores[cell.learning_rate, cell.seed], data))
    for point in points:
        assert point.about["choice"] == "lr=0.2,wd=0.1"
        assert (point.score, point.spread) == (pytest.approx(0.65), pytest.approx(0.05))
        assert len(point.runs) == 4


def test_runs_of_another_protocol_do_not_mix(tmp_path):
    runs_of(tmp_path, lambda cell: 0.5)
    newer = edited("training", {"batch_size": 4, "epochs": 2})
    points = summarise(runs_of(tmp_path, lambda cell: 1.0, newer))
    assert {point.score for point in points} == {1.0}


def test_an_arm_with_other_arguments_is_another_arm(tmp_path):
    runs_of(tmp_path, lambda cell: 0.5)
    newer = edited("arms.attention.arguments", {"window": 4})
    newer["grid"]["seeds"] = 1
    points = summarise(runs_of(tmp_path, lambda cell: 0.25, newer))
    assert {point.arm: (point.score, len(point.runs)) for point in points} == {
        "attention": (0.25, 1), "gated_conv": (0.375, 2),
    }  # fmt: skip


def test_page(tmp_path):
    data = edited("tasks.mqar.vary", {"pairs": [1]})
    runs_of(tmp_path, lambda cell: 1.0 if cell.arm == "attention" else 0.05, data)
    results = Results(tmp_path / "out", "recall")
    for metric, value in (("examples_per_second_ratio", 2.5), ("examples_per_processor_second_ratio", 1.2)):
        config = {"cores": 2, "load": 0.5}
        results.write("speed/mqar/attention", metric, value, "x", layer="attention", seed=0, config=config)
    page = write_report(tmp_path / "page", [tmp_path / "out"]).read_text()
    assert "| attention | 1,234 | 512 | 256 | 100,000 | 1.000 +- 0.000 | 2 | 1.000 | 1.000 |" in page
    assert "published" not in page
    assert "Control holds: tiny/mqar/gated_conv d=16: best 0.050 of 2 runs" in page
    assert "### Means over each task's variations" in page
    assert "| attention | 2 | 2.50 | 1.20 | 0.5 |" in page
    assert (tmp_path / "page" / "tiny.png").stat().st_size > 10_000
    with pytest.raises(FileNotFoundError, match="no finished recall runs"):
        write_report(tmp_path / "page", [tmp_path / "nothing"])


def test_tried_rates_are_columns(tmp_path):
    suite, _ = tiny(tmp_path)
    results = Results(tmp_path / "out", "recall")
    for cell in tuning_cells("tiny", suite, [1e-3, 1e-2]):
        runner.write_rows(results, cell, outcome(0.25 if cell.learning_rate == 1e-3 else 0.75))
    page = write_report(tmp_path / "page", [tmp_path / "out"]).read_text()
    assert "## Learning rates of suite tiny" in page
    assert "--suite tiny --rates RATE ... --out DIR" in page
    assert "| arm | arguments | 0.001 | 0.01 |" in page
    assert "| attention | num_heads=1, rotary_fraction=0.0 | 0.250 | 0.750 |" in page
    assert list((tmp_path / "page").glob("*.png")) == []


def test_set_disjointness_is_shown_by_the_order_of_its_lists(tmp_path):
    data = edited("tasks", {"set_disjointness": {
        "train": [{"count": 8, "settings": {"first": 2, "second": 3}}],
        "test": [{"count": 8, "settings": {"first": a, "second": b}} for a, b in ((2, 5), (2, 9), (9, 2))],
    }})  # fmt: skip
    data["control_tasks"] = []
    results = Results(tmp_path / "out", "recall")
    scores = {"first=2,second=5": 1.0, "first=2,second=9": 0.8, "first=9,second=2": 0.3}
    for cell in tiny(tmp_path, data)[1]:
        assert labels_of(cell.test, cell.task) == list(scores)
        runner.write_rows(results, cell, outcome(test=scores))
    page = write_report(tmp_path / "page", [tmp_path / "out"]).read_text()
    assert "| seeds | short list first | long list first | chosen |" in page
    assert "| 0.700 +- 0.000 | 2 | 0.900 | 0.300 |" in page


def test_published_numbers():
    assert published("zoology", "L64", "BaseConv", 64) == 0.70
    assert published("zoology", "L512", "BaseConv", 64) is None
    assert published("zoology", "L64", "BaseConv", 48) is None
    assert published("mad", "memorization", "Mamba", 128) == 0.895
    assert published("mad", "memorization[vocab_size=512]", "Mamba", 128) is None
    assert published("cpu", "mqar", "Attention", 64) is None
    assert SOURCES["zoology"].from_plot
    every = [value for table in ZOOLOGY_ACCURACY.values() for row in table.values() for value in row]
    every += [value for line in BASED_POINTS.values() for _, value in line]
    assert all(0 <= value <= 1 for value in every)


# Command line


def test_command_line(tmp_path, scripted, capsys):
    file = tmp_path / "tiny.yaml"
    file.write_text(dump_yaml(TINY))
    scripted()
    command = ["--suite", str(file), "--out", str(tmp_path / "out"), "--jobs", "2"]
    assert main(command) == 0
    assert "control holds: tiny/mqar/attention d=16" in capsys.readouterr().out
    assert main([*command, "--arms", "attention"]) == 0
    assert "kept from commit" in capsys.readouterr().out
    assert main(["--report", str(tmp_path / "out")]) == 0
    assert main(["--suite", str(file), "--list", "--arms", "attention"]) == 0
    assert len([line for line in capsys.readouterr().out.splitlines() if "attention" in line]) == 2
    file.write_text(dump_yaml({**TINY, "controls": {"gated_conv": "solves"}}))
    assert main(command) == 1
    assert "control FAILS" in capsys.readouterr().out


def test_command_line_errors(tmp_path, capsys):
    assert main(["--suite", "nosuch", "--out", str(tmp_path)]) == 2
    assert "unknown suite 'nosuch'" in capsys.readouterr().err
    assert main(["--report", str(tmp_path)]) == 2
    if not torch.cuda.is_available():
        assert main(["--suite", "zoology", "--out", str(tmp_path), "--arms", "attention"]) == 2
        assert "needs a GPU" in capsys.readouterr().err
    for arguments in ([], ["--suite", "cpu"], ["--suite", "cpu", "--out", "x", "--jobs", "0"]):
        with pytest.raises(SystemExit):
            main(arguments)


def test_live_table(tmp_path):
    cell = tiny(tmp_path)[1][0]
    (run,) = collect(runner.write_rows(Results(tmp_path / "out", "recall"), cell, outcome())).values()
    for terminal in (True, False):
        stream = io.StringIO()
        with LiveTable(Console(file=stream, force_terminal=terminal, width=200)) as table:
            table.plan([cell, cell])
            table.progress(cell, {"epoch": 1, "epochs": 2, "loss": 0.25, "score": 0.5})
            if terminal:
                table.live.refresh()
            table.done(cell, run, kept=False)
        text = stream.getvalue()
        assert "1.000, epochs after 2 epochs, state 512 bytes" in text
        assert ("epoch 1 of 2: 0.500, loss 0.250" in text) == terminal


# Speed


def test_both_ways_of_the_speed_suite_train(tmp_path):
    cell = solvable(tmp_path)
    for way in (speed._SuiteLoop, speed._EagerLoop):
        loop = way(cell)
        model = loop.trainer.model if way is speed._SuiteLoop else loop.model
        before = model.embedding.weight.detach().clone()
        loop.steps()
        assert not torch.equal(before, model.embedding.weight)


def test_the_speed_suite_writes_its_ratios(tmp_path, monkeypatch, capsys):
    class Worker:
        def __init__(self, cell, way, cores, threads):
            self.rates = {"suite": speed.Rates(300.0, 90.0), "eager": speed.Rates(200.0, 60.0)}[way]

        def ask(self):
            pass

        def answer(self):
            return self.rates

        def close(self):
            pass

    monkeypatch.setattr(speed, "_Worker", Worker)
    monkeypatch.setattr(speed.os, "sched_getaffinity", lambda pid: {0, 1})
    assert speed.measure(Results(tmp_path, "recall"), ["attention"]) == 0
    assert "attention: 3.00x on 2 cores, 1.50x by processor time" in capsys.readouterr().out
    assert [row["value"] for row in read(tmp_path)] == [3.0, 1.5]
    monkeypatch.setattr(speed, "TARGET", 4.0)
    assert speed.measure(Results(tmp_path, "recall"), ["attention"]) == 1
