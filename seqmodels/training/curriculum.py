"""A curriculum at work: what runs at a step, what moves, and how fast.

Everything but two things is a function of the step, so that a run that goes on in the middle of a
stage does what it would have done: copying experts happens before the first step of its stage, with noise
drawn from the run's seed, and a gate keeps in the weights what its ramp gave it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from seqmodels.channel import ChunkMoE
from seqmodels.configuration import ConfigError
from seqmodels.models import LanguageModel
from seqmodels.models.block import Parallel
from seqmodels.models.running_parts import RunningParts, part_sites, set_running_parts
from seqmodels.training.curriculum_config import GATE, CurriculumConfig, RampConfig
from seqmodels.training.reading import Span

JUMPS = 8  # of a whole number's ramp


class Curriculum:
    """The stages of a run over ``model``.

    Args:
        config: checked (:func:`~seqmodels.training.curriculum_config.check_curriculum`).
        model: its blocks and layers are switched and changed in place.
        steps: of the run.
        seed: of the noise on copied experts.
    """

    def __init__(self, config: CurriculumConfig, model: LanguageModel, steps: int, seed: int) -> None:
        self.stages, self.seed = config.stages, seed
        self.first = config.first_steps(steps)
        self.model = model
        self.sites = part_sites(model)
        self._parts: dict[str, tuple[str, bool]] = {}  # parameter to its part, and whether it is a gate
        self._find_parts(model)
        self.staged = {word for stage in self.stages for word in stage.activates}

    def stage(self, step: int) -> int:
        """The number of the stage that ``step`` belongs to."""
        return sum(first <= step for first in self.first[1:-1])

    def begin(self, step: int) -> None:
        """Makes the model what it is in ``step``; to be called before each."""
        now = self.stage(step)
        if step == self.first[now]:
            for word, noise in self.stages[now].copy_expert.items():
                for layer in {id(layer): layer for site in self.sites[word] for layer in site.experts()}.values():
                    self._copy_expert(layer, noise, now)
        for number, stage in enumerate(self.stages[: now + 1]):
            for ramp in stage.ramps:
                self._move(ramp, step - self.first[number])
        set_running_parts(self.model, self._running(step))

    def part(self, name: str) -> tuple[str, bool]:
        """The part that a parameter belongs to ("" for what always runs), and whether it is a gate."""
        return self._parts.get(name, ("", False))

    def factor(self, part: tuple[str, bool], step: int) -> float:
        """Of the learning rate of a part's weights, or of its gates, in ``step``."""
        word, is_gate = part
        now = self.stage(step)
        local = step - self.first[now]
        stage = self.stages[now]
        if is_gate:
            for ramp in stage.ramps:
                if (ramp.part, ramp.quantity) == (word, GATE) and local < ramp.after + ramp.steps:
                    return 0.0
        return stage.older_factor if local < stage.older_steps and word not in self._new(now) else 1.0

    def untrained(self, step: int) -> set[str]:
        """Parameters that may have met no gradient in the steps before ``step``: those of parts that have not run,
        and of experts that have only run as one."""
        if step == 0:
            return set(self._parts)
        stages = self.stages[: self.stage(step - 1) + 1]
        trained = set()
        for word in self.sites:
            since = next((i for i, stage in enumerate(stages) if word in stage.activates), None)
            if since is None and word in self.staged:
                continue
            if not all(word in stage.dense for stage in stages[since or 0 :]):  # else its router has met none
                trained.add(word)
        return {name for name, (word, _) in self._parts.items() if word not in trained}

    def gates(self) -> dict[str, list[float]]:
        """The gates of each part that has them, by site."""
        values = {}
        for word, sites in self.sites.items():
            gates = [_whole(site.gate).item() for site in sites if site.gate is not None]
            if gates:
                values[word] = gates
        return values

    def _running(self, step: int) -> RunningParts:
        """What runs in ``step``, with the numbers that are still on their way to the configured ones."""
        now = self.stage(step)
        numbers: dict[str, dict[str, int | float]] = {}
        for ramp in (ramp for stage in self.stages[: now + 1] for ramp in stage.ramps if ramp.quantity != GATE):
            members = [layer for site in self.sites[ramp.part] for layer in site.members()]
            value = next(getattr(layer, ramp.quantity) for layer in members if hasattr(layer, ramp.quantity))
            if value != ramp.end:
                numbers.setdefault(ramp.part, {})[ramp.quantity] = value
        return RunningParts(
            waiting=tuple(word for stage in self.stages[now + 1 :] for word in stage.activates),
            dense=self.stages[now].dense,
            arguments=numbers,
            source=f"stage {self.stages[now].name!r}, step {step + 1}",
        )

    def _new(self, now: int) -> set[str]:
        new = set(self.stages[now].activates)
        if now:
            new |= set(self.stages[now - 1].dense) - set(self.stages[now].dense)
        return new

    @torch.no_grad()
    def _move(self, ramp: RampConfig, local: int) -> None:
        progress = min(1.0, max(0.0, (local - ramp.after) / ramp.steps))
        # Not start + (end - start) * progress, whose end is not the configured number to the last bit.
        value = ramp.start * (1 - progress) + ramp.end * progress
        for site in self.sites[ramp.part]:
            if ramp.quantity == GATE:
                if local <= ramp.after + ramp.steps:  # the end itself once; from there on it is learned
                    assert site.gate is not None
                    site.gate.fill_(value)
                continue
            for layer in site.members():
                before = getattr(layer, ramp.quantity, None)
                if isinstance(before, int):
                    jumps = int(progress * JUMPS) / JUMPS
                    setattr(layer, ramp.quantity, round(ramp.start + (ramp.end - ramp.start) * jumps))
                elif before is not None:
                    setattr(layer, ramp.quantity, value)

    @torch.no_grad()
    def _copy_expert(self, layer: ChunkMoE, noise: float, stage: int) -> None:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + stage)
        for weight in (layer.in_weight, layer.out_weight):
            whole = _whole(weight)
            first = whole[:1]
            drawn = torch.randn(whole.shape, generator=generator, dtype=torch.float32).to(whole)
            copies = first + noise * first.std() * drawn
            copies[0] = first[0]
            if isinstance(weight, DTensor):
                copies = distribute_tensor(copies, weight.device_mesh, weight.placements, src_data_rank=None)
            weight.copy_(copies)

    def _find_parts(self, model: LanguageModel) -> None:
        for word, sites in self.sites.items():
            for site in sites:
                place = f"backbone.blocks.{site.index}."
                if isinstance(site.block.layer, Parallel):
                    place += f"layer.paths.{site.block.layer.words.index(word)}."
                for name, parameter in model.named_parameters():
                    if name.startswith(place):
                        self._parts[name] = (word, False)
                    elif parameter is site.gate:
                        self._parts[name] = (word, True)


def check_carried_ramps(config: CurriculumConfig, model: LanguageModel, spans: Sequence[Span]) -> None:
    """Refuses a ramp that changes the size of a state which is carried from step to step meanwhile.

    Raises:
        ConfigError: names the stage and the ramp.
    """
    sites = part_sites(model)
    for index, span in enumerate(spans):
        ramps = config.stages[index].ramps if span.carry else ()  # where any span carries, each is that of its stage
        for ramp in (ramp for ramp in ramps if ramp.quantity != GATE):
            for layer in (layer for site in sites[ramp.part] for layer in site.members()):
                configured = getattr(layer, ramp.quantity, None)
                if configured is None:
                    continue
                sizes = []
                for value in (ramp.start, ramp.end):
                    setattr(layer, ramp.quantity, type(configured)(value))
                    sizes.append(layer.state_bytes(1))
                setattr(layer, ramp.quantity, configured)
                if sizes[0] != sizes[1]:
                    raise ConfigError(
                        f"{span.where}: the ramp of {ramp.part}.{ramp.quantity} changes the size of the state that "
                        "carry_state hands on; move the ramp to a stage that carries nothing, or set carry_state: "
                        "false in this one"
                    )


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
