"""The committed record of registers and shared memory, one line a row, so that a change shows in review."""

from __future__ import annotations

import json
from pathlib import Path

from seqmodels.audit.compilation import Row

PATH = Path(__file__).with_name("baseline.json")


def load(path: Path = PATH) -> tuple[str, dict[str, list[int]]]:
    """(compiler version, row key -> [registers, shared memory, spill])."""
    if not path.exists():
        return "", {}
    stored = json.loads(path.read_text())
    return stored["triton"], stored["rows"]


def save(rows: list[Row], triton_version: str, path: Path = PATH, *, keep: dict[str, list[int]] | None = None) -> None:
    """Writes the rows, sorted. ``keep``: rows of an earlier run that this one did not visit."""
    entries = dict(keep or {})
    for row in rows:
        if row.resources is not None:
            entries[row.key] = [row.resources.registers, row.resources.shared, row.resources.spill]
    lines = [f"  {json.dumps(key)}: {json.dumps(entries[key])}" for key in sorted(entries)]
    body = ",\n".join(lines)
    path.write_text(f'{{"triton": {json.dumps(triton_version)}, "rows": {{\n{body}\n}}}}\n')


def regressions(rows: list[Row], recorded: dict[str, list[int]]) -> list[str]:
    """Rows that need more registers or shared memory than the record says."""
    found = []
    for row in rows:
        before = recorded.get(row.key)
        if before is None or row.resources is None:
            continue
        for name, old, new in (
            ("registers", before[0], row.resources.registers),
            ("shared memory", before[1], row.resources.shared),
        ):
            if new > old:
                found.append(f"{row.key}: {name} {old} -> {new}")
    return found


def changes(rows: list[Row], recorded: dict[str, list[int]]) -> tuple[list[str], list[str]]:
    """Keys of this run that the record lacks, and of the record that this run lacks."""
    now = {row.key for row in rows}
    return sorted(now - set(recorded)), sorted(set(recorded) - now)
