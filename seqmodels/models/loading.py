"""Models on disk: ``config.yaml`` beside ``model.safetensors``, and ``parts.yaml`` where not every part runs.

Three folders are understood: one written by :func:`save_model`, a training run (its newest
checkpoint is taken), and a single checkpoint of a run. In each, ``config.yaml`` has the model's
configuration under ``model`` and the tokenizer's name under ``data.tokenizer``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seqmodels.configuration import convert, dump_yaml, load_yaml
from seqmodels.models.config import ModelConfig
from seqmodels.models.language_model import LanguageModel
from seqmodels.models.running_parts import RunningParts, running_parts, set_running_parts

WEIGHTS = "model.safetensors"
PARTS = "parts.yaml"

_logger = logging.getLogger(__name__)


class ModelFolderError(RuntimeError):
    """A folder without a model, with damaged weights, or with weights of another configuration."""


class LoadedModel(NamedTuple):
    """A model with its weights, in evaluation mode, and where they came from."""

    model: LanguageModel
    tokenizer: str  # a name for seqmodels.tasks.tokenizer.load_tokenizer
    weights: Path


def load_model(
    path: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> LoadedModel:
    """The model in a folder. Parts that its training had not switched on yet stay off, with a warning that says which.

    Args:
        path: a folder of :func:`save_model`, a run folder, or a checkpoint folder.
        device: where to put it.
        dtype: of the weights; as stored when omitted.

    Raises:
        ModelFolderError: no model there, a truncated file, or tensors that do not fit the
            configuration, each listed.
    """
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise ModelFolderError(f"{folder} holds no model: there is no config.yaml in it")
    weights = _find_weights(folder)
    data = load_yaml(folder / "config.yaml")
    if "model" not in data:
        raise ModelFolderError(f"{folder / 'config.yaml'} has no key 'model'")
    config = convert(data["model"], ModelConfig, "model")
    model = LanguageModel(config)
    load_weights(model, weights)
    parts = weights.with_name(PARTS)
    if parts.is_file():
        running = convert(load_yaml(parts), RunningParts, PARTS)
        set_running_parts(model, running)
        _logger.warning(
            "%s runs as it was trained until then: %s (%s); set_running_parts(model, RunningParts()) runs all of it",
            weights.parent, running, running.source or PARTS,
        )  # fmt: skip
    return LoadedModel(model.to(device=device, dtype=dtype).eval(), tokenizer_name(folder), weights)


def tokenizer_name(path: str | Path) -> str:
    """The tokenizer that the model in a folder was trained with, for ``load_tokenizer``."""
    return (load_yaml(Path(path) / "config.yaml").get("data") or {}).get("tokenizer", "bytes")


def save_model(model: LanguageModel, path: str | Path, *, tokenizer: str = "bytes") -> Path:
    """Writes ``config.yaml`` and ``model.safetensors`` into ``path``; :func:`load_model` reads them back."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model": msgspec.to_builtins(model.config), "data": {"tokenizer": tokenizer}}
    (folder / "config.yaml").write_text(dump_yaml(config), encoding="utf-8")
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / WEIGHTS)
    running = running_parts(model)
    if running.as_configured:
        (folder / PARTS).unlink(missing_ok=True)
    else:
        (folder / PARTS).write_text(dump_yaml(running), encoding="utf-8")
    return folder


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Copies a safetensors file into ``model``; every tensor must be there, and no other.

    Raises:
        ModelFolderError: the file is truncated, or its tensors differ (each is listed).
    """
    tensors = _read(path)
    wrong = _differences(tensors, model.state_dict())
    if wrong:
        raise ModelFolderError(f"{path} does not fit this model's configuration:\n  " + "\n  ".join(wrong))
    # Every parameter takes the dtype it was stored in: low-precision layers keep some in float32.
    model.load_state_dict(tensors, assign=True)


def _find_weights(folder: Path) -> Path:
    candidates = [folder / WEIGHTS, *sorted((folder / "checkpoints").glob(f"step_*/{WEIGHTS}"), reverse=True)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ModelFolderError(
        f"{folder} has a config.yaml but no weights: neither {WEIGHTS} nor checkpoints/step_*/{WEIGHTS}. "
        "A run writes its first checkpoint after checkpoint.every steps."
    )


def _read(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise ModelFolderError(
            f"cannot read {path} ({size} bytes): {error}. It is truncated or not safetensors; take another checkpoint"
        ) from error


def _differences(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    lines = [f"{name} is missing from the file" for name in wanted if name not in found]
    lines += [f"{name} is in the file but not in the model" for name in found if name not in wanted]
    lines += [
        f"{name} is {tuple(found[name].shape)} in the file, {tuple(wanted[name].shape)} in the model"
        for name in wanted
        if name in found and found[name].shape != wanted[name].shape
    ]
    return lines
