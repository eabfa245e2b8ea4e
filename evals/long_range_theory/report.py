"""The page of a results folder: tables beside the known values, and figures, made from the rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals.long_range_theory import figures
from evals.results import latest, markdown_table, read

SUITE = "long_range_theory"
Rows = list[dict[str, Any]]

TITLES = {
    "transfer": "Transfer functions",
    "convergence": "Weak and strong convergence",
    "conditioning": "Condition number against size of the perturbation",
    "noise": "Sensitivity to one Fourier mode",
    "frequencies": "Frequencies",
    "kernels": "Kernels of the library's own ops",
}
WORDS = {
    "transfer": "From the input to the first LegS coefficient. Exact LegS is 1 / (s + 1). S4D-LegS follows it at low "
    "frequencies and rises to 2 / pi at the resonances of its modes, at every size. PTD is off by its perturbation.",
    "convergence": "S4D-LegS converges to LegS for one smooth input, here a step, and for every bounded band of "
    "frequencies. It does not converge over all frequencies, nor do its impulse responses.",
    "conditioning": "N = 32. Each point is a perturbation E of LegS: optimised at three weights, or random (means over "
    "10 seeds). PTD buys a condition number of tens with an E for which random ones are unstable.",
    "noise": "N = 32. RMS over random real C of the gain at one frequency: what a cosine in the input adds to the "
    "output. The last resonance of S4D is at 325.4.",
    "frequencies": "Imaginary parts of the initial eigenvalues.",
    "kernels": "N = 64, steps of 0.01, 1024 of them, B = C = 1 (legs: C_n B_n = V[0, n] B_n / 2).",
}


def write_report(target: Path, folders: Sequence[Path]) -> Path:
    """Writes ``target/README.md`` and its figures from this suite's rows in all ``folders``.

    Raises:
        FileNotFoundError: no row of this suite in them.
    """
    rows = latest(row for row in read(*folders) if row["suite"] == SUITE)
    if not rows:
        where = ", ".join(map(str, folders))
        raise FileNotFoundError(f"no {SUITE} rows in {where}; run python -m evals.{SUITE} --out DIR first")
    target.mkdir(parents=True, exist_ok=True)
    known = [row for row in rows if "known" in row["config"]]
    wrong = [row for row in known if not row["config"]["holds"]]
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    lines = [
        "# Theory of long-range layers", "",
        f"Made by `python -m evals.{SUITE} --out DIR` on {', '.join(sorted({row['machine'] for row in rows}))}, "
        f"commit {commits}; page by `--report DIR`. Float64. {len(known)} values have a known counterpart; "
        f"{len(known) - len(wrong)} agree with it" + (f", {len(wrong)} do not." if wrong else "."), "",
    ]  # fmt: skip
    pictures = figures.draw(rows, target)
    for topic, title in TITLES.items():
        here = [row for row in rows if row["config"]["topic"] == topic]
        if not here:
            continue
        lines += [f"## {title}", "", WORDS[topic], ""]
        if topic in pictures:
            lines += [f"![{title}]({pictures[topic]})", ""]
        lines += [*markdown_table(["case", "number", "computed", "known", "agrees"], map(_cells, here)), ""]
    path = target / "README.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _cells(row: dict[str, Any]) -> list[str]:
    config = row["config"]
    known = ("below " if config.get("below") else "") + config.get("known", "")
    return [
        row["case"].partition("/")[2],
        row["metric"],
        f"{row['value']:.10g}",
        known,
        "" if "known" not in config else "yes" if config["holds"] else "NO",
    ]
