"""One teacher's training, or one conversion of it.

``python -m evals.conversion.cell`` reads a :class:`~evals.conversion.suites.Cell` as JSON and writes one JSON object a
line: progress, and at last the outcome. Teachers and converted models stay in the cache folder under the name of
their digest, so that a killed conversion goes on and a finished one is not made again.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from evals.conversion.suites import Cell, Teacher
from seqmodels.convert.files import new_folder
from seqmodels.convert.hedgehog.progress import Progress
from seqmodels.convert.hedgehog.run import convert_model
from seqmodels.training.config import DataConfig, ScheduleConfig
from seqmodels.training.data import cache_folder, load_text
from seqmodels.training.schedule import learning_rate_factor

_SHOWN = 25  # steps between messages


def folder_of(cell: Cell) -> Path:
    """Where a cell's model lies."""
    digest = cell.teacher.digest if cell.conversion is None else cell.digest
    return cache_folder(DataConfig()).parent / "conversion" / digest


def train_teacher(plan: Teacher, folder: Path) -> None:
    """Writes the teacher to ``folder``."""
    torch.manual_seed(plan.seed)
    data = load_text(plan.data, seed=plan.seed, vocab_size=256)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=plan.hidden_size, intermediate_size=plan.hidden_size * 8 // 3 // 8 * 8,
            num_hidden_layers=plan.layers, num_attention_heads=plan.heads, num_key_value_heads=plan.key_heads,
            max_position_embeddings=plan.data.sequence_length, tie_word_embeddings=True,
            bos_token_id=0, eos_token_id=0, pad_token_id=None,
        )
    )  # fmt: skip
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=plan.weight_decay, fused=True
    )
    schedule = ScheduleConfig(warmup_steps=plan.warmup_steps)
    for step in range(plan.steps):
        batch = data.train.batch(step * plan.batch_size, plan.batch_size)
        logits = model(input_ids=batch.tokens, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * learning_rate_factor(schedule, step, plan.steps)
        optimizer.step()
        optimizer.zero_grad()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(f"the teacher diverged at step {step}: loss {value}; lower learning_rate")
        if (step + 1) % _SHOWN == 0:
            say({"step": step + 1, "steps": plan.steps, "loss": value})
    with new_folder(folder) as unfinished:
        model.save_pretrained(unfinished)


def run(cell: Cell) -> dict[str, Any]:
    """Trains or converts; what the conversion's report holds, with seconds."""
    began, folder = time.perf_counter(), folder_of(cell)
    processor = time.process_time()
    if cell.conversion is None:
        if not (folder / "config.json").exists():
            train_teacher(cell.teacher, folder)
        summary: dict[str, Any] = {}
    else:
        if (folder / "report.json").exists():
            shutil.rmtree(folder)  # its rows are not in the results: measure again, at this commit
        teacher = folder_of(msgspec.structs.replace(cell, conversion=None))
        settings = msgspec.structs.replace(cell.conversion, model=str(teacher))
        summary = convert_model(settings, folder, resume=True, progress=Messages(None))
    return {
        **summary,
        "folder": str(folder),
        "seconds": time.perf_counter() - began,
        "processor": time.process_time() - processor,
    }


class Messages(Progress):
    """A conversion's progress as lines of JSON."""

    @contextmanager
    def stage(self, number: int, steps: int, done: int) -> Iterator[Callable[[int, float], None]]:
        def show(step: int, loss: float) -> None:
            if step % _SHOWN == 0:
                say({"stage": number, "step": step, "steps": steps, "loss": loss})

        yield show


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    logging.disable_progress_bar()
    say({"outcome": run(msgspec.json.decode(sys.stdin.read(), type=Cell))})
