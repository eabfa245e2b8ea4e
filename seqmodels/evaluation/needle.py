"""A needle's depth against the text's length: which part of its past a model can still read back."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from seqmodels.evaluation.records import Records
from seqmodels.evaluation.text_model import TextModel
from seqmodels.tasks.recall.needle import GENERATED, VARIANTS, is_right, needle

RECORDS, SUMMARY, FIGURE = "needle.jsonl", "needle.json", "needle.png"


class NeedlePlan(NamedTuple):
    """What is asked: ``count`` prompts at each length (tokens, the answer's included) and depth."""

    variant: str = "niah_single_1"
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    depths: tuple[float, ...] = tuple(index / 10 for index in range(11))
    count: int = 10
    generated: int = GENERATED
    seed: int = 42


class NeedleMap(NamedTuple):
    """``accuracy[i][j]``: share of values found at ``depths[i]`` and ``lengths[j]``."""

    plan: NeedlePlan
    name: str
    accuracy: list[list[float]]
    folder: Path


def evaluate_needle(
    model: TextModel,
    folder: str | Path,
    plan: NeedlePlan,
    *,
    text: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NeedleMap:
    """accuracy(depth, length) = mean over prompts of [the value is in the generated text].

    Generation is greedy, of at most ``plan.generated`` tokens. Answers go to ``folder/needle.jsonl`` as cells finish,
    and the same call goes on from there; then ``needle.json`` and ``needle.png`` are drawn.

    Args:
        text: the haystack of ``niah_single_2`` and 3; prose of Python's library when absent.

    Raises:
        ValueError: an empty or unordered plan, a length too short for the prompt, or a folder with results of
            another model or plan.
    """
    _check(plan, model)
    header = {
        **plan._asdict(), "model": model.identity,
        "text": None if text is None else hashlib.sha256(text.encode()).hexdigest()[:16],
    }  # fmt: skip
    records = Records(Path(folder) / RECORDS, header)
    total = len(plan.lengths) * len(plan.depths) * plan.count
    for length in plan.lengths:
        keys = {(depth, index): _key(length, depth, index) for depth in plan.depths for index in range(plan.count)}
        if progress is not None:
            progress(len(records.items), total)
        if all(key in records.items for key in keys.values()):
            continue
        # Prompt number i has depths[i % len(depths)]: every depth gets `count` prompts of this length.
        prompts = needle(
            plan.variant,
            plan.count * len(plan.depths),
            length,
            lambda text: len(model.front) + len(model.encode(text)),
            text=text,
            depths=plan.depths,
            generated=plan.generated,
            seed=plan.seed,
        )
        for place, depth in enumerate(plan.depths):
            mine = prompts[place :: len(plan.depths)]
            waiting = [index for index in range(plan.count) if keys[depth, index] not in records.items]
            if not waiting:
                continue
            texts = model.generate(
                [mine[index].prompt for index in waiting], max_new_tokens=plan.generated, window=length
            )
            for index, said in zip(waiting, texts, strict=True):
                hay = mine[index]
                records.add(
                    keys[depth, index], length=length, depth=depth, tokens=hay.tokens, answer=hay.answer, text=said,
                    correct=is_right(said, hay.answer),
                )  # fmt: skip
            if progress is not None:
                progress(len(records.items), total)
    found = NeedleMap(plan, model.name, _accuracy(plan, records), Path(folder))
    _write(found)
    return found


def _check(plan: NeedlePlan, model: TextModel) -> None:
    if plan.variant not in VARIANTS:
        raise ValueError(f"unknown variant {plan.variant!r}; known: {', '.join(VARIANTS)}")
    for name in ("lengths", "depths"):
        values = getattr(plan, name)
        if not values or list(values) != sorted(set(values)):
            raise ValueError(f"{name} are {list(values)}; expected at least one, ascending, none twice")
    for name in ("count", "generated"):
        if getattr(plan, name) < 1:
            raise ValueError(f"{name} is {getattr(plan, name)}; expected at least 1")
    if model.max_length is not None and plan.lengths[-1] > model.max_length:
        raise ValueError(f"length {plan.lengths[-1]} is beyond the {model.max_length} tokens that {model.name} reads")


def _key(length: int, depth: float, index: int) -> str:
    return f"{length}/{depth}/{index}"


def _accuracy(plan: NeedlePlan, records: Records) -> list[list[float]]:
    def cell(length: int, depth: float) -> float:
        right = [records.items[_key(length, depth, index)]["correct"] for index in range(plan.count)]
        return sum(right) / len(right)

    return [[cell(length, depth) for length in plan.lengths] for depth in plan.depths]


def _write(found: NeedleMap) -> None:
    summary = {"model": found.name, **found.plan._asdict(), "accuracy": found.accuracy}
    (found.folder / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    draw(found, found.folder / FIGURE)


def draw(found: NeedleMap, path: Path) -> Path:
    """The heat map: depth downwards as one reads, length to the right."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the heat map needs matplotlib: pip install 'seqmodels[train]'") from error
    plan = found.plan
    size = (2.4 + 0.75 * len(plan.lengths), 1.7 + 0.36 * len(plan.depths))
    figure = Figure(figsize=(max(4.6, size[0]), max(3.0, size[1])), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(found.accuracy, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for row, line in enumerate(found.accuracy):
        for column, value in enumerate(line):
            axes.text(
                column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=8,
                color="black" if value > 0.6 else "white",
            )  # fmt: skip
    axes.set_xticks(range(len(plan.lengths)), _ticks(plan.lengths))
    axes.set_yticks(range(len(plan.depths)), [f"{100 * depth:g}" for depth in plan.depths])
    axes.set_xlabel("length (tokens)")
    axes.set_ylabel("depth of the needle (%)")
    name = found.name if len(found.name) <= 44 else "..." + found.name[-41:]
    axes.set_title(f"{plan.variant}, {plan.count} prompts a cell\n{name}", fontsize=9)
    figure.colorbar(image, ax=axes, label="values found (%)", format=lambda value, _: f"{100 * value:.0f}")
    figure.savefig(path, dpi=150)
    return path


def _ticks(lengths: Sequence[int]) -> list[str]:
    return [f"{length // 1024}k" if length % 1024 == 0 else str(length) for length in lengths]
