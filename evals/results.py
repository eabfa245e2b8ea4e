"""One row a measurement, appended to ``DIR/results.jsonl`` as soon as it is made.

Every suite writes the same fields, so that rows of different suites, days and machines can be read
together. Nothing is ever rewritten: a later row of the same key replaces an earlier one when read.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

FIELDS = (
    "suite", "case", "layer", "backend", "metric", "value", "unit", "seed", "config", "rival",
    "machine", "versions", "commit", "time",
)  # fmt: skip
FILE = "results.jsonl"
_PACKAGES = (
    "torch", "triton", "numpy", "transformers", "flash-attn", "causal-conv1d", "mamba-ssm", "flash-linear-attention",
)  # fmt: skip


class Results:
    """The rows of one suite in one folder.

    Args:
        folder: made when missing; rows are appended to ``folder/results.jsonl``.
        suite: the module's name: ``recall``, ``throughput``, ...
        machine: what :func:`machine` says unless given.
    """

    def __init__(self, folder: str | Path, suite: str, machine_name: str | None = None) -> None:
        self.path = Path(folder) / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.suite = suite
        self.stamp = {"machine": machine_name or machine(), "versions": versions(), "commit": commit()}
        _end_last_line(self.path)

    def write(
        self,
        case: str,
        metric: str,
        value: float | None,
        unit: str,
        *,
        layer: str = "",
        backend: str = "",
        seed: int | None = None,
        config: Mapping[str, Any] | None = None,
        rival: str | None = None,
    ) -> dict[str, Any]:
        """Appends one row and returns it.

        Args:
            case: what was measured, unique within the suite together with layer, backend, metric, seed, rival.
            value: a number, or None for something that could not be measured (``config["reason"]`` says why).
            layer: registry name of the layer, or the op's name.
            config: everything that reruns the case.
            rival: for a comparison, whom ``value`` compares with; for a rival's own number, its name.
        """
        if value is not None and not isinstance(value, (int, float)):
            raise TypeError(f"value of {case}/{metric} is {value!r}; expected a number or None")
        if value is not None and not math.isfinite(value):
            config = {**(config or {}), "reason": f"the value is {value}"}
            value = None
        row: dict[str, Any] = {
            "suite": self.suite, "case": case, "layer": layer, "backend": backend, "metric": metric, "value": value,
            "unit": unit, "seed": seed, "config": dict(config or {}), "rival": rival, **self.stamp,
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }  # fmt: skip
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def finished(self, metric: str | None = None) -> set[str]:
        """Cases that this machine has already measured at this commit: what a restarted run may skip."""
        return {
            row["case"]
            for row in read(self.path)
            if row["suite"] == self.suite
            and row["value"] is not None
            and all(row[name] == self.stamp[name] for name in ("machine", "commit"))
            and metric in (None, row["metric"])
        }


def read(*paths: str | Path) -> list[dict[str, Any]]:
    """Rows of result files, or of all ``*.jsonl`` under folders; missing ones have none.

    Raises:
        ValueError: a line that is no row, with its file and number.
    """
    rows = []
    for path in paths:
        path = Path(path)
        files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path] if path.exists() else []
        for file in files:
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{file}:{number} is not JSON ({error}); delete the line") from None
                if not isinstance(row, dict) or (missing := set(FIELDS) - set(row)):
                    raise ValueError(f"{file}:{number} lacks {sorted(missing) if isinstance(row, dict) else FIELDS}")
                rows.append(row)
    return rows


def latest(rows: Iterable[Mapping[str, Any]], *, by: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """The last row for each key (suite, case, layer, backend, metric, seed, rival, machine, and ``by``)."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: row["time"]):
        key = tuple(
            row[name] for name in ("suite", "case", "layer", "backend", "metric", "seed", "rival", "machine", *by)
        )
        kept.pop(key, None)
        kept[key] = dict(row)
    return list(kept.values())


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    """Lines of a markdown table."""
    header = list(header)
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |"


@functools.cache
def machine() -> str:
    """The machine in one line: processor, cores, GPU."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = names[0] if names else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {cores} cores, {torch.backends.cpu.get_cpu_capability()}{gpu}"


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide speed, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


@functools.cache
def commit() -> str:
    """The commit that is checked out; where tracked files differ from it, with a digest of the difference.

    ``SEQMODELS_COMMIT`` says it for a copy of the tree without its history.
    """
    if os.environ.get("SEQMODELS_COMMIT"):
        return os.environ["SEQMODELS_COMMIT"]
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("diff", "HEAD", "--", "seqmodels", "csrc", ":(glob)evals/**/*.py")
        digest = f"+{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else ""
        return git("rev-parse", "--short=12", "HEAD") + digest
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _end_last_line(path: Path) -> None:
    """Cuts a row that a killed run left half written."""
    if not path.exists():
        return
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])
