"""Models built from layers by configuration."""

from __future__ import annotations

import importlib
from typing import Any

_EXPORTS = {
    "Account": "accounting",
    "ClassifierConfig": "config",
    "Decoder": "generation",
    "Initialization": "config",
    "ModelConfig": "config",
    "load_config": "config",
    "LanguageModel": "language_model",
    "LossOutput": "language_model",
    "ModelOutput": "language_model",
    "ModelState": "stack",
    "Stack": "stack",
    "Sampling": "sampling",
    "SequenceClassifier": "classifier",
    "TextGenerator": "text_generation",
    "account": "accounting",
    "generate": "generation",
    "load_model": "loading",
    "next_token_targets": "loss",
    "parameter_hints": "hints",
    "save_model": "loading",
}
__all__ = sorted(_EXPORTS)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"seqmodels.models.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'seqmodels.models' has no attribute {name!r}")
