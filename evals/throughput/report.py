"""The page of a results folder: tables and figures made from its rows alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from evals.results import latest, markdown_table, read
from evals.throughput import figures
from evals.throughput.derived import BAR

Rows = list[dict[str, Any]]


def write_report(target: Path, folders: Sequence[Path]) -> Path:
    """Writes ``target/README.md`` and its figures from the throughput rows of all ``folders``.

    Raises:
        FileNotFoundError: no row of this suite in them.
    """
    rows = latest(row for row in read(*folders) if row["suite"] == "throughput")
    if not rows:
        where = ", ".join(map(str, folders))
        raise FileNotFoundError(f"no throughput rows in {where}; run --suite cpu --out DIR first")
    target.mkdir(parents=True, exist_ok=True)
    lines = ["# Throughput", ""]
    for machine in sorted({row["machine"] for row in rows}):
        here = [row for row in rows if row["machine"] == machine]
        lines += _machine_page(here, machine, target)
    path = target / "README.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def update_readme(readme: Path, folders: Sequence[Path]) -> None:
    """Rewrites what stands between ``<!-- throughput -->`` and ``<!-- /throughput -->`` with the headline.

    Raises:
        ValueError: the file lacks the two markers.
    """
    text = readme.read_text(encoding="utf-8")
    begin, end = "<!-- throughput -->\n", "<!-- /throughput -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{readme} has no place for the headline: add the lines {begin.strip()} and {end} once each")
    before, _, rest = text.partition(begin)
    lines = []
    rows = latest(row for row in read(*folders) if row["suite"] == "throughput")
    for machine in sorted({row["machine"] for row in rows}):
        lines += headline([row for row in rows if row["machine"] == machine], machine)
    readme.write_text(before + begin + "\n".join(lines) + end + rest.partition(end)[2], encoding="utf-8")


def headline(rows: Rows, machine: str) -> list[str]:
    """The longest case of every layer and mode that was measured beside others, in one table."""
    chosen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        if row["metric"] == "ratio" and not str(row["rival"]).startswith("seqmodels"):
            config = row["config"]
            key = (config["kind"], config["layer"], config["mode"], config["batch"])
            if key not in chosen or config["length"] > chosen[key]["config"]["length"]:
                chosen[key] = row
    if not chosen:
        return []
    cells = [_case_cells(rows, row["case"]) for row in chosen.values()]
    commits = ", ".join(sorted({row["commit"] for row in chosen.values()}))
    header = ["case", "seqmodels, ms", "share of the machine's limit", "others, times longer"]
    table = markdown_table(header, ([case[0], case[2], case[4], case[6]] for case in cells))
    return [f"{machine}, commit {commits}:", "", *table, ""]


def _machine_page(rows: Rows, machine: str, target: Path) -> list[str]:
    commits = sorted({row["commit"] for row in rows})
    versions = max((row["versions"] for row in rows), key=len)
    ceilings = {row["case"].removeprefix("ceiling/"): row for row in rows if row["metric"] == "ceiling"}
    suite = "gpu" if any(row["config"].get("device") == "cuda" for row in rows) else "cpu"
    threads = sorted({row["config"]["threads"] for row in rows if row["config"].get("threads")})
    lines = [
        f"## {machine}",
        "",
        f"Measured by `python -m evals.throughput --suite {suite} --out DIR"
        + (f" --threads {threads[0]}" if len(threads) == 1 and threads[0] != 1 else "")
        + f"`, page by `--report DIR`. Commit {', '.join(commits)}. "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + (f". {threads[0]} CPU thread{'s' if threads[0] > 1 else ''}" if len(threads) == 1 else "")
        + ".",
        "",
        "Ceilings of this machine in the same run: "
        + ", ".join(f"{name} {row['value']:.0f} {row['unit']}" for name, row in ceilings.items())
        + ". The floor of a case is the larger of its least bytes over the copy rate and its operations over the rate "
        "of a matrix product of its dtype; the share is floor over time. Times are medians of interleaved runs; every "
        "contestant that computes the same function was held against float64 before it was timed.",
        "",
    ]
    slug = re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-")[:40]
    for title, file in figures.draw(rows, target, slug):
        lines += [f"![{title}]({file})", ""]
    lines += _cases_table(rows) + _slopes_table(rows) + _left_out(rows)
    return lines


def _cases_table(rows: Rows) -> list[str]:
    lines: list[str] = []
    for kind, title in (("op", "Ops"), ("layer", "Layers"), ("model", "Models")):
        cells = [_case_cells(rows, case) for case in _names(rows, kind)]
        if cells:
            header = [
                "case",
                "backend",
                "ms (p20 to p80)",
                "tokens/s",
                "share of limit",
                "peak MiB",
                "others, times longer",
            ]
            lines += [f"### {title}", "", *markdown_table(header, cells), ""]
    return lines


def _names(rows: Rows, kind: str) -> list[str]:
    return list(dict.fromkeys(r["case"] for r in rows if r["metric"] == "latency" and r["config"]["kind"] == kind))


def _case_cells(rows: Rows, case: str) -> list[str]:
    """The first backend of this library that was measured, and how everything else compares with it."""
    here = [row for row in rows if row["case"] == case]
    own = next(row for row in here if row["metric"] == "latency" and row["rival"] is None)
    config = own["config"]
    mine = {row["metric"]: row["value"] for row in here if row["rival"] is None and row["backend"] == own["backend"]}
    share, peak = mine.get("share_of_limit"), mine.get("peak_memory")
    binds = next((r["config"]["binds"] for r in here if r["metric"] == "floor"), "")
    ratios = [row for row in here if row["metric"] == "ratio" and row["backend"] == own["backend"]]
    return [
        case.partition(":")[2],
        own["backend"],
        f"{own['value']:.3g} ({config['p20_ms']:.3g} to {config['p80_ms']:.3g})",
        f"{mine['tokens_per_second']:,.0f}",
        "" if share is None else f"{share:.0%} ({binds})",
        "" if peak is None else f"{peak / 2**20:.0f}",
        "; ".join(f"{row['rival']} {row['value']:.2f}" for row in ratios),
    ]


def _slopes_table(rows: Rows) -> list[str]:
    slopes = [row for row in rows if row["metric"] == "slope"]
    positions = [row for row in rows if row["metric"] == "position_ratio"]
    lines = []
    if slopes:
        header = ["series", "who", "lengths", "slope of log time over log length", f"{BAR[0]} to {BAR[1]}"]
        cells = []
        for row in slopes:
            inside = BAR[0] <= row["value"] <= BAR[1]
            verdict = ("yes" if inside else "no") if row["rival"] is None else ""
            cells.append([row["case"], _who(row), _lengths(row), f"{row['value']:.2f}", verdict])
        lines += ["### Cost over length", "", *markdown_table(header, cells), ""]
    if positions:
        header = ["series", "who", "positions", "slowest over fastest step"]
        cells = [[row["case"], _who(row), _lengths(row), f"{row['value']:.2f}"] for row in positions]
        lines += ["### Decode over position", "", *markdown_table(header, cells), ""]
    return lines


def _who(row: dict[str, Any]) -> str:
    return row["rival"] or row["backend"]


def _lengths(row: dict[str, Any]) -> str:
    return ", ".join(str(length) for length in row["config"]["lengths"])


def _left_out(rows: Rows) -> list[str]:
    """What was not measured and why, one line a reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["metric"] in ("failed", "skipped"):
            key = (row["rival"] or row["backend"] or "the case", row["config"].get("reason", ""))
            reasons.setdefault(key, []).append(row["case"])
    if not reasons:
        return []
    cells = [[who, reason.splitlines()[0] if reason else "", _some(cases)] for (who, reason), cases in reasons.items()]
    return ["### Not measured", "", *markdown_table(["what", "why", "cases"], cells), ""]


def _some(cases: Iterable[str]) -> str:
    cases = list(dict.fromkeys(cases))
    return ", ".join(cases[:2]) + (f" and {len(cases) - 2} more" if len(cases) > 2 else "")
