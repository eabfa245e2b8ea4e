"""``python -m evals.results_page``: the page over all committed results, made from their rows alone.

It reads ``evals/results/*/results.jsonl`` and writes ``evals/results/README.md``; ``--check`` writes nothing and exits
1 when the page is not what the rows say. A new suite's folder is listed by itself; what its numbers say is added to
``HEADLINES``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from evals.conversion import summary as conversion
from evals.feature_maps import controls as feature_maps
from evals.hydra import summary as hydra
from evals.lra import rows as lra
from evals.recall import summary as recall
from evals.results import FILE, latest, markdown_table, read
from evals.set_disjointness import summary as set_disjointness
from evals.state_tracking import summary as state_tracking

FOLDER = Path(__file__).resolve().parent / "results"
PAGE = "README.md"
Rows = Sequence[Mapping[str, Any]]
Verdicts = Iterable[tuple[str, bool]]

ABOUT = {
    "recall": "which layer recalls what it read, against state bytes and tokens per second",
    "throughput": "time, memory and state bytes of ops, layers and models, beside other libraries",
    "state_tracking": "parity and modular arithmetic beyond the trained length",
    "set_disjointness": "the order that facts and questions come in, causal against read twice",
    "hydra": "what Hydra's parts do: throughput, routing, memory beyond the window, facts by heart",
    "lra": "classification of long sequences (Long Range Arena)",
    "conversion": "softmax attention of a trained model turned into linear attention",
    "feature_maps": "how spiky and how monotone the weights of feature maps are",
    "sparse_table": "training steps of a product-key memory with sparse gradients against dense ones",
    "long_range_theory": "frequencies, conditioning and transfer functions of S4D and S4-PTD against known values",
}
NEAR = 0.02  # accuracies closer than this count as equal where the faster layer is chosen


def page(folder: Path = FOLDER) -> str:
    """The page's text.

    Raises:
        FileNotFoundError: no suite has rows in ``folder``.
        ValueError: a line that is no row.
    """
    found = {path.parent.name: rows for path in sorted(folder.glob(f"*/{FILE}")) if (rows := read(path))}
    if not found:
        raise FileNotFoundError(f"no {FILE} with rows below {folder}; run a suite with --out {folder}/NAME first")
    suites = sorted(found, key=lambda name: (list(ABOUT).index(name) if name in ABOUT else len(ABOUT), name))
    lines = ["# Results", "", "Made by `python -m evals.results_page` from the rows in the folders beside it.", ""]
    if "recall" in found:
        lines += _budgets(found["recall"])
    if "throughput" in found:
        lines += _costs(found["throughput"])
    lines += ["## What was run", "", *_overview(suites, found, folder), ""]
    for name in suites:
        headline = list(HEADLINES[name](found[name])) if name in HEADLINES else []
        figures = _figures(folder, name)
        if headline or figures:
            lines += [f"## {_title(name)}", "", f"{_sentence(ABOUT.get(name, name))} [Everything]({name}/).", ""]
            lines += [*headline, *figures]
    return "\n".join(lines).rstrip() + "\n"


def _title(name: str) -> str:
    return "Long Range Arena" if name == "lra" else name.replace("_", " ").capitalize()


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _overview(suites: Sequence[str], found: Mapping[str, Rows], folder: Path) -> Iterator[str]:
    def cells(name: str) -> list[str]:
        rows = found[name]
        dates = sorted({row["time"][:10] for row in rows})
        verdicts = list(CONTROLS[name](rows)) if name in CONTROLS else []
        held = sum(holds for _, holds in verdicts)
        link = f"[{name}]({name}/{PAGE})" if (folder / name / PAGE).exists() else f"[{name}]({name}/)"
        return [
            link, ABOUT.get(name, ""), str(len({row["layer"] for row in rows if row["layer"]}) or ""), str(len(rows)),
            dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}",
            "; ".join(sorted({row["machine"] for row in rows})),
            ", ".join(sorted({row["commit"] for row in rows})),
            f"{held} of {len(verdicts)} hold" if verdicts else "",
        ]  # fmt: skip

    header = ["suite", "measures", "layers", "rows", "when", "machine", "commit", "controls"]
    yield from markdown_table(header, map(cells, suites))


def _figures(folder: Path, name: str) -> list[str]:
    drawn = sorted((folder / name).glob("*.png"))
    lines = []
    for path in drawn:
        lines += [f"![{_title(name)}: {path.stem.replace('-', ' ').replace('_', ' ')}]({name}/{path.name})", ""]
    return lines


# Which layer to pick


def _budgets(rows: Rows) -> Iterator[str]:
    points = [point for point in recall.summarise(recall.collect(rows).values()) if "[" not in point.plan]
    plans: dict[tuple[str, str], list[recall.Point]] = defaultdict(list)
    for point in points:
        plans[point.suite, point.plan].append(point)
    if not plans:
        return
    yield from ("## Which layer for which budget", "")
    yield (
        "Accuracy is the mean over seeds on the suite's tests, after training from nothing; state is what all layers "
        "of the model keep for one sequence at the length of the test; tokens per second are of training, on the "
        f"machine that the suite's page names. Within {NEAR} of the best accuracy the fastest layer is named. A run "
        "that the suite's time cap ended may not have learned all it can."
    )
    yield ""
    for (suite, plan), some in sorted(plans.items()):
        yield from (f"### {plan.replace('_', ' ')}, suite {suite}, {len(some)} layers", "")
        yield from markdown_table(["state of at most", "most accurate", "fastest of those near it"], _ladder(some))
        yield ""
        header = [
            "layer",
            "accuracy",
            "seeds",
            "state bytes",
            "tokens/s",
            "ended by time",
            "no smaller state is as accurate",
        ]
        yield from markdown_table(header, map(lambda point, some=some: _layer_cells(point, some), some))
        yield ""


def _layer_cells(point: recall.Point, points: Sequence[recall.Point]) -> list[str]:
    smaller = [other for other in points if other.state_bytes < point.state_bytes]
    capped = sum(run.about["ended"] == "seconds" for run in point.chosen)
    return [
        _who(point), f"{point.score:.3f}", str(len(point.chosen)), f"{point.state_bytes:,}",
        f"{point.tokens_per_second:,.0f}", f"{capped} of {len(point.chosen)}" if capped else "",
        "" if any(other.score >= point.score for other in smaller) else "yes",
    ]  # fmt: skip


def _ladder(points: Sequence[recall.Point]) -> Iterator[list[str]]:
    """For each power of two that lets one more point in: the best below it."""
    named = None
    for exponent in range(8, 40):
        inside = [point for point in points if point.state_bytes <= 2**exponent]
        if not inside:
            continue
        best = max(inside, key=lambda point: (point.score, point.tokens_per_second))
        near = [point for point in inside if point.score >= best.score - NEAR]
        fast = max(near, key=lambda point: point.tokens_per_second)
        if (best, fast) != named:
            yield [_bytes(2**exponent), _with_score(best), "the same" if fast is best else _with_score(fast)]
        named = (best, fast)
        if len(inside) == len(points):
            return


def _with_score(point: recall.Point) -> str:
    return f"{_who(point)}: {point.score:.3f}, {point.state_bytes:,} bytes, {point.tokens_per_second:,.0f} tokens/s"


def _who(point: recall.Point) -> str:
    return f"{point.arm} (d={point.d_model})"


def _bytes(number: int) -> str:
    return f"{number} bytes" if number < 1024 else f"{number >> 10} KiB" if number < 1 << 20 else f"{number >> 20} MiB"


def _costs(rows: Rows) -> Iterator[str]:
    """Layers of one width side by side: the setting in which most layers were timed."""
    timed = [
        row for row in latest(rows)
        if row["config"].get("kind") == "layer" and row["rival"] is None and row["value"] is not None
        and row["metric"] in ("tokens_per_second", "state_bytes")
    ]  # fmt: skip
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in timed:
        config = row["config"]
        groups[row["machine"], config["d_model"], config["dtype"], config["batch"]].append(row)
    if not groups:
        return
    setting = max(groups, key=lambda key: (len({row["layer"] for row in groups[key]}), str(key)))
    machine, d_model, dtype, batch = setting
    speed: dict[str, dict[tuple[str, int], float]] = defaultdict(dict)
    state: dict[str, dict[int, float]] = defaultdict(dict)
    for row in groups[setting]:
        where = row["config"]["mode"], row["config"]["length"]
        if row["metric"] == "tokens_per_second":
            speed[row["layer"]][where] = max(row["value"], speed[row["layer"]].get(where, 0.0))
        else:
            state[row["layer"]][row["config"]["length"]] = row["value"]
    columns = sorted({where for found in speed.values() for where in found})
    context = max((length for found in state.values() for length in found), default=0)
    yield from ("## What a layer costs", "")
    yield (
        f"Tokens per second of one layer, width {d_model}, batch {batch}, {dtype}, on {machine}, by mode and length, "
        f"and state bytes at {context:,} tokens. Other widths and machines, models and other libraries: "
        "[throughput](throughput/)."
    )
    yield ""
    header = ["layer", *(f"{mode} {length:,}" for mode, length in columns), "state bytes"]

    def cells(layer: str) -> list[str]:
        values = [speed[layer].get(where) for where in columns] + [state[layer].get(context)]
        return [layer, *("" if value is None else f"{value:,.0f}" for value in values)]

    yield from markdown_table(header, map(cells, sorted(speed)))
    yield ""


# What each suite says in a few lines


def _state_tracking(rows: Rows) -> Iterator[str]:
    found = state_tracking.summarise(state_tracking.collect(rows).values())
    header = ["task", "arm", "parameters", "tested at", "scaled accuracy, median of seeds", "best run"]

    def cells(arm: state_tracking.ArmSummary) -> list[str]:
        return [
            f"{arm.task} ({arm.suite})", arm.arm, f"{arm.about['parameters']:,}", str(max(arm.chosen[0].curve)),
            f"{arm.median:.3f}", f"{arm.best:.3f}",
        ]  # fmt: skip

    yield from markdown_table(header, map(cells, found))
    yield ""


def _set_disjointness(rows: Rows) -> Iterator[str]:
    found = set_disjointness.points(set_disjointness.collect(rows).values())
    header = ["mixer", "d", "f", "state elements", *(order.replace("|", "\\|") for order in set_disjointness.ORDERS)]

    def cells(point: set_disjointness.Point) -> list[str]:
        orders = [f"{point.mean(order):.3f}" for order in set_disjointness.ORDERS]
        return [point.arm, str(point.d_model), str(point.feature_dim or ""), f"{point.state_elements:,}", *orders]

    yield from markdown_table(header, map(cells, found))
    yield ""


def _lra(rows: Rows) -> Iterator[str]:
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for run in lra.collect(rows):
        found[run.task, run.arm].append(run.test)

    def cells(item: tuple[tuple[str, str], list[float]]) -> list[str]:
        (task, arm), tests = item
        return [task, arm, f"{statistics.fmean(tests):.2f}", f"{min(tests):.2f} to {max(tests):.2f}", str(len(tests))]

    ordered = sorted(found.items(), key=lambda item: (item[0][0], -statistics.fmean(item[1])))
    yield from markdown_table(["task", "arm", "test accuracy, %", "lowest to highest", "runs"], map(cells, ordered))
    yield ""


def _conversion(rows: Rows) -> Iterator[str]:
    runs = list(conversion.collect(rows).values())
    cells = []
    for arm in conversion.ARMS:
        shares = conversion.shares(runs, arm)
        if shares:
            recovered = [100 * share.of_teacher for share in shares]
            cells.append([arm, f"{statistics.fmean(recovered):.1f}", f"{min(recovered):.1f}", str(len(recovered))])
    if cells:
        yield from markdown_table(["student", "loss recovered, % (mean)", "worst seed", "seeds"], cells)
        yield ""


def _theory(rows: Rows) -> Iterator[str]:
    known = [row for row in latest(rows) if row["config"].get("known")]
    agreeing = sum(bool(row["config"]["holds"]) for row in known)
    yield from (f"{agreeing} of {len(known)} values with a known counterpart agree with it.", "")


HEADLINES: dict[str, Callable[[Rows], Iterator[str]]] = {
    "state_tracking": _state_tracking, "set_disjointness": _set_disjointness, "lra": _lra, "conversion": _conversion,
    "long_range_theory": _theory,
}  # fmt: skip
CONTROLS: dict[str, Callable[[Rows], Verdicts]] = {
    "recall": lambda rows: recall.judge(recall.summarise(recall.collect(rows).values())),
    "state_tracking": lambda rows: state_tracking.judge(
        state_tracking.summarise(state_tracking.collect(rows).values())
    ),
    "set_disjointness": lambda rows: set_disjointness.judge(
        set_disjointness.points(set_disjointness.collect(rows).values())
    ),
    "feature_maps": feature_maps.judge,
    "hydra": lambda rows: hydra.judge(hydra.collect(rows).values()),
    "conversion": lambda rows: conversion.judge(conversion.collect(rows).values()),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m evals.results_page", description="Write the page over all results from their rows."
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the suites' folders (evals/results)")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is out of date")
    options = parser.parse_args(arguments)
    try:
        text = page(options.folder)
    except (ValueError, FileNotFoundError) as error:
        print(f"evals.results_page: {error}", file=sys.stderr)
        return 2
    path = options.folder / PAGE
    if options.check:
        current = path.exists() and path.read_text(encoding="utf-8") == text
        print(f"{path} is {'up to date' if current else 'out of date; run python -m evals.results_page'}")
        return 0 if current else 1
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
