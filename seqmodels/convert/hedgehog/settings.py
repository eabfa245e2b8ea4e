"""What takes the place of softmax attention, and how it is trained: plain, checked values."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from seqmodels.configuration import ConfigError
from seqmodels.training.config import DataConfig, ScheduleConfig

Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Rate = Annotated[float, Meta(gt=0)]
Kind = Literal["softmax", "hedgehog", "hedgehog_window"]


class AttentionSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The attention of a converted model; stored in its configuration under ``hedgehog``.

    Attributes:
        kind: ``hedgehog``: linear attention alone. ``hedgehog_window``: exact softmax over the last
            ``window`` tokens and linear attention before them, under one normaliser (LoLCATs).
            ``softmax``: kept as it is, a control.
        feature_map: a name in ``seqmodels.mixers.feature_maps.FEATURE_MAPS``. When absent: ``hedgehog_exp``,
            and ``hedgehog_split`` beside a window, which needs bounded features.
        feature_dim: width of a learned map before it is doubled by its negation; the head's width when absent.
        window: tokens of exact attention, the current one included.
        linear_factor: weight of the linear part beside the window's gamma: ``one``, or ``complement``, 1 - gamma.
    """

    kind: Kind = "hedgehog"
    feature_map: str | None = None
    feature_dim: Positive | None = None
    window: Positive = 64
    linear_factor: Literal["one", "complement"] = "one"

    @property
    def map_name(self) -> str:
        """The feature map in force."""
        return self.feature_map or ("hedgehog_split" if self.kind == "hedgehog_window" else "hedgehog_exp")


class DistillationSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Stage 1: only the feature maps (and the window's weight) are trained, every layer against its teacher.

    Attributes:
        loss: ``cross_entropy`` of the attention weights, or ``output`` mean squared error before the
            output projection, times 1000.
    """

    steps: Count = 1000
    learning_rate: Rate = 1e-2
    loss: Literal["cross_entropy", "output"] = "cross_entropy"


class FinetuningSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Stage 2: the task's own loss.

    Attributes:
        method: ``lora``: low-rank updates of the q, k, v and o projections, maps frozen. ``full``:
            every weight, the maps included. ``none``: no second stage.
        rank, alpha: of LoRA.
        learning_rate: 1e-4 when absent, the value of LoLCATs for LoRA.
    """

    steps: Count = 1000
    method: Literal["lora", "full", "none"] = "lora"
    learning_rate: Rate = 1e-4
    rank: Positive = 8
    alpha: Rate = 16.0


class ConversionSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A whole conversion.

    Attributes:
        model: a folder or a hub name.
        data: text; ``data.tokenizer`` is the model's own one when it is ``model``.
        schedule: of the learning rate, over each stage by itself.
        batch_size: rows a step.
        evaluation_rows: held-out rows for every perplexity.
        checkpoint_every: steps between checkpoints; a killed run goes on from the newest one.
        mask_token: id that hides a token from an encoder; the tokenizer's own one when absent.
        precision: ``bfloat16`` runs under autocast; weights stay float32.
    """

    model: str
    attention: AttentionSettings = AttentionSettings()
    distillation: DistillationSettings = DistillationSettings()
    finetuning: FinetuningSettings = FinetuningSettings()
    data: DataConfig = DataConfig(tokenizer="model", sequence_length=1024)
    schedule: ScheduleConfig = ScheduleConfig(warmup_steps=0)
    batch_size: Positive = 8
    gradient_clip: Rate = 1.0
    evaluation_rows: Positive = 64
    checkpoint_every: Positive = 100
    mask_token: Count | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    device: str = "auto"
    seed: Count = 0

    @property
    def first_stage(self) -> int:
        """Steps of stage 1: none where softmax is kept."""
        return 0 if self.attention.kind == "softmax" else self.distillation.steps

    @property
    def second_stage(self) -> int:
        return 0 if self.finetuning.method == "none" else self.finetuning.steps

    def check(self) -> None:
        """Raises ConfigError for values that are fine alone and wrong together."""
        for name, steps in (("distillation", self.first_stage), ("finetuning", self.second_stage)):
            if 0 < steps < self.schedule.warmup_steps:
                raise ConfigError(
                    f"schedule.warmup_steps={self.schedule.warmup_steps} is more than {name}.steps={steps}; lower it"
                )
