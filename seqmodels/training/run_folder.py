"""The folder of one run: what it holds, who may write to it.

::

    RUN/config.yaml     the complete training configuration, the model under `model`
    RUN/metrics.jsonl   one row a measurement
    RUN/loss.png        the curves
    RUN/checkpoints/    step_00000100, ...
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from seqmodels.configuration import convert, differences, dump_yaml, load_yaml
from seqmodels.training.checkpoint import list_checkpoints, prune_checkpoints, remove_leftovers
from seqmodels.training.config import FREE_ON_RESUME, TrainConfig


class RunFolderError(RuntimeError):
    """A run folder that is not writable, is taken, or belongs to another configuration."""


class RunFolder:
    """Paths and metrics of a run. Make one with :meth:`create` or :meth:`resume`; read with :meth:`open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics_path = path / "metrics.jsonl"
        self.config_path = path / "config.yaml"

    @classmethod
    def create(cls, path: Path, config: TrainConfig) -> RunFolder:
        """A new run. Refuses a folder that holds one.

        Raises:
            RunFolderError: taken, or not writable.
        """
        run = cls(path)
        if run.config_path.exists():
            raise RunFolderError(
                f"{path} already holds a run; go on with it (--resume), or choose another folder with --out"
            )
        with _writing(path):
            run.checkpoints.mkdir(parents=True, exist_ok=True)
            _write_whole(run.config_path, dump_yaml(config))
        return run

    @classmethod
    def resume(cls, path: Path, config: TrainConfig) -> RunFolder:
        """The run in ``path``, after a check that ``config`` is the one it was started with.

        Raises:
            RunFolderError: no run there, another configuration (every differing key is listed), or
                not writable.
        """
        run = cls(path)
        changed = differences(_binding(run.config()), _binding(config))
        if changed:
            raise RunFolderError(
                f"{path} holds a run of another configuration; in it, against the one given:\n  "
                + "\n  ".join(changed)
                + "\nGo on with the run's own configuration, or choose another folder with --out"
            )
        with _writing(path):
            remove_leftovers(run.checkpoints)
            prune_checkpoints(run.checkpoints, config.checkpoint.keep)
        return run

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run, to read."""
        run = cls(path)
        run.config()
        return run

    def config(self) -> TrainConfig:
        if not self.config_path.exists():
            raise RunFolderError(f"{self.path} is not a run folder: it has no config.yaml")
        return convert(load_yaml(self.config_path), TrainConfig)

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        found = list_checkpoints(self.checkpoints)
        return found[-1] if found else None

    def rows(self) -> Iterator[dict[str, Any]]:
        """Metric rows; a last line that a kill cut short is skipped."""
        if self.metrics_path.exists():
            for line in self.metrics_path.read_text().splitlines(keepends=True):
                if line.endswith("\n"):
                    yield json.loads(line)

    def rewind(self, step: int) -> None:
        """Forgets metric rows after ``step``: steps that are about to be repeated."""
        kept = [json.dumps(row) + "\n" for row in self.rows() if row["step"] <= step]
        with _writing(self.path):
            _write_whole(self.metrics_path, "".join(kept))

    def append(self, row: dict[str, Any]) -> None:
        """Adds a metric row, at once on file."""
        with _writing(self.path), open(self.metrics_path, "a") as file:
            file.write(json.dumps(row) + "\n")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunFolderError(
            f"cannot write run folder {path}: {error.strerror or error}; free space, fix its permissions, or choose "
            "another with --out"
        ) from error


def _binding(config: TrainConfig) -> dict[str, Any]:
    """The part of a configuration that decides the weights."""
    data = msgspec.to_builtins(config)
    for key in FREE_ON_RESUME:
        *parents, last = key.split(".")
        inner = data
        for name in parents:
            inner = inner[name]
        del inner[last]
    return data


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".writing-{path.name}")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
