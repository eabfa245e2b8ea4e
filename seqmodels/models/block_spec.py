"""What one residual block is made of, as a configuration says it."""

from __future__ import annotations

from typing import Any, NamedTuple


class LayerSpec(NamedTuple):
    """One layer: its registry name and its arguments as configured."""

    name: str
    arguments: dict[str, Any]


class PathSpec(NamedTuple):
    """One path of a block: its layers, applied in turn, and the first value of its learned gate."""

    word: str  # as written in the pattern
    layers: tuple[LayerSpec, ...]
    gate: float | None  # None: no gate


class BlockSpec(NamedTuple):
    """One residual block: its parallel paths, and the id its weights are shared by."""

    paths: tuple[PathSpec, ...]
    share: str | None
    where: str  # its place in the configuration, for errors

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """The layers of all paths in order."""
        return tuple(layer for path in self.paths for layer in path.layers)

    @property
    def is_plain(self) -> bool:
        """One layer without a gate: h + layer(norm(h))."""
        return len(self.layers) == 1 and self.paths[0].gate is None
