"""The audit's result as a table, as JSON and as a markdown page."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from seqmodels.audit.compilation import Row

COLUMNS = (
    "kernel", "variant", "dtype", "tile", "target",
    "registers", "spill", "shared", "matrix", "local", "vectorised", "occupancy",
)  # fmt: skip


@dataclass
class Audit:
    """What one run found.

    Attributes:
        rows: one per compilation.
        problems: kernels nobody registered and the like; regressions against the baseline.
        notes: what was left out and why; nothing in here fails the audit.
        versions: compilers used.
    """

    rows: list[Row]
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return not self.problems and not any(row.failures for row in self.rows)

    def to_json(self) -> str:
        rows = [asdict(row) for row in self.rows]
        return json.dumps(
            {
                "passed": self.passed,
                "versions": self.versions,
                "problems": self.problems,
                "notes": self.notes,
                "rows": rows,
            },
            indent=1,
        )


def cells(row: Row) -> list[str]:
    """The row's entries under :data:`COLUMNS`."""
    names = [row.kernel, row.variant, row.dtype, row.tile, row.target]
    used = row.resources
    if used is None:
        return [*names, *["-"] * 7]
    matrix = ", ".join(f"{count} {family}" for family, count in used.matrix.items()) or "-"
    return [
        *names,
        str(used.registers),
        str(used.spill),
        f"{used.shared / 1024:.1f} KiB",
        matrix,
        str(used.local_accesses),
        f"{used.vectorised}/{used.global_accesses}",
        f"{used.occupancy:.0%}" if used.occupancy else "-",
    ]


def print_table(audit: Audit, console: Console, *, every_row: bool = True) -> None:
    """The table, then what failed. ``every_row=False`` shows failing rows only."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in COLUMNS:
        right = name in ("registers", "spill", "shared", "local", "vectorised", "occupancy")
        table.add_column(name, justify="right" if right else "left", no_wrap=name in ("kernel", "target", "dtype"))
    for row in audit.rows:
        if every_row or row.failures:
            table.add_row(*cells(row), style="red" if row.failures else None)
    if table.row_count:
        console.print(table)
    for row in audit.rows:
        for failure in row.failures:
            console.print(f"[red]FAIL[/red] {row.key}: {failure}", highlight=False, soft_wrap=True)
    for problem in audit.problems:
        console.print(f"[red]FAIL[/red] {problem}", highlight=False, soft_wrap=True)
    for note in audit.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True)
    kernels = len({row.kernel for row in audit.rows})
    state = "[green]passed[/green]" if audit.passed else "[red]failed[/red]"
    console.print(f"audit {state}: {len(audit.rows)} compilations of {kernels} kernels", highlight=False)


def markdown(audit: Audit, command: str) -> str:
    """The page that is committed beside the results."""
    versions = ", ".join(f"{name} {version}" for name, version in audit.versions.items())
    lines = [
        "# Kernel audit",
        "",
        f"Written by `{command}` with {versions}. One line a compilation: registers and spill bytes of a thread,",
        "shared memory of a block, matrix instructions, local-memory accesses, 16-byte accesses among the global ones,",
        "and the share of a multiprocessor's warps that fit.",
        "",
        *_markdown_table(COLUMNS, (cells(row) for row in audit.rows)),
        "",
    ]
    failures = [f"- {row.key}: {failure}" for row in audit.rows for failure in row.failures]
    failures += [f"- {problem}" for problem in audit.problems]
    if failures:
        lines += ["## Failures", "", *failures, ""]
    if audit.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in audit.notes), ""]
    return "\n".join(lines)


def _markdown_table(header: Iterable[str], rows: Iterable[list[str]]) -> list[str]:
    header = list(header)
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(row) + " |" for row in rows),
    ]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if text.endswith("\n") else text + "\n")
