"""One cell: reads a :class:`Cell` as JSON on its input, writes progress and at last the outcome, an object a line."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import msgspec
import torch

from evals.hydra import facts, memory, routing, speed
from evals.hydra.suites import Cell
from evals.hydra.training import Say

STUDIES = {"throughput": speed.measure, "routing": routing.measure, "memory": memory.measure, "facts": facts.measure}


def run(cell: Cell, say: Say = lambda message: None) -> dict[str, Any]:
    """What the study measured, and the seconds it took."""
    began = time.monotonic()
    rows = STUDIES[cell.study](cell.seed, cell.options, say)
    return {"rows": rows, "seconds": time.monotonic() - began}


def main() -> int:
    cell = msgspec.json.decode(sys.stdin.buffer.read(), type=Cell)
    torch.set_num_threads(1)

    def say(message: dict[str, Any]) -> None:
        print(json.dumps(message), flush=True)  # a dead runner's closed pipe ends this process

    say({"outcome": run(cell, say)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
