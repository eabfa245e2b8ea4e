"""One run: train over the curriculum, keep the best validated weights, test at every length.

``python -m evals.state_tracking.cell`` reads a :class:`Cell` as JSON on its input and writes one JSON
object a line: progress, and at last the outcome. The runner starts one such process a cell.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evals.state_tracking.suites import Cell, Stage
from seqmodels.models import Initialization, LanguageModel, ModelConfig
from seqmodels.tasks.state_tracking import Examples, Task, accuracy_by_length, generate, task_named
from seqmodels.training.config import OptimizerConfig, ScheduleConfig
from seqmodels.training.optimizer import make_optimizer, set_learning_rate
from seqmodels.training.schedule import learning_rate_factor

TRAIN, VALIDATION, TEST = 0, 1, 2  # streams of the data: no set depends on another's size
DATA_SEED = 1  # of validation and test: the same for every cell, and not one that protocols were made with
TOKENS_AT_ONCE = 1 << 14  # of evaluation


class Outcome(NamedTuple):
    """What a run leaves behind.

    Attributes:
        parameters: of the model.
        step: of the weights that were tested.
        validation_accuracy, validation_loss: theirs, at the answers of ``validation_length``.
        test: length n to (right answers, answers).
        seconds: of the whole run.
    """

    parameters: int
    step: int
    validation_accuracy: float
    validation_loss: float
    test: dict[int, tuple[int, int]]
    seconds: float


def build_model(cell: Cell, device: str | None = None) -> LanguageModel:
    """``blocks`` times the layer and the channel module, with an embedding and a head of unit variance.

    Raises:
        ValueError: arguments that the layer's constructor refuses.
    """
    words = cell.layer if cell.channel is None else f"{cell.layer} {cell.channel}"
    layers = {cell.layer: cell.arguments}
    if cell.channel is not None:
        layers[cell.channel] = cell.channel_arguments
    config = ModelConfig(
        vocab_size=task_named(cell.task).vocab_size,
        d_model=cell.d_model,
        pattern=f"{cell.blocks}x({words})",
        layers=layers,
        tie_head=False,
        initialization=Initialization(embedding_std=1.0),
    )
    config.check_layers()
    return LanguageModel(config, device=device)


def run(cell: Cell, say: Callable[[dict[str, Any]], None] = lambda progress: None) -> Outcome:
    """Trains and tests ``cell``; ``say`` hears of every validation.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    began = time.monotonic()
    task, plan = task_named(cell.task), cell.training
    torch.manual_seed(cell.seed)
    model = build_model(cell).to(cell.device)  # drawn on the CPU: one seed, one start
    optimizer = make_optimizer(
        model, OptimizerConfig(learning_rate=cell.learning_rate, weight_decay=plan.weight_decay, betas=plan.betas)
    )
    schedule = ScheduleConfig(name="cosine", warmup_steps=plan.warmup_steps, final_fraction=0.0)
    validation = generate(
        cell.task, plan.validation_count, plan.validation_length, plan.validation_length,
        seed=DATA_SEED, stream=(VALIDATION,),
    )  # fmt: skip
    best: tuple[tuple[float, float], int, dict[str, Tensor]] | None = None
    for step, stage in enumerate(_stages(plan.stages)):
        batch = generate(
            cell.task, stage.batch_size, stage.min_length, stage.max_length,
            seed=cell.seed, stream=(TRAIN, step), every_token=plan.every_token,
        )  # fmt: skip
        loss = _loss(model, batch, cell.device, plan.label_smoothing)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), plan.gradient_clip)
        set_learning_rate(optimizer, learning_rate_factor(schedule, step, plan.steps))
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done % plan.validate_every and done != plan.steps:
            continue
        if not math.isfinite(float(loss.detach())):
            raise FloatingPointError(f"the loss is {float(loss.detach())} at step {done}")
        accuracy, validation_loss = _validate(model, cell, validation)
        rank = (accuracy, -validation_loss)  # the loss goes on falling where every answer is right
        if best is None or rank > best[0]:
            best = (rank, done, {name: value.clone() for name, value in model.state_dict().items()})
        say({"step": done, "steps": plan.steps, "loss": float(loss.detach()), "validation": accuracy})
    assert best is not None  # the last step validates
    rank, step, weights = best
    model.load_state_dict(weights)
    test: dict[int, tuple[int, int]] = {}
    for examples in _test_sets(cell, task):
        found = accuracy_by_length(cell.task, _predictions(model, examples, cell.device), examples)
        test.update({length: counts for length, counts in found.items() if length in cell.test_lengths})
    parameters = model.num_parameters()
    return Outcome(parameters, step, rank[0], -rank[1], dict(sorted(test.items())), time.monotonic() - began)


def _stages(stages: tuple[Stage, ...]) -> Iterator[Stage]:
    return itertools.chain.from_iterable(itertools.repeat(stage, stage.steps) for stage in stages)


def _loss(model: LanguageModel, batch: Examples, device: str, label_smoothing: float) -> Tensor:
    tokens, targets = (torch.from_numpy(array).to(device) for array in (batch.tokens, batch.targets))
    logits = model(tokens).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=label_smoothing)


def _pieces(examples: Examples) -> Iterator[Examples]:
    """Rows in turn, so many that memory does not depend on the size of the set."""
    rows = max(1, TOKENS_AT_ONCE // examples.tokens.shape[1])
    for at in range(0, len(examples.tokens), rows):
        yield Examples(*(part[at : at + rows] for part in examples))


@torch.no_grad()
def _validate(model: LanguageModel, cell: Cell, examples: Examples) -> tuple[float, float]:
    """Accuracy and loss, with the training's smoothing, over the answers."""
    right, total, loss = 0, 0, 0.0
    for piece in _pieces(examples):
        tokens = torch.from_numpy(piece.tokens).to(cell.device)
        last = torch.from_numpy(piece.lengths - 1).to(cell.device)
        hidden = model.encode(tokens).hidden[torch.arange(len(tokens), device=cell.device), last]
        logits = model.logits(hidden)
        answers = torch.from_numpy(piece.targets).to(cell.device).gather(1, last[:, None])[:, 0]
        right += int((logits.argmax(-1) == answers).sum())
        smoothing = cell.training.label_smoothing
        loss += float(F.cross_entropy(logits, answers, label_smoothing=smoothing, reduction="sum"))
        total += len(tokens)
    return right / total, loss / total


@torch.no_grad()
def _predictions(model: LanguageModel, examples: Examples, device: str) -> np.ndarray:
    found = [model(torch.from_numpy(piece.tokens).to(device)).logits.argmax(-1).cpu() for piece in _pieces(examples)]
    return torch.cat(found).numpy()


def _test_sets(cell: Cell, task: Task) -> Iterator[Examples]:
    """``test_count`` answers for each test length.

    A causal model's answer after t tokens depends on those alone, so where every token has an answer
    the longest sequences hold the tests of all shorter lengths.
    """
    lengths = [max(cell.test_lengths)] if task.has_running_answer else sorted(cell.test_lengths)
    for length in lengths:
        yield generate(
            cell.task, cell.test_count, length, length,
            seed=DATA_SEED, stream=(TEST, length), every_token=task.has_running_answer,
        )  # fmt: skip


def main() -> int:
    cell = msgspec.json.decode(sys.stdin.buffer.read(), type=Cell)
    torch.set_num_threads(1)

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), flush=True)  # a dead runner's closed pipe ends this process

    say({"outcome": run(cell, say)._asdict()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
