"""Arguments and stored learning rates of layers in the recall suites (``configs/recall/layers.yaml``)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from seqmodels.configuration import ConfigError, load
from seqmodels.models.arguments import default_arguments, layer_class

Rate = Annotated[float, Meta(gt=0)]


class Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer.

    Attributes:
        arguments: of its constructor.
        learning_rate: by task name, ``default`` for the others.
        learned_positions: the model adds learned positions to the embedding (layers that see no order).
    """

    arguments: dict[str, Any] = {}
    learning_rate: dict[str, Rate] = {}
    learned_positions: bool = False


class LayerDefaults(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All layers.

    Attributes:
        layers: by registry name.
        unknown: for a layer that is not in ``layers``: its stored rate, and values for those arguments that
            its constructor demands.
    """

    layers: dict[str, Layer]
    unknown: Layer

    def arguments(self, name: str) -> dict[str, Any]:
        """Arguments of layer ``name``.

        Raises:
            ConfigError: it is not listed and demands an argument that ``unknown`` has no value for.
        """
        if name in self.layers:
            return self.layers[name].arguments
        needed = [key for key, default in default_arguments(layer_class(name)).items() if default is ...]
        missing = [key for key in needed if key not in self.unknown.arguments]
        if missing:
            raise ConfigError(
                f"layer {name!r} demands {', '.join(missing)}; give its arguments under layers.{name} "
                "of configs/recall/layers.yaml"
            )
        return {key: self.unknown.arguments[key] for key in needed}

    def rate(self, name: str, task: str) -> float:
        """The stored learning rate of layer ``name`` on ``task``."""
        for layer in (self.layers.get(name), self.unknown):
            if layer is not None:
                for key in (task, "default"):
                    if key in layer.learning_rate:
                        return layer.learning_rate[key]
        raise ConfigError(f"no learning rate is stored for {name!r}; give unknown.learning_rate.default")

    def learned_positions(self, name: str) -> bool:
        return self.layers.get(name, self.unknown).learned_positions


def load_layers(path: Path) -> LayerDefaults:
    """Reads and checks the file."""
    return load(path, LayerDefaults)
