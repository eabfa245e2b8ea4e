"""Curves of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def plot_losses(
    rows: Sequence[Mapping[str, Any]], path: Path, *, references: Mapping[str, float] | None = None
) -> None:
    """Training and held-out bits per byte over tokens, with the learning rate below.

    Args:
        rows: metric rows of a run.
        path: PNG to write.
        references: other coders' bits per byte on the held-out text, drawn as level lines.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the loss plot needs matplotlib: pip install 'matplotlib>=3.7'") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    training = [row for row in rows if "bits_per_byte" in row]
    if not training:
        return
    tokens = [row["tokens"] for row in training]
    per_step = tokens[-1] / training[-1]["step"]
    measure = "validation_bits_per_byte"
    held_out = [(row["step"] * per_step, row[measure]) for row in rows if measure in row]

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 5.6), sharex=True, height_ratios=(4, 1), layout="constrained"
    )
    losses = [row["bits_per_byte"] for row in training]
    top.plot(tokens, losses, color="#9db8d2", linewidth=1, label="training")
    if held_out:
        top.plot(
            [x for x, _ in held_out],
            [y for _, y in held_out],
            color="#1f4e79",
            marker="o",
            markersize=4,
            linewidth=1.6,
            label="held out",
        )
        last_tokens, last_value = held_out[-1]
        top.annotate(f"{last_value:.3f}", (last_tokens, last_value), xytext=(-4, 8), textcoords="offset points",
                     ha="right", color="#1f4e79", fontweight="bold")  # fmt: skip
    lowest = min([*losses, *(value for _, value in held_out), *(references or {}).values()])
    for (name, value), colour in zip(
        (references or {}).items(), ("#b5651d", "#7a7a2c", "#8e3b46", "#4c7a5a"), strict=False
    ):
        top.axhline(value, color=colour, linewidth=1, linestyle="--", label=f"{name} {value:.3f}")
    # The first steps fall from 8 bits a byte; the part worth reading is the last one.
    top.set_ylim(0.95 * lowest, min(max(losses), 2.6 * lowest) * 1.02)
    top.set_ylabel("bits per byte")
    top.legend(frameon=False, loc="upper right")
    top.grid(axis="y", color="#e6e6e6")
    bottom.plot(tokens, [row["learning_rate"] for row in training], color="#555555", linewidth=1)
    bottom.set_ylabel("learning rate")
    bottom.set_xlabel("tokens")
    bottom.set_ylim(bottom=0)
    bottom.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M" if value else "0")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=144)
    plt.close(figure)
