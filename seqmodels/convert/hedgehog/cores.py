"""The attention core of each layer of a converted model, and how it is called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from seqmodels.convert.files import ConversionError
from seqmodels.convert.hedgehog.runtime import AttentionCall, Runtime
from seqmodels.convert.hedgehog.settings import AttentionSettings
from seqmodels.mixers.hedgehog import HedgehogCore
from seqmodels.mixers.hedgehog_window import HedgehogWindowCore
from seqmodels.state import State

Branch = Literal["window", "linear"]


class Place(NamedTuple):
    """Where a core sits: its layer, whether later tokens are hidden, and the model's switches."""

    layer: int
    causal: bool
    runtime: Runtime


def make_core(
    heads: int, key_heads: int, width: int, settings: AttentionSettings, *, causal: bool
) -> HedgehogCore | HedgehogWindowCore:
    """The core that ``settings.kind`` names, its maps at their start value (the identity for learned ones).

    Raises:
        ConversionError: a feature map that the kind cannot use.
    """
    if settings.feature_dim is not None and settings.feature_dim > width:
        raise ConversionError(
            f"attention.feature_dim={settings.feature_dim} is more than the head's width {width}; maps start from the "
            f"identity, so give {width} or less"
        )
    options: dict[str, Any] = {
        "num_kv_heads": key_heads, "feature_map": settings.map_name, "feature_dim": settings.feature_dim
    }  # fmt: skip
    try:
        if settings.kind == "hedgehog_window":
            return HedgehogWindowCore(
                heads, width, window=settings.window, linear_factor=settings.linear_factor, **options
            )
        return HedgehogCore(heads, width, bidirectional=not causal, **options)
    except ValueError as error:
        raise ConversionError(f"attention settings: {error}") from error


def make_call(
    core: nn.Module, q: Tensor, k: Tensor, v: Tensor, scaling: float, key_mask: Tensor | None, causal: bool
) -> AttentionCall:
    """The call of one layer, from transformers' (batch, heads, length, width) tensors."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    usual = q.shape[-1] ** -0.5
    if isinstance(core, HedgehogWindowCore) and scaling != usual:
        # The window's softmax has the usual scale; what a model has beyond that goes into the queries.
        q, scaling = q * (scaling / usual), usual
    return AttentionCall(q, k, v, scaling, key_mask, causal)


def attend(core: Any, call: AttentionCall, state: State | None, *, return_state: bool) -> tuple[Tensor, State | None]:
    """y (batch, length, heads, width) and the state after the call's last token.

    One token without gradient updates ``state`` in place.
    """
    if state is not None and call.q.shape[1] == 1 and call.key_mask is None and not torch.is_grad_enabled():
        return core.step(call.q[:, 0], call.k[:, 0], call.v[:, 0], state)[:, None], state
    return core(call.q, call.k, call.v, state, layout=call.layout(), return_state=return_state)


@contextmanager
def ablated(model: nn.Module, branch: Branch) -> Iterator[None]:
    """Every hybrid layer of ``model`` with one of its two parts left out."""
    cores = [module for module in model.modules() if isinstance(module, HedgehogWindowCore)]
    name = f"{branch}_weight"
    for core in cores:
        setattr(core, name, 0.0)
    try:
        yield
    finally:
        for core in cores:
            setattr(core, name, 1.0)
