"""A training curriculum as configuration: which parts of a model run and learn in which stage."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from seqmodels.channel import ChunkMoE
from seqmodels.configuration import ConfigError, nearest
from seqmodels.models.arguments import default_arguments, layer_class
from seqmodels.models.block_spec import PathSpec
from seqmodels.models.config import StackConfig

GATE = "gate"
Positive = Annotated[int, Meta(ge=1)]
Count = Annotated[int, Meta(ge=0)]
Factor = Annotated[float, Meta(ge=0, le=1)]


class RampConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A straight line in a quantity of one part, over steps of the stage it stands in.

    Attributes:
        part: a word of the model's pattern.
        quantity: ``gate`` (held at the line's value while it lasts, learned from then on), or a number among the
            layer's arguments, such as ``temperature`` and ``num_globals``. Whole numbers move in eight jumps, so that
            a compiled model is not compiled at each step. They end where the model is configured.
        start, end: values; ``start`` holds from the stage's beginning.
        after: steps of the stage before the line begins.
        steps: its length.
    """

    part: str
    quantity: str = GATE
    start: float
    end: float
    after: Count = 0
    steps: Positive


class StageConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One stage.

    Attributes:
        name: for the log.
        share: of the run's tokens, and so of its steps: every step reads the same number of tokens. All stages
            together are 1.
        sequence_length: tokens of a row (of a window of it) in this stage; ``data.sequence_length`` when absent. A step
            then has fewer or more rows.
        carry_state, backpropagation_windows: of this stage; the run's when absent.
        activates: parts (words of the model's pattern) that run from here on. A part that some stage activates does
            not run before: it adds exactly 0 and its weights do not move. Other parts always run.
        dense: parts of experts of which, in this stage, expert 0 alone runs, on every token.
        copy_expert: part to noise: as the stage begins, every expert becomes expert 0 plus normal noise of this size,
            relative to the standard deviation of its weights.
        ramps: see :class:`RampConfig`.
        older_factor, older_steps: for so many steps, the learning rate of every weight outside the parts that are new
            in this stage (activated, or no longer dense) has this factor; 0 freezes them.
    """

    name: str
    share: Annotated[float, Meta(gt=0, le=1)]
    sequence_length: Positive | None = None
    carry_state: bool | None = None
    backpropagation_windows: Positive | None = None
    activates: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    copy_expert: dict[str, Annotated[float, Meta(ge=0)]] = {}
    ramps: tuple[RampConfig, ...] = ()
    older_factor: Factor = 1.0
    older_steps: Count = 0


class CurriculumConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Stages in order."""

    stages: tuple[StageConfig, ...]

    def first_steps(self, steps: int) -> list[int]:
        """The step that each stage begins with, in a run of ``steps``; the end of the run last."""
        ends, total = [0], 0.0
        for stage in self.stages:
            total += stage.share
            ends.append(round(total * steps))
        ends[-1] = steps
        return ends


def check_curriculum(config: CurriculumConfig | None, model: StackConfig, steps: int) -> None:
    """Refuses a curriculum that does not fit the model or the number of steps.

    Raises:
        ConfigError: no stages; shares that do not add up to 1; a stage without a step; a part that the model does
            not have, or that does not run in the stage that speaks of it; a ramp that leaves its stage.
    """
    if config is None:
        return
    if not config.stages:
        raise ConfigError("curriculum.stages is empty; give at least one stage, or leave the curriculum out")
    total = sum(stage.share for stage in config.stages)
    if abs(total - 1) > 1e-6:
        raise ConfigError(f"the shares of curriculum.stages add up to {total:.6g}; expected 1")
    paths: dict[str, list[PathSpec]] = {}
    for block in model.block_specs():
        for path in block.paths:
            paths.setdefault(path.word, []).append(path)
    staged = [word for stage in config.stages for word in stage.activates]
    running = set(paths) - set(staged)
    first = config.first_steps(steps)
    for index, stage in enumerate(config.stages):
        where = f"curriculum.stages.{index} ({stage.name})"
        length = first[index + 1] - first[index]
        if length < 1:
            raise ConfigError(f"{where}: a share of {stage.share} of steps={steps} is no step; raise one of them")
        for word in (*stage.activates, *stage.dense, *stage.copy_expert, *(ramp.part for ramp in stage.ramps)):
            if word not in paths:
                raise ConfigError(
                    f"{where}: the model has no part {word!r}.{nearest(word, paths)} Its parts: {', '.join(paths)}"
                )
        for word in stage.activates:
            if staged.count(word) > 1:
                raise ConfigError(f"{where}: {word!r} is activated {staged.count(word)} times; keep one")
        running.update(stage.activates)
        _check_experts(stage, paths, running, where, first_stage=index == 0)
        moved = [(ramp.part, ramp.quantity) for ramp in stage.ramps]
        for ramp in stage.ramps:
            count = moved.count((ramp.part, ramp.quantity))
            if count > 1:
                raise ConfigError(
                    f"{where}: {count} ramps of {ramp.part}.{ramp.quantity}, of which the last alone would count; "
                    "keep one, or make two stages"
                )
            if ramp.part not in running:
                raise ConfigError(f"{where}: a ramp of {ramp.part!r}, which does not run yet; activate it first")
            if ramp.after + ramp.steps > length:
                raise ConfigError(
                    f"{where}: the ramp of {ramp.part}.{ramp.quantity} takes {ramp.after + ramp.steps} steps, the "
                    f"stage {length} of steps={steps}; shorten it"
                )
            _check_quantity(ramp, paths[ramp.part], where)
        if index == 0 and stage.older_steps:
            raise ConfigError(
                f"{where}: older_steps is {stage.older_steps}, but no weight is older than the first stage"
            )
        if stage.older_steps > length:
            raise ConfigError(f"{where}: older_steps is {stage.older_steps}, but the stage has {length} steps")


def _check_experts(
    stage: StageConfig, paths: dict[str, list[PathSpec]], running: set[str], where: str, *, first_stage: bool
) -> None:
    for word in (*stage.dense, *stage.copy_expert):
        names = {layer.name for path in paths[word] for layer in path.layers}
        if not any(issubclass(layer_class(name), ChunkMoE) for name in names):
            raise ConfigError(f"{where}: {word!r} ({', '.join(sorted(names))}) has no experts; expected a chunk_moe")
        if word not in running:
            raise ConfigError(f"{where}: {word!r} does not run in this stage; activate it first")
    if first_stage and stage.copy_expert:
        raise ConfigError(f"{where}: copy_expert in the first stage copies an expert that has learned nothing")


def _check_quantity(ramp: RampConfig, paths: list[PathSpec], where: str) -> None:
    place = f"{where}: the ramp of {ramp.part}.{ramp.quantity}"
    if ramp.quantity == GATE:
        if any(path.gate is None for path in paths):
            raise ConfigError(
                f"{place}: {ramp.part!r} has no gate; give it one under model.layers, such as path_gate: 0.0"
            )
        return
    for path in paths:
        for layer in path.layers:
            arguments: dict[str, Any] = {**default_arguments(layer_class(layer.name)), **layer.arguments}
            value = arguments.get(ramp.quantity)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if value != ramp.end:
                raise ConfigError(
                    f"{place} ends at {ramp.end:g}, but the model is configured with {value:g}; make them equal, so "
                    "that the finished run is the configured model"
                )
            return
        raise ConfigError(f"{place}: no layer of this part has a number {ramp.quantity!r} among its arguments")
