"""State: a container of tensors that maps, selects, moves and counts."""

from __future__ import annotations

import math

import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor

from seqmodels.state import EmptyState, State, check_state


class Inner(State):
    values: Tensor
    phase: Tensor | None = None

    def canonical(self) -> Inner:
        return Inner(self.values, None if self.phase is None else self.phase.remainder(2 * math.pi))


class Outer(State):
    position: Tensor
    inner: Inner
    layers: tuple[Inner, ...] = ()


def make(batch: int = 3) -> Outer:
    values = torch.arange(batch * 2.0).view(batch, 2)
    return Outer(torch.arange(batch), Inner(values, values + 7), (Inner(values * 2), Inner(values * 3)))


def test_tensors_are_named_depth_first():
    names = [name for name, _ in make().tensors()]
    assert names == ["position", "inner.values", "inner.phase", "layers.0.values", "layers.1.values"]


def test_it_is_a_pytree():
    state = make()
    leaves, spec = pytree.tree_flatten(state)
    assert [leaf for leaf in leaves if leaf is not None] == [tensor for _, tensor in state.tensors()]
    again = pytree.tree_unflatten(leaves, spec)
    assert type(again) is Outer
    assert type(again.inner) is Inner
    assert again.layers[0].phase is None
    assert again.inner.values is state.inner.values


def test_map_keeps_the_structure_and_leaves_the_original_alone():
    state = make()
    doubled = state.map(lambda tensor: tensor * 2)
    assert type(doubled.layers[1]) is Inner
    assert torch.equal(doubled.layers[1].values, state.layers[1].values * 2)
    assert torch.equal(state.position, torch.arange(3))


def test_select_reorders_repeats_and_drops_rows():
    state = make()
    beam = state.select(torch.tensor([2, 0, 0, 1]))
    assert beam.position.tolist() == [2, 0, 0, 1]
    assert torch.equal(beam.layers[1].values, state.layers[1].values[[2, 0, 0, 1]])
    assert state.select(torch.tensor([1])).batch_size == 1
    beam.position.add_(1)
    assert state.position.tolist() == [0, 1, 2], "select shares memory with its source"


def test_select_carries_gradients():
    values = torch.randn(3, 2, requires_grad=True)
    Inner(values).select(torch.tensor([1, 1])).values.sum().backward()
    assert values.grad.tolist() == [[0, 0], [2, 2], [0, 0]]


def test_detach_cuts_gradients_and_clone_owns_memory():
    values = torch.randn(3, 2, requires_grad=True)
    state = Inner(values * 2)
    assert state.values.requires_grad
    assert not state.detach().values.requires_grad
    copied = state.clone()
    assert copied.values.data_ptr() != state.values.data_ptr()
    assert copied.values.requires_grad, "clone keeps the graph; detach cuts it"


def test_to_changes_floating_point_tensors_only():
    moved = make().to(dtype=torch.float64)
    assert moved.inner.values.dtype == torch.float64
    assert moved.position.dtype == torch.int64
    assert make().to(device="meta").inner.values.device.type == "meta"


def test_canonical_reaches_nested_states():
    state = make()
    expected = state.inner.phase.remainder(2 * math.pi)
    assert torch.equal(state.canonical().inner.phase, expected)
    assert torch.equal(state.canonical().layers[1].values, state.layers[1].values)


def test_bytes_and_batch_size():
    state = make()
    assert state.nbytes == 3 * 8 + 4 * 6 * 4
    assert state.batch_size == 3
    assert EmptyState().nbytes == 0
    assert list(EmptyState().tensors()) == []
    with pytest.raises(ValueError, match="EmptyState holds no tensor"):
        _ = EmptyState().batch_size


def test_compiled_code_takes_and_returns_states():
    torch._dynamo.reset()
    step = torch.compile(lambda state: state.map(lambda tensor: tensor + 1), fullgraph=True, backend="eager")
    assert torch.equal(step(make()).layers[0].values, make().layers[0].values + 1)


class TestCheckState:
    expected = Inner(torch.empty(2, 4, device="meta"), torch.empty(2, 1, device="meta"))

    def test_accepts_the_same_on_another_device(self):
        check_state(Inner(torch.zeros(2, 4), torch.zeros(2, 1)), self.expected, "Layer")

    @pytest.mark.parametrize("wrong", [None, torch.zeros(2, 4), EmptyState()])
    def test_another_type(self, wrong):
        with pytest.raises(TypeError, match=r"Layer got a state of type \w+; expected Inner.*Layer.init_state"):
            check_state(wrong, self.expected, "Layer")

    @pytest.mark.parametrize(
        ("values", "found"),
        [
            (torch.zeros(3, 4), r"\(3, 4\) torch.float32"),
            (torch.zeros(2, 5), r"\(2, 5\) torch.float32"),
            (torch.zeros(2, 4, dtype=torch.float64), "torch.float64"),
            (None, "is nothing"),
        ],
    )
    def test_another_batch_capacity_or_dtype(self, values, found):
        with pytest.raises(
            ValueError, match=f"Layer: state field 'values'.*{found}.*expected \\(2, 4\\) torch.float32"
        ):
            check_state(Inner(values, torch.zeros(2, 1)), self.expected, "Layer")
