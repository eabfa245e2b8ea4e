"""Pictures of a conversion: attention of teacher and student side by side, and the losses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqmodels.convert.hedgehog.data import Batch
from seqmodels.convert.hedgehog.models import HedgehogModel
from seqmodels.convert.hedgehog.runtime import AttentionCall
from seqmodels.convert.hedgehog.softmax import softmax_weights

_LAYERS, _HEADS, _TOKENS = 4, 2, 96


def check_matplotlib() -> None:
    """Asked for before the work begins."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("the report's pictures need matplotlib: pip install matplotlib") from error


@torch.no_grad()
def draw_attention(model: HedgehogModel, batch: Batch, path: Path) -> None:
    """Weights of the batch's first row, up to 4 layers x 2 heads, each as teacher and student."""
    from matplotlib.figure import Figure

    count = model.config.num_hidden_layers
    layers = sorted({round(index * (count - 1) / max(1, _LAYERS - 1)) for index in range(_LAYERS)})
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def observe(layer: int, core: Any, call: AttentionCall, teacher: Tensor) -> None:
        if layer in layers:
            student = core.attention_weights(call.q, call.k)
            found[layer] = (softmax_weights(call)[0].float().cpu(), student[0].float().cpu())

    model.eval()
    with model.runtime.observed(observe):
        model(input_ids=batch.tokens[:1, :_TOKENS], use_cache=False)
    heads = min(_HEADS, model.config.num_attention_heads)
    figure = Figure(figsize=(2.4 * 2 * heads, 2.5 * len(layers)), layout="constrained")
    axes = figure.subplots(len(layers), 2 * heads, squeeze=False)
    for row, layer in enumerate(layers):
        for head in range(heads):
            for column, (name, weights) in enumerate(zip(("softmax", "student"), found[layer], strict=True)):
                axis = axes[row, 2 * head + column]
                # The square root shows small weights; one scale for both makes them comparable.
                image = axis.imshow(weights[head].sqrt().numpy(), vmin=0, vmax=1, cmap="magma", interpolation="nearest")
                axis.set_title(f"layer {layer}, head {head}: {name}", fontsize=8)
                axis.set_xticks([])
                axis.set_yticks([])
    figure.colorbar(image, ax=axes, shrink=0.6, label="square root of the weight")
    figure.supxlabel("key", fontsize=9)
    figure.supylabel("query", fontsize=9)
    figure.savefig(path, dpi=110)


def draw_losses(history: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Stage 1: every layer's loss; stage 2: the task's."""
    from matplotlib.figure import Figure

    stages = [stage for stage in ("1", "2") if history[stage]]
    if not stages:
        return
    figure = Figure(figsize=(5.5 * len(stages), 3.6), layout="constrained")
    for axis, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        steps = [row["step"] for row in history[stage]]
        if stage == "1":
            for layer in range(len(history[stage][0]["layers"])):
                axis.plot(steps, [row["layers"][layer] for row in history[stage]], label=f"layer {layer}")
            axis.legend(fontsize=7, ncols=2)
            axis.set_title("stage 1: loss of each layer's attention")
        else:
            axis.plot(steps, [row["loss"] for row in history[stage]])
            axis.set_title("stage 2: training loss (nats)")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
