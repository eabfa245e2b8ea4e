"""The Long Range Arena suite: runs go on where they stopped, choose by validation, and land in rows and a page."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from evals.lra import __main__ as command
from evals.lra import training
from evals.lra.baselines import baselines
from evals.lra.contact_sheet import contact_sheet
from evals.lra.plans import FOLDER, ModelPlan, classifier_config, load_run, plan_names
from evals.lra.published import PUBLISHED
from evals.lra.report import _locality, write_report
from evals.lra.rows import Finished, collect
from evals.lra.training import Trainer
from evals.results import read
from seqmodels.configuration import ConfigError, convert, load_yaml
from seqmodels.tasks.lra import TASKS, DataError, Examples, TaskData, shards
from seqmodels.tasks.lra.examples import gather

PLAN = """
layer: gated_conv
published: S5
tasks:
  listops-256:
    model: {d_model: 16, pattern: "gated_conv swiglu", norm: batch, dropout: 0.1}
    training: {learning_rate: 0.01, batch_size: 8, epochs: 3, warmup_epochs: 0.5, gradient_clip: 1.0}
"""


def examples(count, seed):
    """Label: the first token is 3 or 4. Lengths differ."""
    draws = np.random.default_rng(seed)
    rows = [draws.integers(3, 8, size=draws.integers(4, 9)).astype(np.uint8) for _ in range(count)]
    for index, row in enumerate(rows):
        row[0] = 3 + index % 2
    return gather(rows, np.arange(count) % 2)


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    data = TaskData(examples(40, 0), examples(16, 1), examples(24, 2), 18)
    monkeypatch.setitem(TASKS, "listops-256", TASKS["listops-256"]._replace(load=lambda folder, options: data))
    (tmp_path / "tiny.yaml").write_text(PLAN)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield data
    torch.set_num_threads(threads)


@pytest.fixture
def run(tmp_path):
    return load_run(str(tmp_path / "tiny.yaml"), "listops-256", 0)


def weights(trainer):
    return torch.cat([value.flatten().double() for value in trainer.model.state_dict().values()])


def test_a_run_that_was_stopped_ends_as_one_that_was_not(run, small, tmp_path):
    whole = Trainer(run, small, tmp_path / "a")
    first = whole.fit()
    assert first is not None
    assert [row["epoch"] for row in first.history] == [1, 2, 3]
    stops = 0
    while True:
        part = Trainer(run, small, tmp_path / "b")
        outcome = part.fit(budget_seconds=0)
        if outcome is not None:
            break
        stops += 1
    assert stops == 14  # one step each, 15 in all
    assert torch.equal(weights(part), weights(whole))
    assert json.dumps(outcome.history) == json.dumps(first.history)
    assert (outcome.epoch, outcome.selection, outcome.test) == (first.epoch, first.selection, first.test)


@pytest.mark.parametrize(("step", "saved"), [(2, 2), (5, 4), (9, 9)])
def test_a_killed_run_ends_as_one_that_was_not(run, small, tmp_path, monkeypatch, step, saved):
    """Killed inside an epoch, or in the evaluation that ends one: the last checkpoint is gone on from."""
    whole = Trainer(run, small, tmp_path / "a")
    first = whole.fit()
    monkeypatch.setattr(training, "SAVE_SECONDS", -1)  # a checkpoint a step
    part = Trainer(run, small, tmp_path / "b")
    compute = part._loss
    monkeypatch.setattr(part, "_loss", lambda *batch: exit_at(part, step) or compute(*batch))
    with pytest.raises(KeyboardInterrupt):
        part.fit()
    torch.rand(100)  # another process has other random numbers
    part = Trainer(run, small, tmp_path / "b")
    assert part.step == saved
    outcome = part.fit()
    assert outcome is not None
    assert first is not None
    assert torch.equal(weights(part), weights(whole))
    assert json.dumps(outcome.history) == json.dumps(first.history)


def exit_at(trainer, step):
    if trainer.step == step:
        raise KeyboardInterrupt


def test_the_epoch_is_chosen_by_validation_and_not_by_test(run, small, tmp_path, monkeypatch):
    trainer = Trainer(run, small, tmp_path)
    given = {id(small.validation): iter([0.5, 0.9, 0.7]), id(small.test): iter([0.99, 0.2])}
    from evals.lra.training import Score

    monkeypatch.setattr(trainer, "score", lambda part: Score(next(given[id(part)]), 1.0))
    outcome = trainer.fit()
    assert outcome is not None
    assert (outcome.epoch, outcome.selection.accuracy, outcome.test.accuracy) == (2, 0.9, 0.2)


def test_text_is_chosen_by_test(run, small, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "listops-256", TASKS["listops-256"]._replace(selection="test"))
    assert Trainer(run, small, tmp_path).selection is small.test


def test_scores_do_not_depend_on_batches(run, small, tmp_path):
    trainer = Trainer(run, small, tmp_path)
    trainer.model.eval()
    alone = [
        int(trainer.model(batch.inputs, layout=batch.layout).logits.argmax(-1) == batch.labels)
        for index in range(len(small.test))
        for batch in [small.test.batch(np.array([index]))]
    ]
    assert trainer.score(small.test).accuracy == pytest.approx(np.mean(alone))


def test_a_folder_of_another_run_is_refused(run, small, tmp_path):
    Trainer(run, small, tmp_path)
    with pytest.raises(DataError, match=r"holds another run \(data: .*give another --out"):
        Trainer(run, small._replace(train=small.train.select(0, 20)), tmp_path)


def test_a_loss_that_is_not_finite_stops(run, small, tmp_path):
    trainer = Trainer(run, small, tmp_path)
    with torch.no_grad():
        trainer.model.head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 0 .*lower training.learning_rate"):
        trainer.fit()


def test_too_few_examples(run, small, tmp_path):
    with pytest.raises(DataError, match="has 4 training examples, less than one batch of 8"):
        Trainer(run, small._replace(train=small.train.select(0, 4)), tmp_path)


def test_command_rows_report(tmp_path, capsys):
    out, plan = tmp_path / "out", str(tmp_path / "tiny.yaml")
    arguments = ["listops-256", "--config", plan, "--out", str(out), "--seeds", "0", "1"]
    assert command.main([*arguments, "--minutes", "0.00001"]) == command.UNFINISHED
    assert "the same command goes on" in capsys.readouterr().out
    assert command.main(arguments) == 0
    assert command.main(["baselines", "listops-256", "--out", str(out)]) == 0
    found = {(run.arm, run.seed): run for run in collect(read(out))}
    assert set(found) == {
        ("tiny", 0),
        ("tiny", 1),
        ("label_prior", None),
        ("first_token", None),
        ("bag_of_tokens", None),
    }
    assert found["first_token", None].test == 100
    assert found["label_prior", None].test == 50
    rows = len(read(out))
    capsys.readouterr()
    assert command.main(arguments) == 0
    assert "kept from commit" in capsys.readouterr().out
    assert len(read(out)) == rows
    page = write_report(out, [out]).read_text()
    assert "| tiny | " in page
    assert "| label_prior |  | 50.00 |" in page
    assert (out / "listops-256.png").stat().st_size > 5000


def test_help_names_every_task(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    words = capsys.readouterr().out.replace(",", " ").replace(";", " ").replace(".", " ").split()
    assert set(TASKS) <= set(words)


def test_wrong_commands(tmp_path, capsys):
    plan = str(tmp_path / "tiny.yaml")
    for arguments, message in [
        (["listop", "--config", plan, "--out", str(tmp_path)], "Did you mean listops"),
        (["listops", "--config", "s4d-leg", "--out", str(tmp_path)], "Did you mean s4d-legs"),
        (["listops", "--config", plan, "--out", str(tmp_path)], "has no task 'listops'. It has listops-256"),
        (["image", "--config", "s5", "--out", str(tmp_path), "--data", str(tmp_path)], "cifar-10-binary.tar.gz"),
        (["--report", str(tmp_path / "nothing")], "no finished lra runs"),
        (["generate", "text"], "is not generated, it is loaded"),
        (["generate", "pathfinder64"], "generated are listops, pathfinder32, pathfinder128"),
        (["image", "--config", "s5", "--out", str(tmp_path), "--split", "lra"], "'image' has no option split=lra"),
    ]:
        assert command.main(arguments) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["listops", "--out", str(tmp_path)])
    assert "--config is missing; there are attention" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"model.num_classes is decided by the task"):
        load_run(plan, "listops-256", 0, ["model.num_classes=3"])


@pytest.mark.parametrize("name", plan_names())
def test_shipped_configurations(name):
    plan = convert(load_yaml(FOLDER / f"{name}.yaml"), ModelPlan)
    benchmark = {"listops", "text", "retrieval", "image", "pathfinder32", "pathfinder128"}
    assert ({"text", "retrieval"} if name.endswith("-n4") else benchmark) <= set(plan.tasks)
    assert plan.published is None or plan.published in PUBLISHED
    for task in plan.tasks:
        classifier_config(load_run(name, task, 0), 20)


def test_settings_of_the_specification():
    ptd = load_run("s4-ptd", "listops", 0)
    assert (ptd.model["d_model"], ptd.training.learning_rate, ptd.training.epochs) == (256, 0.002, 80)
    s5 = load_run("s5-ptd", "pathfinder128", 0).model["layers"]["s5"]
    assert (s5["d_state"] // s5["num_blocks"], s5["force_negative"], s5["dt_min"]) == (16, True, 1e-4)
    lin = load_run("s4d-lin", "pathfinder32", 0)
    assert (lin.training.weight_decay, lin.scale()) == (0.03, (0.0, 1.0))
    assert load_run("s5", "pathfinder32", 0).scale() == (0.5, 0.5)


def finished(arm, seed, test, role=None):
    about = {"task": "digits", "arm": arm, "role": role, "parameters": 5, "history": []}
    return Finished("digits", arm, "s4d", seed, test, about, {"machine": "here", "commit": "abc"})


def test_the_page_sets_local_controls_beside_the_rest():
    runs = [finished("s4d", 0, 60.0), finished("s4d", 1, 64.0), finished("window", 0, 50.0, "local"),
            finished("window", 1, 54.0, "local"), finished("conv", 0, 40.0, "local")]  # fmt: skip
    page = "\n".join(_locality(runs))
    assert "The best of them is window" in page
    assert "| s4d | +10.00 | +6.00 |" in page
    assert "conv" not in page.replace("convolution", "")
    assert not list(_locality(runs[:2]))  # nothing to compare with
    assert not list(_locality(runs[2:]))


def test_baselines_need_tokens(small):
    with pytest.raises(ValueError, match="count tokens"):
        baselines(small._replace(vocab_size=None))


def test_contact_sheet(tmp_path):
    plt = pytest.importorskip("matplotlib.pyplot")

    shards.generate(tmp_path, make_squares, {}, 20, 20)
    sheet = plt.imread(contact_sheet(tmp_path, tmp_path / "sheet.png"))
    assert sheet.shape[:2] == (4 * 6, 8 * 6)
    assert sheet[0, 0, 0] == 1  # label 1 comes first
    assert sheet[12, 0, 0] == 0
    with pytest.raises(DataError, match="has no shard"):
        contact_sheet(tmp_path / "nothing", tmp_path / "sheet.png")


def make_squares(settings, shard, count, refused):
    labels = np.arange(count) % 2
    return Examples(np.repeat(255 * labels, 16).astype(np.uint8), np.arange(count + 1) * 16, labels)
