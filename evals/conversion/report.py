"""The page of a results folder: tables and a figure made from its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean

from evals.conversion.summary import ARMS, SUITE, Run, collect, judge, shares
from evals.results import markdown_table, read

STAGES = ("teacher", "swapped", "distilled", "finetuned", "without_window", "without_linear")
_ORDER = (*ARMS, "teacher trained on", "softmax kept", "relu, untrained")


def write_report(target: Path, folders: Sequence[Path]) -> Path:
    """Writes ``target/README.md`` and ``target/losses.png`` from the rows of all ``folders``.

    Raises:
        FileNotFoundError: no finished run in them.
    """
    runs = list(collect(read(*folders)).values())
    if not runs:
        where = ", ".join(map(str, folders))
        raise FileNotFoundError(f"no finished {SUITE} runs in {where}; run --suite cpu --out DIR first")
    target.mkdir(parents=True, exist_ok=True)
    _draw(runs, target / "losses.png")
    path = target / "README.md"
    path.write_text("\n".join(_page(runs, target)) + "\n", encoding="utf-8")
    return path


def _page(runs: list[Run], target: Path) -> Iterator[str]:
    teacher = next(run.row["config"]["cell"]["teacher"] for run in runs)
    machines, commits = (sorted({run.row[name] for run in runs}) for name in ("machine", "commit"))
    minutes = sum(run.row["config"]["processor"] for run in runs) / 60
    versions = ", ".join(f"{name} {version}" for name, version in runs[0].row["versions"].items())
    yield from (
        "# Conversion of a softmax transformer",
        "",
        f"Measured by `python -m evals.conversion --suite cpu --out DIR`: {len(runs)} cells, {minutes:.0f} processor "
        f"minutes. {'; '.join(machines)}. Commit {', '.join(commits)}. {versions}.",
        "",
        f"Teachers: Llama of bytes, {teacher['layers']} layers of width {teacher['hidden_size']}, {teacher['heads']} "
        f"query and {teacher['key_heads']} key heads, {teacher['steps']} steps of {teacher['batch_size']} x "
        f"{teacher['data']['sequence_length']} bytes of the Python standard library's source, one a seed. Loss is on "
        "held-out files, nats a byte.",
        "",
        "## Recovered share",
        "",
        "(swapped - student) / (swapped - teacher), where swapped is the student before any training. Fine-tuning also "
        "goes on training a teacher that is not fully trained, so the last column compares with the teacher after the "
        "same fine-tuning on the same rows, its softmax kept.",
        "",
    )
    header = ["student", "seed", "teacher", "swapped", "student", "share", "teacher trained on", "share of that"]
    yield from markdown_table(
        header,
        (
            [
                arm, share.seed, f"{share.teacher:.4f}", f"{share.run.losses['swapped']:.4f}", f"{share.run.final:.4f}",
                f"{share.of_teacher:.1%}", "" if share.longer is None else f"{share.longer:.4f}",
                "" if share.of_longer is None else f"{share.of_longer:.1%}",
            ]
            for arm in ARMS
            for share in shares(runs, arm)
        ),
    )  # fmt: skip
    yield from ("", *(f"* Control {'holds' if holds else 'FAILS'}: {text}." for text, holds in judge(runs)), "")
    yield from ("## Loss after each stage", "", "![losses](losses.png)", "", "Mean over seeds.", "")
    yield from markdown_table(["arm", *STAGES], (_losses(arm, runs) for arm in _ORDER if _of(arm, runs)))
    yield from (
        "",
        "`without_window` and `without_linear` are the finished hybrid with one part set to zero. Where the loss "
        "without the linear part is that of the whole hybrid, the window does the work and the linear part is idle.",
        "",
        "## Attention of the student against softmax of the same queries and keys",
        "",
        "Mean over seeds. KL(softmax || student) and entropies in nats; Spearman's rank correlation of q . k with the "
        "student's weight. After fine-tuning the queries and keys are no longer the teacher's.",
        "",
    )
    header = ["student", "stage", "layer", "KL", "entropy of softmax", "entropy of student", "Spearman"]
    yield from markdown_table(header, (line for arm in ARMS for line in _fidelity(_of(arm, runs), arm)))
    yield from ("", "## Stage 1, each layer's loss", "")
    header = ["student", "layer", "first", "last"]
    yield from markdown_table(header, (line for arm in ARMS for line in _distillation(_of(arm, runs), arm)))
    for arm in ARMS:
        name = f"attention-{arm}.png"
        if (target / name).exists():
            yield from ("", f"## {arm}, seed 0, after stage 1", "", f"![attention of {arm}]({name})")


def _of(arm: str, runs: list[Run]) -> list[Run]:
    return [run for run in runs if run.arm == arm]


def _losses(arm: str, runs: list[Run]) -> list[str]:
    mine = _of(arm, runs)
    values = ([run.losses[stage] for run in mine if stage in run.losses] for stage in STAGES)
    return [arm, *(f"{mean(found):.4f}" if found else "" for found in values)]


def _fidelity(runs: list[Run], arm: str) -> Iterator[list[str]]:
    for stage, layer in dict.fromkeys((stage, layer) for run in runs for stage, layer, _ in run.fidelity):
        values = (
            mean(run.fidelity[stage, layer, metric] for run in runs)
            for metric in ("kl", "teacher_entropy", "student_entropy", "spearman")
        )
        yield [arm, stage, str(layer), *(f"{value:.3f}" for value in values)]


def _distillation(runs: list[Run], arm: str) -> Iterator[list[str]]:
    for layer in sorted({layer for run in runs for _, layer in run.distillation}):
        ends = []
        for name in ("first", "last"):
            step = runs[0].distillation[name, layer][0]
            ends.append(f"{mean(run.distillation[name, layer][1] for run in runs):.4f} (step {step})")
        yield [arm, str(layer), *ends]


def _draw(runs: list[Run], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.6), layout="constrained")
    axis = figure.subplots()
    order = [arm for arm in _ORDER if _of(arm, runs)]
    for index, stage in enumerate(STAGES):
        points = [
            (place + (index - 2.5) * 0.1, run.losses[stage])
            for place, arm in enumerate(order)
            for run in _of(arm, runs)
            if stage in run.losses
        ]
        if points:
            axis.scatter(*zip(*points, strict=True), label=stage.replace("_", " "), s=22)
    axis.set_xticks(range(len(order)), order, fontsize=8)
    axis.set_ylabel("held-out loss (nats a byte)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=110)
