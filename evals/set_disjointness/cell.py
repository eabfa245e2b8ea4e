"""One run: train a model on set disjointness, test it at every size. A process of its own, started by the sweep."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from evals.set_disjointness.suites import Cell
from seqmodels.layout import Layout
from seqmodels.models import Initialization, LanguageModel, ModelConfig
from seqmodels.tasks.set_disjointness import set_disjointness
from seqmodels.training.config import OptimizerConfig, ScheduleConfig
from seqmodels.training.optimizer import make_optimizer, set_learning_rate
from seqmodels.training.schedule import learning_rate_factor

TEST_SEED = 1_000_003  # of the test sets, the same for every run
TRAIN, TEST = 0, 1  # streams
SAY_EVERY = 100
TOKENS_AT_ONCE = 1 << 15  # of a test


class Outcome(NamedTuple):
    """What a run leaves behind.

    Attributes:
        parameters: of the model.
        state_elements: numbers that the mixers carry from token to token at the longest test, the short
            convolutions' last inputs not counted.
        loss: mean over the last steps.
        accuracy: "A-B" sizes to the share of right answers.
        seconds: of the whole run.
    """

    parameters: int
    state_elements: int
    loss: float
    accuracy: dict[str, float]
    seconds: float


def build_model(cell: Cell, device: str | None = None) -> LanguageModel:
    """``pairs`` times a gated convolution and the arm's mixer, with MLPs between them on request; no positions."""
    mixer: dict[str, Any] = {"layer": cell.layer, "num_heads": cell.num_heads}
    if cell.arm == "causal":
        mixer |= {"key_dim": cell.feature_dim, "feature_map": "taylor", "epsilon": 1e-12}
    elif cell.arm == "prefix":
        mixer |= {"feature_dim": cell.feature_dim}
    else:
        mixer |= {"rotary_fraction": 0.0}
    mlp = " mlp" if cell.mlp_expansion else ""
    config = ModelConfig(
        vocab_size=cell.plan.vocab_size,
        d_model=cell.d_model,
        pattern=f"{cell.pairs}x(gated_conv{mlp} mixer{mlp})",
        layers={
            "mixer": mixer,
            "gated_conv": {"expand": 1},
            "mlp": {"d_hidden": cell.mlp_expansion * cell.d_model or None},
        },
        objective="prefix" if cell.arm == "prefix" else "next_token",
        initialization=Initialization(embedding_std=cell.embedding_std),
    )
    config.check_layers()
    return LanguageModel(config, device=device)


def state_elements(model: LanguageModel, length: int) -> int:
    """Numbers in the mixers' states at a context of ``length``."""
    state = model.init_state(1, max_length=length, device="meta")
    return sum(
        tensor.numel()
        for (_, layer, _), block in zip(model.backbone.named_layers(), state.layers, strict=True)
        if type(layer).__name__ != "GatedConv"
        for _, tensor in block.tensors()
        if tensor.is_floating_point()
    )


def run(cell: Cell, say: Callable[[dict[str, Any]], None] = lambda message: None) -> Outcome:
    """Trains and tests ``cell``; ``say`` hears how far it is.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    began, plan = time.monotonic(), cell.plan
    torch.manual_seed(cell.seed)
    model = build_model(cell).to(cell.device)  # drawn on the CPU: one seed, one start
    optimizer = make_optimizer(model, OptimizerConfig(learning_rate=plan.learning_rate, weight_decay=plan.weight_decay))
    schedule = ScheduleConfig(warmup_steps=plan.warmup_steps, final_fraction=0.0)
    total = torch.zeros((), device=cell.device)
    loss = math.nan
    for step in range(plan.steps):
        tokens, answers = _examples(cell, step % len(plan.train_sizes), plan.batch_size, cell.seed, (TRAIN, step))
        error = cross_entropy(_logits(model, cell, tokens), answers)
        error.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_learning_rate(optimizer, learning_rate_factor(schedule, step, plan.steps))
        optimizer.step()
        optimizer.zero_grad()
        total += error.detach()
        if (step + 1) % SAY_EVERY == 0 or step + 1 == plan.steps:
            loss = float(total) / (step % SAY_EVERY + 1)
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} before step {step + 1}")
            total.zero_()
            say({"step": step + 1, "steps": plan.steps, "loss": loss})
    accuracy = {f"{a}-{b}": _accuracy(model.eval(), cell, index) for index, (a, b) in enumerate(plan.test_sizes)}
    longest = max(map(sum, plan.test_sizes)) + 3
    return Outcome(model.num_parameters(), state_elements(model, longest), loss, accuracy, time.monotonic() - began)


def _examples(cell: Cell, index: int, count: int, seed: int, stream: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    sizes = cell.plan.test_sizes if stream[0] == TEST else cell.plan.train_sizes
    first, second = sizes[index]
    examples = set_disjointness(
        count, first=first, second=second, vocab_size=cell.plan.vocab_size, seed=seed, stream=stream
    )
    tokens, targets = (torch.from_numpy(array).long().to(cell.device) for array in examples)
    return tokens, targets[:, -1]


def _logits(model: LanguageModel, cell: Cell, tokens: Tensor) -> Tensor:
    """(batch, vocabulary) at the last token. All before it is the prefix, where the arm has one."""
    batch, length = tokens.shape
    layout = None
    if cell.arm == "prefix":
        layout = Layout.full(batch, length, prefix_lengths=[length - 1] * batch, device=tokens.device)
    return model.logits(model.encode(tokens, layout=layout).hidden[:, -1])


@torch.no_grad()
def _accuracy(model: LanguageModel, cell: Cell, index: int) -> float:
    tokens, answers = _examples(cell, index, cell.plan.test_count, TEST_SEED, (TEST, index))
    rows = max(1, TOKENS_AT_ONCE // tokens.shape[1])
    found = [_logits(model, cell, part).argmax(-1) for part in tokens.split(rows)]
    return float((torch.cat(found) == answers).double().mean())


def main() -> int:
    cell = msgspec.json.decode(sys.stdin.buffer.read(), type=Cell)
    torch.set_num_threads(1)

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), flush=True)  # a dead runner's closed pipe ends this process

    say({"outcome": run(cell, say)._asdict()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
