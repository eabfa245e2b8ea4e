"""Initial weights of a model: what the configuration changes about its layers' own choices."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn

from seqmodels.mixers.base import Mixer
from seqmodels.models.config import Initialization


@contextlib.contextmanager
def construction(device: torch.device | str | None, dtype: torch.dtype | None) -> Iterator[None]:
    """Modules built inside have their tensors on ``device`` in ``dtype``, whatever they take as arguments."""
    previous = torch.get_default_dtype()
    if dtype is not None:
        torch.set_default_dtype(dtype)
    try:
        with torch.device(device) if device is not None else contextlib.nullcontext():
            yield
    finally:
        torch.set_default_dtype(previous)


def dtype_named(name: str) -> torch.dtype:
    """``"bfloat16"`` to ``torch.bfloat16``."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"unknown dtype {name!r}; expected float32, bfloat16, float16 or float64")
    return dtype


@torch.no_grad()
def initialize_layers(layers: list[Mixer], num_blocks: int, config: Initialization) -> None:
    """Applies ``linear_std``, then ``residual_scale``, to each distinct layer once."""
    scale = config.residual_scale
    factor = 1.0 if scale is None else 1 / math.sqrt(num_blocks) if scale == "depth" else float(scale)
    for layer in layers:
        if config.linear_std is not None:
            for name, module in layer.named_modules():
                weight = f"{name}.weight" if name else "weight"
                if isinstance(module, nn.Linear) and weight not in layer.own_initialization:
                    nn.init.normal_(module.weight, std=config.linear_std)
        if factor != 1.0:
            parameters = dict(layer.named_parameters())
            for name in layer.residual_outputs:
                if name in parameters:
                    parameters[name].mul_(factor)


@torch.no_grad()
def initialize_embedding(weight: torch.Tensor, config: Initialization) -> None:
    nn.init.normal_(weight, std=config.embedding_std)
