"""Decode and carry state: a small named container of tensors.

A layer declares its state as a class with annotated fields::

    class LinearAttentionState(State):
        matrix: Tensor  # (batch, heads, key_dim, value_dim)

Every tensor has the batch (or, for packed documents, the document) as its first
dimension. A subclass is turned into a dataclass and registered as a pytree, so that
``torch.compile``, ``tree_map`` and CUDA graphs see plain tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from typing_extensions import Self, dataclass_transform


@dataclass_transform(eq_default=False)
class State:
    """Base of all layer states. Fields are ``Tensor``, ``None``, ``State`` or tuples of these."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(eq=False)(cls)
        pytree.register_pytree_node(cls, _flatten, lambda children, _: cls(*children))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The same container with ``function`` applied to every tensor."""
        return pytree.tree_map_only(Tensor, function, self)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs of dotted field name and tensor, depth first."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            yield from _named(field.name, getattr(self, field.name))

    def select(self, indices: Tensor) -> Self:
        """Rows ``indices`` of the batch, in that order (beam search, dropping finished rows)."""
        return self.map(lambda tensor: tensor.index_select(0, indices))

    def detach(self) -> Self:
        """Cuts the gradient: the boundary of truncated back-propagation through time."""
        return self.map(Tensor.detach)

    def clone(self) -> Self:
        return self.map(Tensor.clone)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Moves every tensor; ``dtype`` touches floating-point tensors only (positions stay integers)."""
        return self.map(
            lambda tensor: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        )

    def canonical(self) -> Self:
        """The representative that equal states share (phase mod 2 pi, unused slots zero)."""
        values = [_canonical(getattr(self, field.name)) for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        return type(self)(*values)

    @property
    def nbytes(self) -> int:
        """Bytes allocated by all tensors together."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.tensors())

    @property
    def batch_size(self) -> int:
        for _, tensor in self.tensors():
            return tensor.shape[0]
        raise ValueError(f"{type(self).__name__} holds no tensor, so it has no batch size")


def _flatten(state: State) -> tuple[list[Any], None]:
    return [getattr(state, field.name) for field in dataclasses.fields(state)], None  # type: ignore[arg-type]


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, State):
        for inner, tensor in value.tensors():
            yield f"{name}.{inner}", tensor
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _named(f"{name}.{index}", item)


def _canonical(value: Any) -> Any:
    if isinstance(value, State):
        return value.canonical()
    if isinstance(value, (tuple, list)):
        return type(value)(_canonical(item) for item in value)
    return value


class EmptyState(State):
    """The state of a layer that treats every token alone (SwiGLU, MLP): no tensor, no bytes."""


def check_state(state: Any, expected: State, owner: str) -> None:
    """Refuses a state of another layer, batch size, capacity or dtype, naming the field.

    ``expected`` is a state made on the meta device by ``init_state``.
    """
    if type(state) is not type(expected):
        raise TypeError(
            f"{owner} got a state of type {type(state).__name__}; expected {type(expected).__name__}. "
            f"Make one with {owner}.init_state(batch_size)."
        )
    given, wanted = dict(state.tensors()), dict(expected.tensors())
    for name, tensor in wanted.items():
        other = given.get(name)
        if other is None or other.shape != tensor.shape or other.dtype != tensor.dtype:
            found = "nothing" if other is None else f"{tuple(other.shape)} {other.dtype}"
            raise ValueError(
                f"{owner}: state field {name!r} is {found}; expected {tuple(tensor.shape)} {tensor.dtype}. "
                f"Make the state with {owner}.init_state(batch_size, max_length=..., dtype=...) of this layer."
            )
