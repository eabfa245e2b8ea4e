"""State-space and efficient sequence layers for PyTorch.

Names are imported when they are used, so that ``seqmodels --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqmodels.backends import BackendUnavailable, backend
    from seqmodels.layout import Layout
    from seqmodels.mixers import MIXERS, Mixer, MixerOutput, register_mixer
    from seqmodels.models import LanguageModel, ModelConfig, SequenceClassifier
    from seqmodels.state import State

__version__ = "0.1.0"
_EXPORTS = {
    "BackendUnavailable": "backends",
    "LanguageModel": "models",
    "Layout": "layout",
    "MIXERS": "mixers",
    "Mixer": "mixers",
    "MixerOutput": "mixers",
    "ModelConfig": "models",
    "SequenceClassifier": "models",
    "State": "state",
    "backend": "backends",
    "register_mixer": "mixers",
}
__all__ = [  # noqa: RUF022 - the version last
    "BackendUnavailable",
    "LanguageModel",
    "Layout",
    "MIXERS",
    "Mixer",
    "MixerOutput",
    "ModelConfig",
    "SequenceClassifier",
    "State",
    "backend",
    "register_mixer",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'seqmodels' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"seqmodels.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value
