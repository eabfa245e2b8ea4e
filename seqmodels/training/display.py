"""What a person sees while a run goes on."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Display:
    """A live progress bar on a terminal; a line for each metric row elsewhere. Silent when ``console`` is None."""

    def __init__(self, console: Console | None, steps: int, done: int) -> None:
        self._console = console
        self._progress = None
        if console is not None and console.is_terminal:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._progress.add_task("training", total=steps, completed=done, numbers="")
            self._progress.start()

    def step(self, step: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def row(self, row: dict) -> None:
        """Shows a metric row."""
        if self._console is None:
            return
        if "validation_bits_per_byte" in row:
            text = f"step {row['step']:>6}  held-out bits per byte {row['validation_bits_per_byte']:.4f}"
            if "validation_masked_loss" in row:
                text += f", masked tokens {row['validation_masked_loss']:.4f} nats"
            self._console.print(text)
            return
        numbers = f"{row['bits_per_byte']:.3f} bits per byte, {row['tokens_per_second']:,.0f} tokens/s"
        if self._progress is not None:
            self._progress.update(self._task, numbers=numbers)
        else:
            self._console.print(f"step {row['step']:>6}  {numbers}  learning rate {row['learning_rate']:.2e}")

    def message(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
