"""The report of a conversion: every number as JSON, and a page to read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import transformers

from seqmodels.convert.hedgehog.families import attention_modules
from seqmodels.convert.hedgehog.models import HedgehogModel
from seqmodels.convert.hedgehog.settings import ConversionSettings

_NAMES = {
    "teacher": "original model",
    "swapped": "attention swapped, nothing trained",
    "distilled": "after stage 1 (feature maps)",
    "finetuned": "after stage 2 (fine-tuning)",
    "without_window": "ablation: window off",
    "without_linear": "ablation: linear part off",
}


def summary(settings: ConversionSettings, measured: dict[str, Any], model: HedgehogModel) -> dict[str, Any]:
    """Everything that was measured, with what it was measured on."""
    scores = measured["scores"]
    last = scores.get("finetuned") or scores.get("distilled") or scores["swapped"]
    return {
        "settings": msgspec.to_builtins(settings),
        "architecture": type(model).__name__,
        "transformers": transformers.__version__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "map_parameters": sum(parameter.numel() for parameter in model.maps().values()),
        "feature_map": settings.attention.map_name,
        "layers": len(list(attention_modules(model))),
        "scores": scores,
        "recovered": recovered(scores["teacher"]["loss"], scores["swapped"]["loss"], last["loss"]),
        "fidelity": measured["fidelity"],
        "history": measured["history"],
        "notes": list(_notes(settings, scores)),
    }


def recovered(teacher: float, swapped: float, student: float) -> float | None:
    """(swapped - student) / (swapped - teacher): 1 when the student is as good; None when swapping cost nothing."""
    return None if swapped <= teacher else (swapped - student) / (swapped - teacher)


def write(data: dict[str, Any], folder: Path) -> None:
    """``report.json`` and ``report.md``."""
    (folder / "report.json").write_text(json.dumps(data, indent=1) + "\n")
    (folder / "report.md").write_text("\n".join(_page(data, folder)) + "\n")


def _notes(settings: ConversionSettings, scores: dict[str, Any]) -> Iterator[str]:
    yield (
        "Dropout on attention weights is gone: linear attention has no weights to drop. Other dropout of the original "
        "is unchanged."
    )
    if "without_linear" in scores:
        cost = scores["without_linear"]["loss"] - scores["finetuned" if "finetuned" in scores else "swapped"]["loss"]
        if "finetuned" not in scores and "distilled" in scores:
            cost = scores["without_linear"]["loss"] - scores["distilled"]["loss"]
        yield (
            f"Without the linear part the held-out loss changes by {cost:+.4f} nats. A change near zero means that the "
            f"window of {settings.attention.window} tokens does the work and the linear part is idle."
        )


def _page(data: dict[str, Any], folder: Path) -> Iterator[str]:
    attention = data["settings"]["attention"]
    yield f"# {data['settings']['model']} with attention {attention['kind']!r}"
    yield ""
    yield (
        f"{data['architecture']}, {data['layers']} layers, {data['parameters']:,} parameters, of them "
        f"{data['map_parameters']:,} in feature maps ({data['feature_map']}). transformers "
        f"{data['transformers']}. Settings: conversion.yaml. Every number: report.json."
    )
    yield ""
    yield from _table(
        ["held-out text", "loss (nats)", "perplexity"],
        ([_NAMES[name], f"{row['loss']:.4f}", f"{row['perplexity']:.3f}"] for name, row in data["scores"].items()),
    )
    yield ""
    if data["recovered"] is not None:
        yield f"Recovered share of the loss that swapping cost: {data['recovered']:.1%}."
        yield ""
    for stage, rows in data["fidelity"].items():
        yield f"## Attention against softmax of the same queries and keys: {stage}"
        yield ""
        yield from _table(
            ["layer", "KL (nats)", "entropy of softmax", "entropy of student", "Spearman"],
            (
                [
                    str(row["layer"]),
                    f"{row['kl']:.4f}",
                    f"{row['teacher_entropy']:.3f}",
                    f"{row['student_entropy']:.3f}",
                    f"{row['spearman']:.3f}" if "spearman" in row else "",
                ]
                for row in rows
            ),
        )
        yield ""
    if data["history"]["1"]:
        first, last = data["history"]["1"][0], data["history"]["1"][-1]
        yield f"## Stage 1, loss ({data['settings']['distillation']['loss']}) of each layer"
        yield ""
        pairs = enumerate(zip(first["layers"], last["layers"], strict=True))
        yield from _table(
            ["layer", f"step {first['step']}", f"step {last['step']}"],
            ([str(layer), f"{begin:.4f}", f"{end:.4f}"] for layer, (begin, end) in pairs),
        )
        yield ""
    for name in ("attention.png", "losses.png"):
        if (folder / name).exists():
            yield f"![{name.removesuffix('.png')}]({name})"
            yield ""
    yield from (f"* {note}" for note in data["notes"])


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    header = list(header)
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
