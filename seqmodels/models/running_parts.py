"""Which parts of a model run, and with which numbers, where that is not what its configuration says.

A training curriculum switches parts on one after another. Weights of a model whose last parts are still off mean
nothing with those parts on, so what runs is kept beside the weights and comes back with them.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec
from torch import nn

from seqmodels.channel import ChunkMoE
from seqmodels.configuration import ConfigError, nearest
from seqmodels.mixers.base import Mixer
from seqmodels.models.block import Block, Branch, Parallel
from seqmodels.models.language_model import LanguageModel


class RunningParts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The state of a curriculum. Parts are words of the model's pattern.

    Attributes:
        waiting: parts that do not run: they add exactly 0 and leave their state as it is.
        dense: parts of experts of which number 0 alone runs, on every token.
        arguments: part to the numbers that its layers have now, such as ``temperature``.
        source: where in training this was, for people.
    """

    waiting: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    arguments: dict[str, dict[str, int | float]] = {}
    source: str = ""

    @property
    def as_configured(self) -> bool:
        """Whether everything runs, with the numbers of the configuration."""
        return not (self.waiting or self.dense or self.arguments)

    def __str__(self) -> str:
        numbers = [f"{part}.{name}={value:g}" for part, own in self.arguments.items() for name, value in own.items()]
        told = [
            *([f"without {', '.join(self.waiting)}"] if self.waiting else []),
            *([f"expert 0 alone in {', '.join(self.dense)}"] if self.dense else []),
            *([f"with {', '.join(numbers)}"] if numbers else []),
        ]
        return "; ".join(told) or "as configured"


class Site(NamedTuple):
    """One place of a part in the model: its block and the block's number, its path there, and the path's gate."""

    block: Block
    index: int
    layer: nn.Module
    gate: nn.Parameter | None

    def members(self) -> list[Mixer]:
        """The layers of the part here."""
        if isinstance(self.layer, Branch):
            return self.layer.members()
        return [self.layer] if isinstance(self.layer, Mixer) else []

    def experts(self) -> list[ChunkMoE]:
        """Those of the layers that have experts."""
        return [member for member in self.members() if isinstance(member, ChunkMoE)]


def part_sites(model: LanguageModel) -> dict[str, list[Site]]:
    """The places of every part, by the word that the pattern has for it.

    Raises:
        ConfigError: two words share their weights.
    """
    sites: dict[str, list[Site]] = {}
    owner: dict[int, str] = {}
    for index, spec in zip(model.backbone.order, model.backbone.specs, strict=True):
        block = model.backbone.blocks[index]
        assert isinstance(block, Block)
        for path in spec.paths:
            word = path.word
            if isinstance(block.layer, Parallel):
                layer = block.layer.paths[block.layer.words.index(word)]
                site = Site(block, index, layer, block.layer.gate(word))
            else:
                if owner.setdefault(index, word) != word:
                    raise ConfigError(
                        f"{spec.where}: {word!r} and {owner[index]!r} share their weights, so they cannot be told "
                        "apart as parts; give them one word"
                    )
                site = Site(block, index, block.layer, None)
            sites.setdefault(word, []).append(site)
    return sites


def set_running_parts(model: LanguageModel, running: RunningParts) -> None:
    """Switches parts off and on, and sets the layers' numbers. ``RunningParts()`` runs everything.

    Numbers that ``running`` does not name stay as they are.

    Raises:
        ConfigError: a part or number that the model does not have.
    """
    sites = part_sites(model)
    for word in (*running.waiting, *running.dense, *running.arguments):
        if word not in sites:
            raise ConfigError(f"the model has no part {word!r}.{nearest(word, sites)} Its parts: {', '.join(sites)}")
    for word, places in sites.items():
        for site in places:
            if isinstance(site.block.layer, Parallel):
                inactive = site.block.layer.inactive
                (inactive.add if word in running.waiting else inactive.discard)(word)
            else:
                site.block.inactive = word in running.waiting
            for layer in site.experts():
                layer.dense = word in running.dense
    for word, numbers in running.arguments.items():
        for name, value in numbers.items():
            layers = [layer for site in sites[word] for layer in site.members() if hasattr(layer, name)]
            if not layers:
                raise ConfigError(f"no layer of {word!r} has a number {name!r}")
            for layer in layers:
                setattr(layer, name, value)
    model._running_parts = running  # type: ignore[assignment]


def running_parts(model: LanguageModel) -> RunningParts:
    """What :func:`set_running_parts` was last given."""
    found = getattr(model, "_running_parts", None)
    return found if isinstance(found, RunningParts) else RunningParts()
