"""The page of a results folder: tables and figures made from its rows alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from evals.hydra import figures, speed
from evals.hydra.summary import SUITE, Run, arms, collect, judge
from evals.results import markdown_table, read


def write_report(target: Path, folders: Sequence[Path]) -> Path:
    """Writes ``target/README.md`` and its figures from the rows of all ``folders``.

    Raises:
        FileNotFoundError: no finished run in them.
    """
    runs = list(collect(read(*folders)).values())
    if not runs:
        where = ", ".join(map(str, folders))
        raise FileNotFoundError(f"no finished {SUITE} runs in {where}; run --suite cpu --out DIR first")
    target.mkdir(parents=True, exist_ok=True)
    machines, commits = ({run.last[name] for run in runs} for name in ("machine", "commit"))
    suites = sorted({run.last["config"]["suite"] for run in runs})
    minutes = sum(run.last["value"] for run in runs) / 60
    versions = ", ".join(f"{name} {version}" for name, version in runs[0].last["versions"].items())
    lines = [
        "# Hydra's parts", "",
        f"Measured by `python -m evals.hydra --suite {suites[0]} --out DIR`, page by `--report DIR`: {len(runs)} runs, "
        f"{minutes:.1f} minutes of single processes of one thread. {'; '.join(sorted(machines))}. Commit "
        f"{', '.join(sorted(commits))}. {versions}.", "",
        "Toy models: what a part does, not what a large one would do. How each is measured stands at the head of its "
        "file in `evals/hydra/`.", "",
    ]  # fmt: skip
    for study, section in (("throughput", _throughput), ("routing", _routing), ("memory", _memory), ("facts", _facts)):
        found = arms(runs, study)
        if found:
            lines += section(found, target)
    lines += [f"* Control {'holds' if holds else 'FAILS'}: {text}." for text, holds in judge(runs)] + [""]
    path = target / "README.md"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _throughput(found: dict[str, list[Run]], target: Path) -> Iterator[str]:
    table = figures.throughput_table(found)
    figures.draw_throughput(table, target / "throughput.png")
    parameters = {
        model: row["config"]["parameters"]
        for runs in found.values()
        for model, row in runs[-1].named("state_bytes").items()
    }
    loads = [row["config"]["load"] for runs in found.values() for row in runs[-1].named("state_bytes").values()]
    longest = max(length for values in table["state_bytes"].values() for length in values)
    yield from ("## Throughput", "", "![tokens a second over length](throughput.png)", "")
    yield (
        "One row, float32, one thread, the processor seconds of the best round. The machine's load average was "
        f"{min(loads):.1f} to {max(loads):.1f} while it ran; beside other work caches are shared, and differences of a "
        "tenth mean nothing. Eager attention also pays for its memory: one matrix of scores takes "
        f"{speed.HEADS * longest**2 * 4 / 2**30:.2g} GiB at {longest}."
    )
    yield ""
    for metric, title in (
        ("forward_tokens_per_second", "Tokens a processor second, forward over a whole sequence"),
        ("decode_tokens_per_second", "Tokens a processor second, decoding after a context of the length"),
        ("state_bytes", "Decode state in MiB"),
    ):
        by_model = table[metric]
        lengths = sorted({length for values in by_model.values() for length in values})
        scale = 2**20 if metric == "state_bytes" else 1
        digits = 2 if metric == "state_bytes" else 0
        rows = [
            [
                model,
                f"{parameters[model]:,}",
                *(f"{values[n] / scale:,.{digits}f}" if n in values else "" for n in lengths),
            ]
            for model, values in by_model.items()
        ]
        yield from (f"{title}:", "", *markdown_table(["model", "parameters", *map(str, lengths)], rows), "")
        for rival in ("transformer, eager", "transformer, fused"):
            if metric == "state_bytes" or "hydra (mamba3)" not in by_model:
                continue
            ratios = {n: by_model["hydra (mamba3)"][n] / by_model[rival][n] for n in lengths if n in by_model[rival]}
            ahead = [n for n in ratios if all(ratios[m] > 1 for m in ratios if m >= n)]
            text = (
                f"ahead from length {min(ahead)} on" if ahead else f"not ahead at {max(ratios)}, the longest measured"
            )
            numbers = ", ".join(f"{ratio:.2f} at {n}" for n, ratio in ratios.items())
            yield f"* Hydra (Mamba-3) over {rival}: {numbers}; {text}."
        yield ""


def _routing(found: dict[str, list[Run]], target: Path) -> Iterator[str]:
    figures.draw_routing(found, target / "routing.png")
    rows = []
    for arm, runs in found.items():
        numbers = (
            [figures.over_layers(run, name) for run in runs] for name in ("assignment_entropy", "usage_std")
        )  # fmt: skip
        losses = [run.value("loss") for run in runs]
        rows.append([arm, *(_spread(values) for values in (*numbers, losses))])
    yield from ("## Routing", "", "![entropy and spread of the experts' use](routing.png)", "")
    yield (
        f"Means over the layers with experts, then over seeds, with the least and the greatest seed. The entropy of an "
        f"even use of 4 experts is {math.log(4):.3f} nats."
    )
    yield from ("", *markdown_table(["arm", "assignment entropy, nats", "std of usage", "held-out loss"], rows), "")


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def _memory(found: dict[str, list[Run]], target: Path) -> Iterator[str]:
    figures.draw_memory(found, target / "memory.png")
    rows = []
    for arm, runs in found.items():
        about = runs[0].rows["accuracy", None]["config"]
        seeds = ", ".join(f"{run.value('accuracy'):.3f}" for run in runs)
        others = [
            ", ".join(f"{run.value(name):.3f}" for run in runs if (name, None) in run.rows)
            for name in ("signal", "read_gate")
        ]
        rows.append([arm, f"{about['parameters']:,}", f"{_mean(runs, 'accuracy'):.3f}", seeds, *others])
    options = next(iter(found.values()))[0].last["config"]["cell"]["options"]
    chance = next(iter(found.values()))[0].rows["accuracy", None]["config"]["chance"]
    yield from ("## Memory beyond the window", "", "![accuracy with and without a workspace](memory.png)", "")
    yield (
        f"A value named once at the beginning, asked for where no window reaches; chance is {chance:.4f}, "
        f"{options['rows']} rows a seed that no step has seen, {options['steps']} steps of {options['batch_size']} "
        "rows. Signal: how much the workspace's output at the question changes with the value before training, "
        "relative to its norm. Gates after training. One number a seed."
    )
    header = ["arm", "parameters", "accuracy", "seeds", "signal", "read gate"]
    yield from ("", *markdown_table(header, rows), "")


def _mean(runs: list[Run], metric: str) -> float:
    return statistics.mean(run.value(metric) for run in runs)


def _facts(found: dict[str, list[Run]], target: Path) -> Iterator[str]:
    figures.draw_facts(found, target / "facts.png")
    rows = []
    for arm, runs in found.items():
        ablated = [run.value("accuracy_ablated") for run in runs if ("accuracy_ablated", None) in run.rows]
        rows.append(
            [
                arm,
                f"{runs[0].rows['accuracy', None]['config']['parameters']:,}",
                ", ".join(f"{run.value('accuracy'):.3f}" for run in runs),
                ", ".join(f"{value:.3f}" for value in ablated),
            ]
        )
    config = next(iter(found.values()))[0].rows["accuracy", None]["config"]
    yield from ("## Closed-book facts", "", "![accuracy, and the gate over training](facts.png)", "")
    yield (
        f"{config['facts']} random facts, all trained on; chance is {config['chance']:.4f}. One number a seed. A model "
        "without the memory can store facts in its other weights: switching it off shows where the model that had it "
        "keeps them."
    )
    yield from (
        "",
        *markdown_table(["trained with", "parameters", "accuracy", "memory switched off after training"], rows),
        "",
    )
