"""What sparse gradients save of a product-key memory's training step.

    python -m evals.sparse_table --out evals/results/sparse_table

Two memories with the same weights, one with a dense and one with a sparse gradient, take steps in turn: forward,
backward, the norm and clipping of the training loop, and its optimiser. Seconds are processor time of one thread. The
layer is a new one: what it reads is spread over the whole table.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from evals.results import Results, machine
from seqmodels.channel import ProductKeyMemory
from seqmodels.training.config import OptimizerConfig
from seqmodels.training.distributed import Processes
from seqmodels.training.gradients import clip_gradients, gradient_norm, settle_sparse_gradients
from seqmodels.training.optimizer import make_optimizer

HERE = Processes(0, 1, torch.device("cpu"))
PARTS = ("forward", "backward", "clip", "optimizer")


class Subject:
    """A memory and its optimiser."""

    def __init__(self, width: int, num_subkeys: int, sparse: bool) -> None:
        torch.manual_seed(0)
        self.layer = ProductKeyMemory(width, num_subkeys=num_subkeys, sparse=sparse, dropout=0.0)
        self.optimizer = make_optimizer(self.layer, OptimizerConfig())
        self.rows, self.gradient_bytes = 0, 0

    def step(self, x: torch.Tensor) -> dict[str, float]:
        """Seconds of each part of one step."""
        clock = [time.process_time()]
        loss = self.layer(x).y.square().mean()
        clock.append(time.process_time())
        loss.backward()
        clock.append(time.process_time())
        settle_sparse_gradients(self.layer.parameters(), HERE)
        clip_gradients(self.layer.parameters(), 1.0, gradient_norm(self.layer.parameters()))
        clock.append(time.process_time())
        self.optimizer.step()
        clock.append(time.process_time())
        gradient = self.layer.values.grad
        assert gradient is not None
        if gradient.is_sparse:
            parts = (gradient.values(), gradient.indices())
            self.rows, self.gradient_bytes = parts[0].shape[0], sum(part.nbytes for part in parts)
        else:
            self.gradient_bytes = gradient.nbytes
        self.optimizer.zero_grad()
        return {name: after - before for name, before, after in zip(PARTS, clock, clock[1:], strict=False)}


def main(
    out: Annotated[Path, typer.Option(help="folder of results.jsonl")] = Path("evals/results/sparse_table"),
    width: Annotated[int, typer.Option(help="of the layer and of a row")] = 512,
    num_subkeys: Annotated[int, typer.Option(help="the table has the square of it as rows")] = 512,
    tokens: Annotated[list[int] | None, typer.Option(help="tokens a step, again and again")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="steps measured, after one that is not")] = 5,
) -> None:
    """Measure training steps of a product-key memory with dense and with sparse gradients."""
    torch.set_num_threads(1)
    results, table = Results(out, "sparse_table"), Table(title=f"{num_subkeys**2:,} rows of {width}, {machine()}")
    for head in ("tokens", "rows read", "gradient, MiB", *(f"{part}, ms" for part in PARTS), "dense / sparse"):
        table.add_column(head, justify="right")
    dense, sparse = (Subject(width, num_subkeys, kind) for kind in (False, True))
    for count in tokens or [64, 512, 2048]:
        x = torch.randn(1, count, width, generator=torch.Generator().manual_seed(count))
        pairs = [(dense.step(x), sparse.step(x)) for _ in range(repeats + 1)][1:]
        ratio = statistics.median(sum(one.values()) / sum(other.values()) for one, other in pairs)
        config = {"tokens": count, "width": width, "num_subkeys": num_subkeys, "threads": 1, "repeats": repeats}
        case, share = f"{count} tokens", sparse.rows / num_subkeys**2
        results.write(case, "step time, dense over sparse", ratio, "ratio", layer="product_key_memory", config=config)
        results.write(case, "share of rows read", share, "ratio", layer="product_key_memory", config=config)
        for index, (name, subject) in enumerate((("dense", dense), ("sparse", sparse))):
            medians = {part: statistics.median(pair[index][part] for pair in pairs) for part in PARTS}
            for part, seconds in medians.items():
                results.write(
                    case, f"{part}, {name}", seconds, "seconds", layer="product_key_memory", config=config
                )  # fmt: skip
            size = subject.gradient_bytes
            results.write(case, f"gradient, {name}", size, "bytes", layer="product_key_memory", config=config)
            table.add_row(
                f"{count} {name}", f"{share:.0%}", f"{size / 2**20:.0f}",
                *(f"{seconds * 1e3:.0f}" for seconds in medians.values()), f"{ratio:.2f}" if index else "",
            )  # fmt: skip
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
