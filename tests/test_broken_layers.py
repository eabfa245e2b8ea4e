"""Each law catches what it is there for: layers that are wrong in one way, and the laws that must notice.

Every layer is held to every law. The set of laws it breaks is stated exactly: a law that misses its
layer fails here, and so does one that cries wolf.
"""

from __future__ import annotations

import sys
import types
from typing import ClassVar

import pytest
import torch
from moving_average import (
    BidirectionalMovingAverage,
    MovingAverage,
    PrefixMovingAverage,
)
from torch import nn

from seqmodels.mixers import ParameterHint
from seqmodels.ops.registration import Operator
from seqmodels.testing import LAWS, LawViolation, check_layer

# ---- split


class StepUsesNewToken(MovingAverage):
    """Off by one: the cache of the previous token is written before it is read."""

    @torch.no_grad()
    def step(self, x_t, state):
        state.last.copy_(x_t)
        return super().step(x_t, state)


class StepReallocates(MovingAverage):
    @torch.no_grad()
    def step(self, x_t, state):
        state.last = state.last.clone()
        return super().step(x_t, state)


class StepHasGradient(MovingAverage):
    def step(self, x_t, state):
        return super().step(x_t, state) + 0 * self.out.weight.sum()


class MutatesState(MovingAverage):
    def forward(self, x, state=None, *, layout=None, return_state=False):
        result = super().forward(x, state, layout=layout, return_state=return_state)
        if state is not None:
            with torch.no_grad():
                state.position.add_(0)
        return result


class ReturnsGivenTensor(MovingAverage):
    """The position returned is the one given, counted up in place."""

    def forward(self, x, state=None, *, layout=None, return_state=False):
        result = super().forward(x, state, layout=layout, return_state=return_state)
        if state is not None and return_state:
            result.state.position = state.position.copy_(result.state.position)
        return result


class ReturnsView(MovingAverage):
    """The last token as a view of the input."""

    def forward(self, x, state=None, *, layout=None, return_state=False):
        result = super().forward(x, state, layout=layout, return_state=return_state)
        if return_state and layout is None and x.dtype == result.state.last.dtype:
            result.state.last = x[:, -1]
        return result


class DetachesState(MovingAverage):
    """Right values, but no gradient through the state."""

    def forward(self, x, state=None, *, layout=None, return_state=False):
        state = None if state is None else state.detach()
        return super().forward(x, state, layout=layout, return_state=return_state)


class GrowsState(MovingAverage):
    def forward(self, x, state=None, *, layout=None, return_state=False):
        result = super().forward(x, state, layout=layout, return_state=return_state)
        if return_state:
            result.state.last = torch.cat([result.state.last, result.state.last], dim=1)
        return result


class DefaultStateDiffers(MovingAverage):
    """Without a state it starts from ones instead of the zero state."""

    def forward(self, x, state=None, *, layout=None, return_state=False):
        if state is None:
            rows = x.shape[0] if layout is None else layout.num_documents
            state = self.init_state(rows, device=x.device, dtype=x.dtype).map(torch.ones_like)
        return super().forward(x, state, layout=layout, return_state=return_state)


# ---- packing


class LeaksAcrossDocuments(MovingAverage):
    """The average runs on over document boundaries."""

    def same(self, layout):
        return (layout.document >= 0)[:, :, None] & (layout.document >= 0)[:, None, :]


class LeaksGradientAcrossDocuments(MovingAverage):
    """Adds the other documents' mean and takes its value away again."""

    def mix(self, h, x, layout):
        multiple = (layout.lengths[layout.document.clamp(min=0)] < layout.valid.sum(1)[:, None])[..., None]
        everything = torch.where(multiple, h.mean(dim=1, keepdim=True), 0)
        return super().mix(h + (everything - everything.detach()), x, layout)


class ClearsUnusedSlots(MovingAverage):
    """Slots without a document lose the state they were given."""

    def forward(self, x, state=None, *, layout=None, return_state=False):
        result = super().forward(x, state, layout=layout, return_state=return_state)
        if return_state and layout is not None:
            result.state.mean = torch.where((layout.lengths > 0)[:, None], result.state.mean, 0)
        return result


# ---- causality


class LeakingChunkRouter(MovingAverage):
    """Gates every token by the mean of its chunk, later tokens included."""

    def mix(self, h, x, layout):
        chunk = layout.position // 8
        pool = self.same(layout) & (chunk[:, :, None] == chunk[:, None, :])
        pool = pool.to(h.dtype)
        mean = (pool @ h) / pool.sum(-1, keepdim=True)
        return super().mix(h * torch.sigmoid(mean), x, layout)


