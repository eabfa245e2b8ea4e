"""Laws 1 and 2: one function however the sequence is cut (split) or laid out (packing)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.mixers.base import Mixer
from seqmodels.testing.subject import (
    cotangents,
    gradients,
    initial_state,
    is_stateful,
    law,
    leaf_state,
    leaves_of,
    prefix_layout,
    prepared,
    random_input,
    results,
    warm_state,
    weighted,
)
from seqmodels.testing.violation import check_close, check_exactly_zero, exact_bound, named, require


def partitions(length: int) -> Iterator[tuple[int, ...]]:
    """Ways to cut ``length`` tokens: single tokens at either end, halves, growing pieces, equal pieces."""
    if length < 4:
        yield (1,) * length
        return
    yield (1, length - 1)
    yield (length - 1, 1)
    yield (length // 2, length - length // 2)
    growing, left, size = [], length, 1
    while left:
        growing.append(min(size, left))
        left -= growing[-1]
        size += 1
    yield tuple(growing)
    piece = 3
    yield (piece,) * (length // piece) + ((length % piece,) if length % piece else ())


@law
def split(
    layer: Mixer,
    *,
    batch_size: int = 2,
    length: int = 29,
    warmup: int = 5,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> None:
    """Law 1: whole sequence = any split with carried state = token by token with ``step``.

    Outputs and final states (canonical) of all three; gradients to inputs, parameters and the
    initial state of whole and split. From the zero state and from a state that ``warmup`` tokens
    left. ``forward`` neither mutates nor aliases the state given, keeps its capacity, and
    leaves the layer as it was; ``step`` updates the state where it lies. Bidirectional layers
    are exempt. For prefix layers the first piece holds the whole prefix of ``warmup`` tokens.
    Bound: :func:`~seqmodels.testing.violation.exact_bound`.
    """
    if not is_stateful(layer):
        return
    layer = prepared(layer, dtype, device)
    capacity = warmup + length
    x = random_input(layer, batch_size, capacity)
    zero = initial_state(layer, batch_size, capacity)
    _check_separate("init_state", zero, {})
    warm = warm_state(layer, batch_size, warmup, capacity)
    _check_split(layer, "from the zero state", x, zero, warmup if layer.causality == "prefix" else 0)
    _check_split(layer, f"from a state after {warmup} tokens", x[:, :length], warm, 0)

    without = layer(x, layout=prefix_layout(layer, batch_size, capacity, warmup)).y
    given = layer(x, zero, layout=prefix_layout(layer, batch_size, capacity, warmup)).y
    check_close("state=None against init_state", {"y": without}, {"y": given}, exact_bound(dtype, capacity))


def _check_split(layer: Mixer, start: str, x: Tensor, state: Any, prefix: int) -> None:
    batch_size, length = x.shape[:2]
    bound = exact_bound(x.dtype, length)
    x = x.clone().requires_grad_()
    state = leaf_state(state)
    inputs = {"x": x, **leaves_of(state)}

    def piece(part: Tensor, carried: Any, first: bool) -> Any:
        layout = prefix_layout(layer, batch_size, part.shape[1], prefix) if first and prefix else None
        return layer(part, carried, layout=layout, return_state=True)

    before = {name: tensor._version for name, tensor in state.tensors()}
    values = state.map(lambda tensor: tensor.detach().clone())
    module_values = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
    whole = piece(x, state, first=True)
    where = f"forward over {length} tokens {start}"
    for (name, tensor), (_, value) in zip(state.tensors(), values.tensors(), strict=True):
        require(
            tensor._version == before[name] and torch.equal(tensor, value),
            f"{where} mutated the state it was given (field {name!r})",
        )
    for name, tensor in layer.state_dict().items():
        require(torch.equal(tensor, module_values[name]), f"{where} changed the layer's own {name!r}")
    others = {"x": x, "y": whole.y, **dict(layer.named_parameters()), **dict(layer.named_buffers())}
    _check_separate(where, whole.state, {**others, **{f"given state.{name}": t for name, t in state.tensors()}})
    for (name, tensor), (_, given) in zip(whole.state.tensors(), state.tensors(), strict=True):
        require(
            tensor.shape == given.shape and tensor.dtype == given.dtype,
            f"{where} returned state field {name!r} of {tuple(tensor.shape)} {tensor.dtype}; "
            f"the state given had {tuple(given.shape)} {given.dtype}",
        )
    expected = results(whole.y, whole.state)
    weights = cotangents(expected)
    expected_gradients = gradients(layer, weighted(expected, weights), inputs)

    for cut in partitions(length - prefix):
        sizes = (prefix, *cut) if prefix else cut
        outputs, carried = [], state
        for index, part in enumerate(torch.split(x, list(sizes), dim=1)):
            result = piece(part, carried, first=index == 0)
            outputs.append(result.y)
            carried = result.state
        found = results(torch.cat(outputs, dim=1), carried)
        where = f"pieces {sizes} {start}"
        check_close(where, found, expected, bound)
        check_close(where, gradients(layer, weighted(found, weights), inputs), expected_gradients, bound)
    _check_steps(layer, start, x.detach(), state, prefix, expected, bound)


def _check_steps(
    layer: Mixer, start: str, x: Tensor, state: Any, prefix: int, expected: dict[str, Tensor], bound: float
) -> None:
    outputs: list[Tensor] = []
    if prefix:
        layout = prefix_layout(layer, x.shape[0], prefix, prefix)
        with torch.no_grad():
            first = layer(x[:, :prefix], state.detach(), layout=layout, return_state=True)
        outputs, state = list(first.y.unbind(1)), first.state
    else:
        state = state.detach().clone()
    tensors = list(state.tensors())
    addresses = [tensor.data_ptr() for _, tensor in tensors]
    for t in range(prefix, x.shape[1]):
        y_t = layer.step(x[:, t], state)
        require(not y_t.requires_grad, f"step {start}: output {t} requires a gradient; step is inference only")
        outputs.append(y_t.clone())  # an output that aliases the state would change with the next step
    for (name, tensor), (_, now), address in zip(tensors, state.tensors(), addresses, strict=True):
        require(now is tensor and now.data_ptr() == address, f"step {start} reallocated state field {name!r}")
    check_close(f"step loop {start}", results(torch.stack(outputs, dim=1), state), expected, bound)


def _check_separate(where: str, state: Any, others: dict[str, Tensor]) -> None:
    """State tensors own their memory: step writes there."""
    owners = {tensor.untyped_storage().data_ptr(): name for name, tensor in others.items() if tensor.numel()}
    for name, tensor in state.tensors():
        if tensor.numel() == 0:
            continue
        address = tensor.untyped_storage().data_ptr()
        require(address not in owners, f"{where}: state field {name!r} shares memory with {owners.get(address)!r}")
        overlaps = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        require(not overlaps, f"{where}: state field {name!r} is an expanded tensor; rows share memory")
        owners[address] = f"state.{name}"


def documents_around(chunk_size: int) -> list[list[int]]:
    """Rows of document lengths: one token, just below, at and above a chunk, two rows with padding behind."""
    return [[1, chunk_size - 1, chunk_size + 1], [chunk_size, 2], [3, 1, 2 * chunk_size - 3]]


@law
def packing(
    layer: Mixer,
    *,
    documents: Sequence[Sequence[int]] | None = None,
    chunk_size: int = 8,
    warmup: int = 4,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> None:
    """Law 2: packed documents = each document alone.

    Outputs, final states, and gradients to inputs, parameters and initial states; from zero
    states and from nonzero ones. Padding holds large values. Slots without a document keep the
    state they were given. The gradient of one document's outputs and final state to all else is
    exactly zero.
    Bound: :func:`~seqmodels.testing.violation.exact_bound`.
    """
    layer = prepared(layer, dtype, device)
    rows = documents_around(chunk_size) if documents is None else [list(row) for row in documents]
    lengths = [entry for row in rows for entry in row]
    columns = max(map(sum, rows)) + 2
    prefixes = [entry // 2 for entry in lengths] if layer.causality == "prefix" else None
    capacity = len(lengths) + 2
    layout = Layout.packed(rows, columns, capacity=capacity, prefix_lengths=prefixes, device=device)
    x = random_input(layer, len(rows), columns)
    x = torch.where(layout.valid[..., None], x, 1000 * x)
    zero = initial_state(layer, capacity, columns + warmup)
    _check_packing(layer, "from zero states", x, zero, layout, lengths, prefixes)
    if is_stateful(layer):
        warm = warm_state(layer, capacity, warmup, columns + warmup)
        plain = Layout.packed(rows, columns, capacity=capacity, device=device)
        _check_packing(layer, f"from states after {warmup} tokens", x, warm, plain, lengths, None)


def _check_packing(
    layer: Mixer, start: str, x: Tensor, state: Any, layout: Layout, lengths: list[int], prefixes: list[int] | None
) -> None:
    bound = exact_bound(x.dtype, x.shape[1])
    x = x.clone().requires_grad_()
    state = leaf_state(state)
    inputs = {"x": x, **leaves_of(state)}
    stateful = state is not None
    packed = layer(x, state, layout=layout, return_state=stateful)
    for name, tensor in results(packed.y, packed.state).items():
        require(
            not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()),
            f"packed {start}: {name} is not finite at padding or in unused slots",
        )
    if stateful:
        unused = torch.arange(len(lengths), layout.num_documents, device=x.device)
        kept, given = named(packed.state.select(unused)), named(state.select(unused))
        check_close(f"slots without a document packed {start}: the state must stay as given", kept, given, 0.0)
    flat_y, flat_x = packed.y.flatten(0, 1), x.flatten(0, 1)
    packed_loss, alone_loss, losses = x.new_zeros(()), x.new_zeros(()), []
    for slot, entry in enumerate(lengths):
        begin = int(layout.starts[slot])
        rows = torch.tensor([slot], device=x.device)
        single = None
        if prefixes is not None:
            single = Layout.full(1, entry, prefix_lengths=[prefixes[slot]], device=x.device)
        own = state.select(rows) if stateful else None
        alone = layer(flat_x[None, begin : begin + entry], own, layout=single, return_state=stateful)
        expected = results(alone.y, alone.state)
        found = results(
            flat_y[None, begin : begin + entry],
            packed.state.select(rows) if stateful else None,
        )
        check_close(f"document {slot} ({entry} tokens at flat index {begin}) packed {start}", found, expected, bound)
        weights = cotangents(expected)
        losses.append(weighted(found, weights))
        packed_loss = packed_loss + losses[-1]
        alone_loss = alone_loss + weighted(expected, weights)
    check_close(
        f"packed {start}",
        gradients(layer, packed_loss, inputs, keep_graph=True),
        gradients(layer, alone_loss, inputs),
        bound,
    )
    slot = len(lengths) // 2
    leak = torch.autograd.grad(losses[slot], list(inputs.values()), allow_unused=True, materialize_grads=True)
    outside = (layout.document != slot)[..., None]
    check_exactly_zero(f"from document {slot} to the others packed {start}", leak[0] * outside)
    for name, gradient in zip(list(inputs)[1:], leak[1:], strict=True):
        others = torch.arange(gradient.shape[0], device=x.device) != slot
        check_exactly_zero(f"from document {slot} to {name} of the others packed {start}", gradient[others])
