"""Preparing a layer for the laws: random parameters, random inputs, poisoned memory, gradients."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from seqmodels.backends import BackendUnavailable
from seqmodels.layout import Layout
from seqmodels.mixers.base import Mixer
from seqmodels.state import State
from seqmodels.testing.violation import LawViolation, Violated, named

Law = TypeVar("Law", bound=Callable[..., Any])


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Uninitialised memory reads as NaN, for ``torch.empty`` and all its kin, in kernels too."""
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fill = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        memory.fill_uninitialized_memory = fill


def law(function: Law) -> Law:
    """Runs a law with poisoned memory and its own seed; names it in what it raises.

    An exception out of the layer is a violation as well: the law asked for something that the
    contract promises.
    """

    @functools.wraps(function)
    def checked(layer: Mixer, *args: Any, seed: int = 0, **kwargs: Any) -> Any:
        with torch.random.fork_rng(), poisoned(), torch.enable_grad():
            torch.manual_seed(seed)
            try:
                return function(layer, *args, **kwargs)
            except Violated as violation:
                raise LawViolation(function.__name__, f"{type(layer).__name__}: {violation}") from None
            except BackendUnavailable:
                raise
            except Exception as error:
                message = f"{type(layer).__name__} raised {type(error).__name__}: {error}"
                raise LawViolation(function.__name__, message) from error

    return checked  # type: ignore[return-value]


def prepared(layer: Mixer, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None) -> Mixer:
    """A copy in evaluation mode without dropout, every parameter moved off its initial value.

    Constant initial values (ones, zeros, the same decay for every head) hide swapped axes and
    dead paths.
    """
    layer = copy.deepcopy(layer).to(device=device, dtype=dtype).eval()
    for module in layer.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]
    with torch.no_grad():
        for parameter in layer.parameters():
            size = parameter.double().square().mean().sqrt().to(dtype)
            parameter.add_(0.1 * (1 + size) * torch.randn_like(parameter))
    return layer


def random_input(layer: Mixer, batch_size: int, length: int) -> Tensor:
    like = reference_tensor(layer)
    return torch.randn(batch_size, length, layer.d_model, dtype=like.dtype, device=like.device)


def reference_tensor(layer: Mixer) -> Tensor:
    """A tensor with the layer's dtype and device."""
    return next(layer.parameters(), torch.empty(0, dtype=torch.float64))


def is_stateful(layer: Mixer) -> bool:
    """Bidirectional layers carry nothing from one call to the next."""
    return layer.causality != "bidirectional"


def initial_state(layer: Mixer, batch_size: int, max_length: int) -> Any:
    return layer.init_state(batch_size, max_length=max_length) if is_stateful(layer) else None


def warm_state(layer: Mixer, batch_size: int, tokens: int, max_length: int) -> Any:
    """The state after ``tokens`` random tokens: what a nonzero state of this layer looks like."""
    if not is_stateful(layer):
        return None
    with torch.no_grad():
        start = initial_state(layer, batch_size, max_length)
        x = random_input(layer, batch_size, tokens)
        layout = prefix_layout(layer, batch_size, tokens, tokens)
        return layer(x, start, layout=layout, return_state=True).state


def prefix_layout(layer: Mixer, batch_size: int, length: int, prefix: int) -> Layout | None:
    """The layout that gives a prefix layer its prefix; None for the others."""
    if layer.causality != "prefix":
        return None
    return Layout.full(batch_size, length, prefix_lengths=[prefix] * batch_size, device=reference_tensor(layer).device)


def leaf_state(state: Any) -> Any:
    """A copy whose floating-point tensors collect gradients."""
    if state is None:
        return None
    return state.map(lambda t: t.detach().clone().requires_grad_(t.is_floating_point()))


def leaves_of(state: State | None) -> dict[str, Tensor]:
    if state is None:
        return {}
    return {f"initial state.{name}": tensor for name, tensor in state.tensors() if tensor.is_floating_point()}


def cotangents(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A random weight for every element of every floating-point tensor."""
    return {name: torch.randn_like(tensor) for name, tensor in tensors.items() if tensor.is_floating_point()}


def weighted(tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """Sum of all elements times their weights: one scalar whose gradient reaches everything."""
    return sum((tensors[name] * weight).sum() for name, weight in weights.items())  # type: ignore[return-value]


def results(y: Tensor, state: Any) -> dict[str, Tensor]:
    return {"y": y, **named(state)}


def gradients(
    layer: Mixer, loss: Tensor, inputs: Mapping[str, Tensor], *, keep_graph: bool = False
) -> dict[str, Tensor]:
    """Gradients to the named inputs and to every parameter; zeros where there is no path."""
    wanted = dict(inputs)
    wanted.update({f"parameter {name}": p for name, p in layer.named_parameters() if p.requires_grad})
    found = torch.autograd.grad(
        loss, list(wanted.values()), retain_graph=keep_graph, allow_unused=True, materialize_grads=True
    )
    return {f"gradient to {name}": gradient for name, gradient in zip(wanted, found, strict=True)}