class PrefixOneTooLong(PrefixMovingAverage):
    """Takes the token behind the prefix for one of it."""

    def visible(self, column, layout):
        causal = column[:, None] >= column[None, :]
        if layout.prefix_lengths is None:
            return causal
        prefix = layout.prefix_lengths[layout.document.clamp(min=0)]
        inside = (layout.position < prefix + 1) & (prefix > 0)
        return causal | (inside[:, :, None] & inside[:, None, :])


# ---- batch


class CentresBatch(MovingAverage):
    """Like batch norm: statistics of the batch while training."""

    def mix(self, h, x, layout):
        return super().mix(h - h.mean(dim=0, keepdim=True) if self.training else h, x, layout)


class HearsLeftPadding(MovingAverage):
    """The first token of a left-padded prompt takes padding for its predecessor."""

    def masked(self, x, layout):
        return x

    def first(self, layout):
        column = torch.arange(layout.length, device=layout.position.device)
        behind_padding = layout.document.roll(1, dims=1) < 0
        return (layout.position == 0) & ((column == 0) | ~behind_padding)


# ---- backend agreement


def _operator(name, **implementations):
    modules = {}
    for backend, functions in implementations.items():
        module = types.ModuleType(f"seqmodels_broken_{name}_{backend}")
        vars(module).update(functions)
        sys.modules[module.__name__] = module
        modules[backend] = module.__name__
    return Operator(
        f"broken_{name}", "Tensor x, Tensor weight", outputs=1, fake=lambda x, weight: torch.empty_like(x),
        modules=modules, differentiable=(0, 1),
    )  # fmt: skip


def _scale(x, weight):
    return x * weight


def _scale_backward(grad, x, weight):
    return grad * weight, (grad * x).flatten(0, -2).sum(0)


RIGHT = {"forward": _scale, "backward": _scale_backward}
SCALE = _operator("right", reference=RIGHT, torch=RIGHT)
SCALE_FORWARD = _operator(
    "forward", reference=RIGHT, torch={"forward": lambda x, w: _scale(x, w) * 1.001, "backward": _scale_backward}
)
SCALE_BACKWARD = _operator(
    "backward", reference=RIGHT,
    torch={"forward": _scale, "backward": lambda g, x, w: (g * w, 1.001 * (g * x).flatten(0, -2).sum(0))},
)  # fmt: skip
SCALE_SLOPPY = _operator(
    "sloppy", reference=RIGHT,
    torch={
        "forward": lambda x, w: (x.bfloat16() * w.bfloat16()).to(x.dtype) if x.dtype == torch.float32 else x * w,
        "backward": _scale_backward,
    },
)  # fmt: skip
SCALE_WRONG_FAKE = Operator(
    "broken_fake", "Tensor x, Tensor weight", outputs=1,
    fake=lambda x, weight: x.new_empty(x.shape, dtype=torch.float32), modules=SCALE.modules, differentiable=(0, 1),
)  # fmt: skip


class _Scaled(MovingAverage):
    operator = SCALE

    def __init__(self, d_model):
        super().__init__(d_model)
        self.scale = nn.Parameter(torch.ones(d_model))

    def mix(self, h, x, layout):
        return self.operator(super().mix(h, x, layout), self.scale)

    @torch.no_grad()
    def step(self, x_t, state):
        return self.operator(super().step(x_t, state), self.scale)


class WrongBackendForward(_Scaled):
    operator = SCALE_FORWARD


class WrongBackendBackward(_Scaled):
    operator = SCALE_BACKWARD


class LowPrecisionBackend(_Scaled):
    """Right in float64; float32 goes through bfloat16."""

    operator = SCALE_SLOPPY


# ---- registration


class WrongFake(_Scaled):
    operator = SCALE_WRONG_FAKE


class StepReadsHost(MovingAverage):
    @torch.no_grad()
    def step(self, x_t, state):
        y_t = super().step(x_t, state)
        return -y_t if state.position.max().item() > 10**9 else y_t


class GraphBreak(MovingAverage):
    def forward(self, x, state=None, *, layout=None, return_state=False):
        result = super().forward(x, state, layout=layout, return_state=return_state)
        torch._dynamo.graph_break()
        return result


class RecompilesByLength(MovingAverage):
    """Takes another path for long sequences, to the same end."""

    def forward(self, x, state=None, *, layout=None, return_state=False):
        if x.shape[1] > 20:
            x = x + 0
        return super().forward(x, state, layout=layout, return_state=return_state)


# ---- round trip


