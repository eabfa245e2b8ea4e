"""One run: train, choose the epoch by validation, test; stop in time and go on later.

The run's folder holds ``run.json`` (what it is), ``history.json`` (an entry an epoch) and ``checkpoints``.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from evals.lra.plans import Run, plan_of_data
from seqmodels.configuration import differences
from seqmodels.models import SequenceClassifier
from seqmodels.tasks.lra import DataError, Examples, TaskData, task_named
from seqmodels.tasks.shuffle import permutation
from seqmodels.training.checkpoint import (
    Checkpoint,
    generator_states,
    list_checkpoints,
    load_checkpoint,
    remove_leftovers,
    restore_generators,
    save_checkpoint,
)
from seqmodels.training.config import OptimizerConfig, ScheduleConfig
from seqmodels.training.distributed import Processes
from seqmodels.training.optimizer import (
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_learning_rate,
)
from seqmodels.training.schedule import learning_rate_factor

SAVE_SECONDS = 120  # between checkpoints inside an epoch


class Score(NamedTuple):
    """Accuracy in [0, 1] and mean cross-entropy in nats."""

    accuracy: float
    loss: float


class Outcome(NamedTuple):
    """A finished run.

    Attributes:
        epoch: the one that was chosen, from 1.
        selection, test: its scores on the split it was chosen by, and on the test.
        history: what each epoch scored.
        parameters: of the model.
        seconds: of training and evaluation, over all sessions.
    """

    epoch: int
    selection: Score
    test: Score
    history: list[dict[str, Any]]
    parameters: int
    seconds: float


class Trainer:
    """The pieces of a run and the loop over them.

    Args:
        run: what to train.
        data: the task's splits.
        folder: of the run, made when it is not there; a checkpoint in it is gone on from.
        device: where.
        say: hears of every epoch, and of every :data:`SAVE_SECONDS` inside one.

    Raises:
        DataError: the folder holds another run.
        CheckpointError: a damaged checkpoint.
    """

    def __init__(
        self,
        run: Run,
        data: TaskData,
        folder: Path,
        device: torch.device | str = "cpu",
        say: Callable[[dict[str, Any]], None] = lambda message: None,
    ) -> None:
        self.run, self.data, self.folder, self.say = run, data, folder, say
        self.here = Processes(0, 1, torch.device(device))
        self.selection = data.test if task_named(run.task).selection == "test" else data.validation
        self.steps_per_epoch = len(data.train) // run.training.batch_size
        if self.steps_per_epoch == 0:
            raise DataError(
                f"task {run.task!r} has {len(data.train)} training examples, less than one batch of "
                f"{run.training.batch_size}; lower training.batch_size"
            )
        self._claim()
        torch.manual_seed(run.seed)
        self.model = SequenceClassifier(plan_of_data(run, data)).to(device)  # drawn on the CPU: one seed, one start
        training = run.training
        self.optimizer = make_optimizer(
            self.model,
            OptimizerConfig(training.learning_rate, training.weight_decay, training.betas, gradient_clip=None),
        )
        self.steps = training.epochs * self.steps_per_epoch
        warmup = min(round(training.warmup_epochs * self.steps_per_epoch), self.steps)
        self.schedule = ScheduleConfig(name="cosine", warmup_steps=warmup, final_fraction=0.0)
        self.step, self.seconds = 0, 0.0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self._losses = [0.0, 0]
        checkpoints = list_checkpoints(self._checkpoints)
        if checkpoints:
            self._restore(checkpoints[-1])

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def fit(self, budget_seconds: float = math.inf) -> Outcome | None:
        """Runs the steps that are left; None when the budget ended first (the checkpoint is there).

        Raises:
            FloatingPointError: a loss that is not finite; the last checkpoint stays.
        """
        began = self._clock = saved = time.monotonic()
        order, order_of = np.zeros(0, np.int64), -1
        while self.step < self.steps:
            epoch, index = divmod(self.step, self.steps_per_epoch)
            if order_of != epoch:
                order, order_of = permutation(self.run.seed, epoch, count=len(self.data.train)), epoch
            size = self.run.training.batch_size
            self._take_step(order[index * size : (index + 1) * size])
            if self.step % self.steps_per_epoch == 0:
                self._end_epoch()
            now = time.monotonic()
            ended = self.step % self.steps_per_epoch == 0
            if ended or now - saved > SAVE_SECONDS or now - began > budget_seconds:
                self._save()
                saved = time.monotonic()
                if not ended:
                    self.say({"step": self.step, "steps": self.steps, "epoch": epoch + 1, "loss": self._mean_loss()})
            if self.step < self.steps and time.monotonic() - began > budget_seconds:
                return None
        assert self.best is not None
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return Outcome(
            self.best["epoch"], Score(*self.best["selection"]), Score(*self.best["test"]), self.history, parameters,
            self.seconds,
        )  # fmt: skip

    def _take_step(self, indices: np.ndarray) -> None:
        self.model.train()
        loss, _ = self._loss(self.data.train, indices)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the loss is {value} at step {self.step} of {self.run.task}/{self.run.arm}; lower "
                "training.learning_rate or raise training.warmup_epochs"
            )
        loss.backward()
        if self.run.training.gradient_clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.run.training.gradient_clip)
        set_learning_rate(self.optimizer, learning_rate_factor(self.schedule, self.step, self.steps))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self._losses[0] += value
        self._losses[1] += 1

    def _loss(self, examples: Examples, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Loss, and whether each answer is right."""
        batch = examples.batch(indices, self.run.scale()).to(self.here.device)
        lower = self.run.training.precision == "bfloat16"
        with torch.autocast(self.here.device.type, torch.bfloat16, enabled=lower):
            loss, output = self.model.loss(batch.inputs, batch.labels, layout=batch.layout)
        return loss, output.logits.argmax(-1) == batch.labels

    @torch.no_grad()
    def score(self, examples: Examples) -> Score:
        """Over all of ``examples``, in the order of their lengths, so that little is padding."""
        self.model.eval()
        longest = examples.lengths.reshape(-1, examples.sequences).max(1)
        order = np.argsort(longest, kind="stable")
        loss = torch.zeros((), device=self.here.device, dtype=torch.float64)
        right = torch.zeros((), device=self.here.device, dtype=torch.int64)
        for at in range(0, len(order), self.run.training.batch_size):
            indices = order[at : at + self.run.training.batch_size]
            mean, correct = self._loss(examples, indices)
            loss += mean * len(indices)
            right += correct.sum()
        return Score(float(right) / len(order), float(loss) / len(order))

    def _end_epoch(self) -> None:
        epoch = self.step // self.steps_per_epoch
        selection = self.score(self.selection)
        row: dict[str, Any] = {"epoch": epoch, "step": self.step, "loss": self._mean_loss(), "selection": selection}
        if self.best is None or selection.accuracy > self.best["selection"][0]:
            test = selection if self.selection is self.data.test else self.score(self.data.test)
            row["test"] = test
            self.best = {"epoch": epoch, "selection": selection, "test": test}
        self._losses = [0.0, 0]
        self.history.append(row)
        self.say({**row, "steps": self.steps})

    def _mean_loss(self) -> float:
        return self._losses[0] / max(1, self._losses[1])

    def _save(self) -> None:
        now = time.monotonic()
        self.seconds += now - self._clock
        self._clock = now
        state = Checkpoint(
            dict(self.model.state_dict()),
            optimizer_tensors(self.model, self.optimizer),
            generator_states(self.here.device),
            {
                "step": self.step, "seconds": self.seconds, "history": self.history, "best": self.best,
                "losses": self._losses,
            },
        )  # fmt: skip
        about = msgspec.json.encode(self.run).decode()
        save_checkpoint(self._checkpoints, self.step, state, about, self.here, keep=1)
        (self.folder / "history.json").write_text(json.dumps(self.history, indent=1))

    def _restore(self, path: Path) -> None:
        found = load_checkpoint(path, self.model.state_dict(), self.here)
        self.model.load_state_dict(found.model)
        load_optimizer_tensors(self.model, self.optimizer, found.optimizer)
        restore_generators(found.rng, self.here.device)
        self.step, self.seconds = found.trainer["step"], found.trainer["seconds"]
        self.history, self.best = found.trainer["history"], found.trainer["best"]
        self._losses = found.trainer["losses"]

    def _claim(self) -> None:
        """The folder is this run's: the same settings, on the same data."""
        about = {"run": json.loads(msgspec.json.encode(self.run)), "data": self.data.digest}
        path = self.folder / "run.json"
        if path.exists():
            changed = differences(json.loads(path.read_text()), about)
            if changed:
                raise DataError(
                    f"{self.folder} holds another run ({'; '.join(changed)}, there against wanted); give another --out"
                )
            remove_leftovers(self._checkpoints)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(about, indent=1))
