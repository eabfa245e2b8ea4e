"""What a training run is: one strict YAML file, with the model inside it or beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from seqmodels.configuration import ConfigError, apply_overrides, convert, load_yaml
from seqmodels.models.config import ModelConfig, write_out
from seqmodels.training.curriculum_config import CurriculumConfig, check_curriculum
from seqmodels.training.prefix import PrefixConfig, check_prefix
from seqmodels.training.reading import reading_plan

Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
NonNegative = Annotated[float, Meta(ge=0)]


class DataConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Text and how it is cut.

    Attributes:
        source: ``stdlib``, a file, a folder, or ``hf:NAME[:CONFIG]``.
        validation: another source to validate on; when absent, files are held out of ``source``.
        validation_fraction: part of the documents held out (0: none).
        suffixes: file name endings taken from a folder; all when empty.
        tokenizer: ``bytes``, or the path or hub name of a Hugging Face tokenizer.
        sequence_length: tokens in a row.
        text_column, split: of a Hugging Face data set.
        cache: folder of the token cache; ``~/.cache/seqmodels/tokens`` (XDG) when absent.
    """

    source: str = "stdlib"
    validation: str | None = None
    validation_fraction: Fraction = 0.05
    suffixes: tuple[str, ...] = ()
    tokenizer: str = "bytes"
    sequence_length: Positive = 512
    text_column: str = "text"
    split: str = "train"
    cache: str | None = None


class OptimizerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """AdamW. Layers' own hints cap the learning rate and replace the weight decay, by parameter name."""

    learning_rate: Annotated[float, Meta(gt=0)] = 1e-3
    weight_decay: NonNegative = 0.1
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    epsilon: Annotated[float, Meta(gt=0)] = 1e-8
    gradient_clip: Annotated[float, Meta(gt=0)] | None = 1.0


class ScheduleConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Learning rate over steps: linear warm-up, then ``cosine`` or ``wsd`` (stay, then decay).

    Attributes:
        warmup_steps: steps of linear rise.
        decay_steps: ``wsd`` only: length of the final decay, a fifth of the run when absent.
        final_fraction: learning rate at the end, as a part of the peak.
    """

    name: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: Count = 0
    decay_steps: Positive | None = None
    final_fraction: Annotated[float, Meta(ge=0, le=1)] = 0.1


class CheckpointConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``every`` steps (and at the end); the newest ``keep`` stay."""

    every: Positive = 500
    keep: Positive = 2


class TrainConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A run.

    Attributes:
        model: the language model's configuration: a mapping, or the path of a YAML file relative
            to this one (it is read in, so that the run's own copy is complete).
        prefix: weights and masks of the prefix objective; a model of that objective only.
        curriculum: stages in which parts of the model are switched on (:mod:`seqmodels.training.curriculum_config`).
        steps: optimiser steps.
        batch_size: rows of ``data.sequence_length`` tokens a step, over all processes and micro-batches.
        accumulation: micro-batches a step on each process; they are averaged.
        carry_state: each row goes on where the same row of the step before ended: documents that cross the edge take
            their state along, without its gradient. Rows are then contiguous stretches of the text
            (:mod:`seqmodels.training.reading`).
        backpropagation_windows: a row is so many windows of ``sequence_length`` tokens, and gradients flow through all
            of them; activations of one window at a time are kept, for one more forward of the others. A step
            still reads ``batch_size`` x ``data.sequence_length`` tokens, in fewer rows.
        precision: ``bfloat16`` runs the forward under autocast; parameters stay float32.
        parallel: what torchrun's processes do: ``ddp`` copies the model, ``fsdp`` shards it.
        compile: run the objective through torch.compile.
        device: ``auto`` takes CUDA when there.
        log_every, validate_every: steps between metric rows and between validations.
        validation_rows: held-out rows in each validation.
    """

    model: ModelConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    prefix: PrefixConfig | None = None
    curriculum: CurriculumConfig | None = None
    steps: Positive = 1000
    batch_size: Positive = 16
    accumulation: Positive = 1
    carry_state: bool = False
    backpropagation_windows: Positive = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    compile: bool = False
    device: str = "auto"
    seed: Count = 0
    log_every: Positive = 10
    validate_every: Positive = 250
    validation_rows: Positive = 64


# What may differ between a run and its continuation: nothing that changes a weight.
FREE_ON_RESUME = ("device", "log_every", "validate_every", "validation_rows", "checkpoint", "data.cache")


def load_train_config(path: str | Path, overrides: list[str] | None = None) -> TrainConfig:
    """Reads ``path``, reads in the model it names, and applies ``dotted.key=value`` overrides.

    Raises:
        ConfigError: unknown keys (with the nearest known ones), wrong types, missing files.
    """
    data = load_yaml(path)
    if isinstance(data.get("model"), str):
        data["model"] = load_yaml(Path(path).parent / data["model"])
    return convert_train_config(apply_overrides(data, overrides or []))


def convert_train_config(data: dict[str, Any]) -> TrainConfig:
    """Plain values to a checked :class:`TrainConfig`."""
    if "model" not in data:
        raise ConfigError("the configuration has no key 'model'; give a mapping or the path of a model's YAML file")
    config = convert({**data, "model": write_out(data["model"], "model")}, TrainConfig)
    config.model.check_layers()
    check_prefix(config.prefix, config.model, config.data.sequence_length)
    check_curriculum(config.curriculum, config.model, config.steps)
    if config.batch_size % config.accumulation:
        raise ConfigError(
            f"batch_size={config.batch_size} is not divisible by accumulation={config.accumulation}; "
            "every micro-batch must have the same number of rows"
        )
    for span in reading_plan(config):
        if span.rows % config.accumulation:
            raise ConfigError(
                f"{span.where}: a step has {span.rows} rows of {span.row_length} tokens, which accumulation="
                f"{config.accumulation} does not divide; raise batch_size, or lower accumulation"
            )
    if config.schedule.warmup_steps > config.steps:
        raise ConfigError(
            f"schedule.warmup_steps={config.schedule.warmup_steps} is more than steps={config.steps}; lower it"
        )
    decay_steps = config.schedule.decay_steps
    if decay_steps is not None and config.schedule.name != "wsd":
        raise ConfigError(
            f"schedule.decay_steps={decay_steps} belongs to schedule.name=wsd; {config.schedule.name!r} falls over the "
            "whole run. Leave it out, or set schedule.name=wsd"
        )
    if decay_steps is not None and config.schedule.warmup_steps + decay_steps > config.steps:
        raise ConfigError(
            f"schedule.warmup_steps={config.schedule.warmup_steps} and schedule.decay_steps={decay_steps} are together "
            f"more than steps={config.steps}; lower one of them"
        )
    return config