class ForgetsWeight(MovingAverage):
    """A weight kept as a plain tensor: in no state dict, and moved by nothing."""

    def __init__(self, d_model):
        super().__init__(d_model)
        self.mixture = torch.randn(d_model, d_model)

    def mix(self, h, x, layout):
        return super().mix(h, x, layout) @ self.mixture.to(x.dtype)

    @torch.no_grad()
    def step(self, x_t, state):
        return super().step(x_t, state) @ self.mixture.to(x_t.dtype)


class ForgetsBuffer(MovingAverage):
    """A table that only the constructor fills: lost after to_empty."""

    def __init__(self, d_model):
        super().__init__(d_model)
        self.register_buffer("table", torch.arange(1.0, d_model + 1), persistent=False)

    def mix(self, h, x, layout):
        return super().mix(h, x, layout) * self.table

    @torch.no_grad()
    def step(self, x_t, state):
        return super().step(x_t, state) * self.table


class RoundsBuffer(ForgetsBuffer):
    """A table whose values bfloat16 cannot hold: gone after going there and back."""

    def __init__(self, d_model):
        super().__init__(d_model)
        self.register_buffer("table", torch.arange(1.0, d_model + 1) / 3)


class HintsNothing(MovingAverage):
    parameter_hints: ClassVar = {"decays": ParameterHint(weight_decay=0.0)}


# ---- accounting


class ForgetsPosition(MovingAverage):
    def state_bytes(self, context_length, *, batch_size=1, dtype=None):
        return super().state_bytes(context_length, batch_size=batch_size, dtype=dtype) - 8 * batch_size


class StateGrowsInHalf(MovingAverage):
    """Carried in float64 when the layer is in bfloat16: twice what it says."""

    def forward(self, x, state=None, *, layout=None, return_state=False):
        result = super().forward(x, state, layout=layout, return_state=return_state)
        if return_state and x.dtype == torch.bfloat16:
            result.state.mean = result.state.mean.double()
        return result


class KeepsSequence(MovingAverage):
    """The state is a view that keeps the whole sequence alive."""

    def forward(self, x, state=None, *, layout=None, return_state=False):
        result = super().forward(x, state, layout=layout, return_state=return_state)
        if return_state:
            last = result.state.last
            result.state.last = torch.cat([last] * 8).view(8, *last.shape)[-1]
        return result


BROKEN = {
    StepUsesNewToken: {"split"},
    StepReallocates: {"split"},
    StepHasGradient: {"split"},
    MutatesState: {"split"},
    ReturnsGivenTensor: {"split", "packing", "batch"},
    ReturnsView: {"split", "accounting"},
    DetachesState: {"split"},
    GrowsState: {"split", "packing", "batch", "backend_agreement", "registration", "accounting"},
    DefaultStateDiffers: {"split"},
    LeaksAcrossDocuments: {"packing"},
    LeaksGradientAcrossDocuments: {"packing"},
    ClearsUnusedSlots: {"packing"},
    LeakingChunkRouter: {"causality", "split"},
    PrefixOneTooLong: {"causality", "split"},
    CentresBatch: {"batch"},
    HearsLeftPadding: {"batch"},
    WrongBackendForward: {"backend_agreement"},
    WrongBackendBackward: {"backend_agreement"},
    LowPrecisionBackend: {"backend_agreement"},
    WrongFake: {"registration"},
    StepReadsHost: {"registration"},
    GraphBreak: {"registration"},
    RecompilesByLength: {"registration"},
    ForgetsWeight: {"round_trip", "accounting"},
    ForgetsBuffer: {"round_trip"},
    RoundsBuffer: {"round_trip"},
    HintsNothing: {"round_trip"},
    ForgetsPosition: {"accounting"},
    StateGrowsInHalf: {"accounting", "backend_agreement"},
    KeepsSequence: {"accounting"},
}


def broken_laws(factory, laws):
    try:
        check_layer(factory, only=laws)
    except LawViolation as violation:
        return set(violation.law.split(", "))
    return set()


@pytest.mark.parametrize("factory", [MovingAverage, PrefixMovingAverage, BidirectionalMovingAverage, _Scaled])
def test_right_layer_passes(factory):
    check_layer(factory)


@pytest.mark.parametrize("factory", BROKEN)
def test_broken_layer_is_caught(factory):
    """Compiling is slow: here only layers that are broken there are compiled."""
    laws = [law for law in LAWS if law != "registration" or law in BROKEN[factory]]
    assert broken_laws(factory, laws) == BROKEN[factory]


@pytest.mark.slow
@pytest.mark.parametrize("factory", [factory for factory, laws in BROKEN.items() if "registration" not in laws])
def test_broken_layer_compiles(factory):
    assert broken_laws(factory, ["registration"]) == set()


def test_every_law_has_its_broken_layer():
    assert set().union(*BROKEN.values()) == set(LAWS)
