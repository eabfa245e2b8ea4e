"""A needle's depth against the text's length: which part of its past a model can still read back."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seqmodels.configuration import nearest
from seqmodels.evaluation.records import Records
from seqmodels.evaluation.text_model import TextModel, groups
from seqmodels.tasks.recall.needle import GENERATED, VARIANTS, is_right, local_text, needle, prompt_tokens

RECORDS, SUMMARY, FIGURE = "needle.jsonl", "needle.json", "needle.png"


class NeedlePlan(NamedTuple):
    """What is asked: ``count`` prompts at each length (tokens, the answer's included) and depth."""

    variant: str = "niah_single_1"
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
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

    Generation is greedy, of at most ``plan.generated`` tokens. Answers go to ``folder/needle.jsonl`` as they come,
    and the same call goes on from there, as does one with more lengths or a larger count; then ``needle.json`` and
    ``needle.png`` are drawn.

    Args:
        text: the haystack of ``niah_single_2`` and 3; prose of Python's library when absent.

    Raises:
        ValueError: an empty or unordered plan, a text for noise, a length too short for the prompt, or a folder with
            results of another model, text or plan.
    """
    _check(plan, model, text)
    _figure_class()  # a missing package is found before the hours of answering
    if VARIANTS[plan.variant].essay and text is None:
        text = local_text()  # differs between versions of Python: hence its digest below
    # Prompts do not depend on how many of them there are, nor on the other lengths: both may grow later.
    settings = {name: value for name, value in plan._asdict().items() if name not in ("lengths", "count")}
    header = {
        **settings, "model": model.identity,
        "text": None if text is None else hashlib.sha256(text.encode()).hexdigest()[:16],
    }  # fmt: skip
    records = Records(Path(folder) / RECORDS, header)
    wanted = [
        _key(length, depth, index) for length in plan.lengths for depth in plan.depths for index in range(plan.count)
    ]

    def show() -> None:
        if progress is not None:
            progress(sum(key in records.items for key in wanted), len(wanted))

    for length in plan.lengths:
        keys = {(depth, index): _key(length, depth, index) for depth in plan.depths for index in range(plan.count)}
        show()
        if all(key in records.items for key in keys.values()):
            continue
        # Prompt number i has depths[i % len(depths)]: every depth gets `count` prompts of this length.
        prompts = needle(
            plan.variant,
            plan.count * len(plan.depths),
            length,
            _counted(model),
            text=text,
            depths=plan.depths,
            generated=plan.generated,
            seed=plan.seed,
        )
        asked = [
            (depth, index, prompts[index * len(plan.depths) + place])
            for place, depth in enumerate(plan.depths)
            for index in range(plan.count)
            if keys[depth, index] not in records.items
        ]
        for group in groups(asked, model):
            texts = model.generate([hay.prompt for _, _, hay in group], max_new_tokens=plan.generated, window=length)
            for (depth, index, hay), said in zip(group, texts, strict=True):
                records.add(
                    keys[depth, index], length=length, depth=depth, tokens=hay.tokens, answer=hay.answer, text=said,
                    correct=is_right(said, hay.answer),
                )  # fmt: skip
            show()
    found = NeedleMap(plan, model.name, _accuracy(plan, records), Path(folder))
    _write(found)
    return found


def default_lengths(
    model: TextModel, variant: str = "niah_single_1", *, generated: int = GENERATED, text: str | None = None
) -> tuple[int, ...]:
    """Four powers of two, of which the first leaves at least a quarter to the haystack; those that the model reads.

    A tokenizer decides how long the question is: 512 to 4096 tokens where a token is about a word, 1024 to 8192 bytes.
    """
    check_variant(variant)
    least = 4 / 3 * (prompt_tokens(variant, _counted(model), text=text) + generated)
    first = 1 << math.ceil(math.log2(least))
    found = tuple(first << step for step in range(4))
    if model.max_length is not None:
        found = tuple(length for length in found if length <= model.max_length)
    if not found:
        raise ValueError(
            f"{model.name} reads {model.max_length} tokens; {variant} with an answer of {generated} needs {first} to "
            "leave room for a haystack: give fewer --max-new-tokens, or a --length of your own"
        )
    return found


def _counted(model: TextModel) -> Callable[[str], int]:
    return lambda text: len(model.front) + len(model.encode(text))


def check_variant(variant: str) -> None:
    """ValueError for an unknown one."""
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}.{nearest(variant, VARIANTS)} Known: {', '.join(VARIANTS)}")


def _check(plan: NeedlePlan, model: TextModel, text: str | None) -> None:
    check_variant(plan.variant)
    if text is not None and not VARIANTS[plan.variant].essay:
        raise ValueError(
            f"{plan.variant} hides its needle in noise and reads no text; give none, or niah_single_2 or 3"
        )
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
    plan = found.plan
    size = (2.4 + 0.75 * len(plan.lengths), 1.7 + 0.36 * len(plan.depths))
    figure = _figure_class()(figsize=(max(4.6, size[0]), max(3.0, size[1])), layout="constrained")
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


def _figure_class() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the heat map needs matplotlib: pip install 'seqmodels[train]'") from error
    return Figure


def _ticks(lengths: Sequence[int]) -> list[str]:
    return [f"{length // 1024}k" if length % 1024 == 0 else str(length) for length in lengths]
