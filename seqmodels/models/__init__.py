"""Models built from layers by configuration."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seqmodels.models.accounting import Account, account
    from seqmodels.models.classifier import SequenceClassifier
    from seqmodels.models.config import ClassifierConfig, Initialization, ModelConfig, load_config
    from seqmodels.models.generation import Decoder, generate
    from seqmodels.models.hints import parameter_hints
    from seqmodels.models.hydra import HydraConfig
    from seqmodels.models.language_model import LanguageModel, LossOutput, ModelOutput
    from seqmodels.models.loading import load_model, save_model
    from seqmodels.models.loss import next_token_targets
    from seqmodels.models.sampling import Sampling
    from seqmodels.models.stack import ModelState, Stack
    from seqmodels.models.text_generation import TextGenerator

_EXPORTS = {
    "Account": "accounting",
    "ClassifierConfig": "config",
    "Decoder": "generation",
    "HydraConfig": "hydra",
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
__all__ = [
    "Account",
    "ClassifierConfig",
    "Decoder",
    "HydraConfig",
    "Initialization",
    "LanguageModel",
    "LossOutput",
    "ModelConfig",
    "ModelOutput",
    "ModelState",
    "Sampling",
    "SequenceClassifier",
    "Stack",
    "TextGenerator",
    "account",
    "generate",
    "load_config",
    "load_model",
    "next_token_targets",
    "parameter_hints",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(importlib.import_module(f"seqmodels.models.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'seqmodels.models' has no attribute {name!r}")
