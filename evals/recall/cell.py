"""One run: train until solved, out of epochs or out of time, and test.

``python -m evals.recall.cell`` reads a :class:`Cell` as JSON on its input and writes one JSON object a
line: progress, and at last the outcome. The sweep starts one such process a cell.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from evals.recall.data import TEST, TRAIN, Resident, check_last, labels_of, make, resident
from evals.recall.model import RecallModel
from evals.recall.suites import Cell, tokens_of
from seqmodels.models.config import StackConfig
from seqmodels.state import State
from seqmodels.tasks.recall.examples import Examples
from seqmodels.tasks.recall.metrics import Score
from seqmodels.tasks.recall.registry import task_named, vocab_size
from seqmodels.tasks.shuffle import permutation
from seqmodels.training.config import OptimizerConfig
from seqmodels.training.optimizer import make_optimizer, set_learning_rate

ROWS, BATCHES = 2, 3  # streams of the order of rows and of batches
TOKENS_AT_ONCE = 1 << 15  # of evaluation
CONVOLUTIONS = ("conv", "inputs")  # state fields that hold a convolution's last inputs


class Outcome(NamedTuple):
    """What a run leaves behind.

    Attributes:
        parameters: of the model.
        epochs, steps: trained.
        ended: ``solved``, ``epochs``, ``seconds`` or ``diverged`` (a loss that is not finite).
        loss: mean training loss of the last epoch, nats.
        history: test score after each evaluation.
        test: score of each test set by its name.
        train_seconds: processor time of training on a CPU (one thread), wall time on a GPU.
        tokens_per_second: trained, over ``train_seconds``.
        seconds: of the whole process, wall time.
        state_bytes: of all layers for one sequence at ``state_context``; ``mixer_bytes`` without convolutions.
        digest: of the first training set.
    """

    parameters: int
    epochs: int
    steps: int
    ended: str
    loss: float
    history: list[float]
    test: dict[str, float]
    train_seconds: float
    tokens_per_second: float
    seconds: float
    state_bytes: int
    mixer_bytes: int
    digest: str

    @property
    def score(self) -> float:
        """The mean over the test sets."""
        return sum(self.test.values()) / len(self.test)


def build_model(cell: Cell, device: str | None = None) -> RecallModel:
    """The model of ``cell``.

    Raises:
        ValueError: a pattern or arguments that a layer's constructor refuses; a bidirectional layer.
    """
    config = StackConfig(
        d_model=cell.d_model, pattern=cell.pattern, layers=cell.layers,
        norm=cell.norm, dropout=cell.training.dropout,  # type: ignore[arg-type]
    )  # fmt: skip
    sizes = [vocab_size(cell.task, data.settings) for data in (*cell.train, *cell.test)]
    lengths = [tokens_of(cell.task, data, cell.reads) for data in (*cell.train, *cell.test)]
    with torch.device(device) if device is not None else torch.device("cpu"):
        model = RecallModel(
            config, max(sizes), max(lengths) if cell.learned_positions else None,
            last=task_named(cell.task).readout == "last",
        )  # fmt: skip
    for layer in model.layers():
        if layer.causality == "bidirectional":
            raise ValueError(
                f"{cell.arm}: layer {type(layer).__name__} is bidirectional; recall needs layers that are causal, or "
                "causal behind a prefix"
            )
    return model


def check_examples(cell: Cell, model: RecallModel, examples: Examples) -> Examples:
    """``examples``, or ``ValueError`` where a label stands in what the model reads in both directions."""
    if model.reads_prefix:
        check_last(examples, f"{cell.arm} reads all tokens but the last in both directions")
    return examples


def run(cell: Cell, say: Callable[[dict[str, Any]], None] = lambda progress: None) -> Outcome:
    """Trains and tests ``cell``; ``say`` hears of every evaluation.

    Raises:
        ValueError: what the generator or a layer refuses.
    """
    return Trainer(cell, say).outcome()


class Trainer:
    """The pieces of a run and the loop over them."""

    def __init__(self, cell: Cell, say: Callable[[dict[str, Any]], None]) -> None:
        self.began = time.monotonic()
        self.clock = time.process_time if cell.device == "cpu" else time.monotonic
        self.start = self.clock()
        self.cell, self.plan, self.say = cell, cell.training, say
        torch.manual_seed(cell.seed)
        self.model = build_model(cell).to(cell.device)  # drawn on the CPU: one seed, one start
        self.optimizer = make_optimizer(
            self.model,
            OptimizerConfig(cell.learning_rate, cell.weight_decay, self.plan.betas, gradient_clip=None),
        )
        first = [
            check_examples(cell, self.model, make(cell, data, "train", (TRAIN, index)))
            for index, data in enumerate(cell.train)
        ]
        self.digest = first[0].digest()
        self.train = [resident(examples, cell.device) for examples in first]
        self.tests = dict(
            zip(
                labels_of(cell.test, cell.task),
                [
                    resident(make(cell, data, "test", (TEST, index)), cell.device)
                    for index, data in enumerate(cell.test)
                ],
                strict=True,
            )
        )
        self.compiled = torch.compile(self._loss) if self.plan.compile else self._loss
        self.train_seconds, self.tokens, self.steps = 0.0, 0, 0
        self.total = self.plan.epochs * len(self._places())

    def outcome(self) -> Outcome:
        history: list[float] = []
        ended, epoch, loss, scores = "epochs", 0, math.nan, {}
        for epoch in range(1, self.plan.epochs + 1):
            loss, in_time = self.epoch(epoch - 1)
            last = epoch == self.plan.epochs or not in_time or not math.isfinite(loss)
            if not last and epoch % self.plan.evaluate_every:
                continue
            scores = {name: self._score(data) for name, data in self.tests.items()}
            history.append(sum(scores.values()) / len(scores))
            self.say({"epoch": epoch, "epochs": self.plan.epochs, "loss": loss, "score": history[-1]})
            if not math.isfinite(loss):
                ended = "diverged"
            elif self.plan.stop_above is not None and history[-1] > self.plan.stop_above:
                ended = "solved"
            elif not in_time:
                ended = "seconds"
            else:
                continue
            break
        total, mixer = state_bytes(self.model, self.cell.state_context)
        return Outcome(
            self.model.num_parameters(), epoch, self.steps, ended, loss, history, scores, self.train_seconds,
            self.tokens / max(self.train_seconds, 1e-9), time.monotonic() - self.began, total, mixer, self.digest,
        )  # fmt: skip

    def epoch(self, epoch: int) -> tuple[float, bool]:
        """Mean loss of the epoch (of the part that was trained), and whether there is time left."""
        plan = self.plan
        self.model.train()
        if plan.fresh and epoch:
            self.train = [
                resident(make(self.cell, data, "train", (TRAIN, index, epoch)), self.cell.device)
                for index, data in enumerate(self.cell.train)
            ]
        total, count = torch.zeros((), device=self.cell.device), 0
        began = self.clock()
        in_time = True
        if plan.schedule == "epoch_cosine":
            set_learning_rate(self.optimizer, (1 + math.cos(math.pi * epoch / plan.epochs)) / 2)
        for batch in self._batches(epoch):
            if plan.schedule == "step_cosine":
                done = self.steps / max(1, self.total - 1)
                part = plan.final_fraction
                set_learning_rate(self.optimizer, part + (1 - part) * (1 + math.cos(math.pi * done)) / 2)
            loss = self.loss(batch)
            loss.backward()
            if plan.gradient_clip is not None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), plan.gradient_clip, foreach=True)
            self.optimizer.step()
            self.optimizer.zero_grad()
            total += loss.detach()  # read once an epoch: a GPU is never waited for inside one
            count += 1
            self.steps += 1
            self.tokens += batch.tokens.numel()
            if plan.seconds is not None and self.clock() - self.start > plan.seconds:
                in_time = False
                break
        mean = float(total) / count
        self.train_seconds += self.clock() - began
        return mean, in_time

    def _batches(self, epoch: int) -> Iterator[Resident]:
        """The batches of an epoch, each of one data set, whose last one may be smaller.

        Shuffled, rows change places within their set, and batches of several sets are mixed.
        """
        size, shuffle = self.plan.batch_size, self.plan.shuffle
        places = self._places()
        orders: list[Tensor | None] = [None] * len(self.train)
        if shuffle:
            orders = [
                torch.from_numpy(permutation(self.cell.seed, ROWS, epoch, index, count=len(data))).to(
                    data.tokens.device
                )
                for index, data in enumerate(self.train)
            ]
            if len(self.train) > 1:
                places = [places[at] for at in permutation(self.cell.seed, BATCHES, epoch, count=len(places))]
        for index, at in places:
            order = orders[index]
            yield self.train[index].rows(slice(at, at + size) if order is None else order[at : at + size])

    def _places(self) -> list[tuple[int, int]]:
        """Of each batch its data set and first row."""
        size = self.plan.batch_size
        return [(index, at) for index, data in enumerate(self.train) for at in range(0, len(data), size)]

    def _hidden(self, batch: Resident) -> tuple[Tensor, dict[str, Tensor]]:
        """(rows, labels, d_model) at the labelled positions, and the layers' losses and metrics."""
        lower = self.plan.precision == "bfloat16"
        with torch.autocast(self.cell.device, torch.bfloat16, enabled=lower):
            hidden, aux = self.model(batch.tokens)
            return self.model.read(hidden, batch.positions), aux

    def loss(self, batch: Resident) -> Tensor:
        """Mean cross-entropy at the labelled positions, plus the layers' losses.

        A last, smaller batch is not worth compiling for.
        """
        return (self.compiled if len(batch) == self.plan.batch_size else self._loss)(batch)

    def _loss(self, batch: Resident) -> Tensor:
        hidden, aux = self._hidden(batch)
        loss = F.cross_entropy(self.model.logits(hidden).flatten(0, 1).float(), batch.answers.flatten())
        for name, value in aux.items():
            if name.endswith("_loss"):
                loss = loss + value
        return loss

    @torch.no_grad()
    def _score(self, data: Resident) -> float:
        self.model.eval()
        task = task_named(self.cell.task)
        score = Score(self.model.embedding.num_embeddings)
        rows = max(1, TOKENS_AT_ONCE // data.tokens.shape[1])
        for at in range(0, len(data), rows):
            batch = data.rows(slice(at, at + rows))
            predictions = self.model.logits(self._hidden(batch)[0]).argmax(-1)
            score.add(predictions.cpu().numpy(), batch.answers.cpu().numpy())
        return score.macro_accuracy() if task.metric == "macro_accuracy" else score.accuracy_by_example()


def state_bytes(model: RecallModel, context_length: int) -> tuple[int, int]:
    """Bytes of all layers' states for one sequence: all, and without the inputs that convolutions keep."""
    total = mixer = 0
    for layer in model.layers():
        state = layer.init_state(1, max_length=context_length, device="meta")
        assert isinstance(state, State)
        for name, tensor in state.tensors():
            size = tensor.numel() * tensor.element_size()
            total += size
            mixer += 0 if name.rpartition(".")[2] in CONVOLUTIONS else size
    return total, mixer


def main() -> int:
    cell = msgspec.json.decode(sys.stdin.buffer.read(), type=Cell)
    torch.set_num_threads(1)

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), flush=True)  # a dead sweep's closed pipe ends this process

    say({"outcome": run(cell, say)._asdict()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
