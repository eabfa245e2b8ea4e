"""What a person sees while a conversion runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

_LINES = 20  # a stage, where there is no terminal


class Progress:
    """A bar for each stage on a terminal, some lines elsewhere; silent when ``console`` is None."""

    def __init__(self, console: Console | None) -> None:
        self._console = console
        self._bars: Bars | None = None
        if console is not None and console.is_terminal:
            self._bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self._bars.start()

    @contextmanager
    def stage(self, number: int, steps: int, done: int) -> Iterator[Callable[[int, float], None]]:
        """A function to call with (steps done, loss)."""
        name = f"stage {number}: {'feature maps' if number == 1 else 'fine-tuning'}"
        bars, console = self._bars, self._console
        if bars is not None:
            task = bars.add_task(name, total=steps, completed=done, loss="")
            yield lambda step, loss: bars.update(task, completed=step, loss=f"{loss:.4f}")
        elif console is not None:
            every = max(1, steps // _LINES)
            yield (
                lambda step, loss: (
                    console.print(f"{name}, step {step} of {steps}, loss {loss:.4f}", highlight=False)
                    if step % every == 0 or step == steps
                    else None
                )
            )
        else:
            yield lambda step, loss: None

    def message(self, text: str) -> None:
        if self._console is not None:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        if self._bars is not None:
            self._bars.stop()
