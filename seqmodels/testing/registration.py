"""Law 6: the layer is transparent to fake tensors, ``torch.compile`` and ``torch.library.opcheck``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqmodels.layout import Layout
from seqmodels.mixers.base import Mixer
from seqmodels.state import State
from seqmodels.testing.subject import (
    cotangents,
    gradients,
    initial_state,
    is_stateful,
    law,
    prefix_layout,
    prepared,
    random_input,
    reference_tensor,
    results,
    warm_state,
    weighted,
)
from seqmodels.testing.violation import Violated, check_close, exact_bound, require

PYTORCH_NAMESPACES = frozenset(
    {"aten", "prim", "prims", "profiler", "inductor", "higher_order", "c10d", "_c10d_functional"}
)


@law
def registration(
    layer: Mixer,
    *,
    batch_size: int = 2,
    lengths: Sequence[int] = (13, 22, 35),
    backend: str = "aot_eager",
    opcheck: bool = True,
    device: torch.device | str = "cpu",
) -> None:
    """Law 6: ``torch.library.opcheck``, fake tensors and ``torch.compile(fullgraph=True)``.

    Every op outside PyTorch's own namespaces that forward, backward or ``step`` calls passes
    ``opcheck``. Under fake tensors outputs and states have the shapes, dtypes and devices of real
    ones. One compilation serves all ``lengths`` and equals eager execution in outputs, states and
    gradients: of plain training, and of packed documents that carry states. ``step`` compiles
    whole, so it reads nothing on the host.

    Args:
        backend: of ``torch.compile``: ``aot_eager`` traces without generating code, ``inductor``
            generates it.
        opcheck: set False to leave the ops out, where another call has checked them.
    """
    layer = prepared(layer, device=device)
    if opcheck:
        _check_ops(layer, batch_size, lengths[0])
    _check_fake(layer, batch_size, lengths[0])
    for packed in (False, True):
        _check_compiled_forward(layer, batch_size, lengths, backend, packed=packed)
    if is_stateful(layer):
        _check_compiled_step(layer, batch_size, backend)


class OpCalls(TorchDispatchMode):
    """Records one call of each custom op for each combination of dtypes, ranks and absent arguments."""

    def __init__(self, *, differentiable: bool) -> None:
        super().__init__()
        self.differentiable = differentiable
        self.calls: dict[Any, tuple[Any, Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace not in PYTORCH_NAMESPACES:
            kinds = [
                (leaf.dtype, leaf.dim(), leaf.requires_grad) if isinstance(leaf, Tensor) else type(leaf)
                for leaf in pytree.tree_leaves((args, kwargs))
            ]
            key = (func, tuple(kinds))
            if key not in self.calls:
                self.calls[key] = (func, *pytree.tree_map_only(Tensor, self._copy, (args, kwargs)))
        return func(*args, **kwargs)

    def _copy(self, tensor: Tensor) -> Tensor:
        copied = tensor.detach().clone(memory_format=torch.preserve_format)
        return copied.requires_grad_(self.differentiable and tensor.requires_grad)


def recorded_ops(layer: Mixer, batch_size: int, length: int) -> list[tuple[Any, Any, Any]]:
    """(op, args, kwargs) of each distinct custom op call in forward, backward and step, plain and packed."""
    x = random_input(layer, batch_size, length).requires_grad_()
    rows = [[length // 3, length // 2]] * batch_size
    packed = Layout.packed(rows, length, capacity=2 * batch_size + 1, device=x.device)
    forward, rest = OpCalls(differentiable=True), OpCalls(differentiable=False)
    for layout in (None, packed):
        documents = batch_size if layout is None else layout.num_documents
        state = warm_state(layer, documents, 3, length + 4)
        with forward:
            result = layer(x, state, layout=layout, return_state=state is not None)
        with rest:
            values = results(result.y, result.state)
            gradients(layer, weighted(values, cotangents(values)), {"x": x})
            if state is not None and layout is None:
                layer.step(x[:, 0].detach(), result.state.detach())
    return [*forward.calls.values(), *rest.calls.values()]


def _check_ops(layer: Mixer, batch_size: int, length: int) -> None:
    for op, args, kwargs in recorded_ops(layer, batch_size, length):
        try:
            torch.library.opcheck(op, args, kwargs)
        except Exception as error:
            raise Violated(f"torch.library.opcheck of {op}: {error}") from error


def _describe(tensors: dict[str, Tensor]) -> dict[str, tuple[Any, ...]]:
    return {name: (tuple(t.shape), t.dtype, t.device) for name, t in tensors.items()}


def _check_fake(layer: Mixer, batch_size: int, length: int) -> None:
    from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

    x = random_input(layer, batch_size, length)
    state = initial_state(layer, batch_size, length + 1)
    layout = prefix_layout(layer, batch_size, length, 3)
    real = layer(x, state, layout=layout, return_state=state is not None)
    mode = FakeTensorMode()
    with FakeCopyMode(mode):
        fake_layer = copy.deepcopy(layer)
    fake_x, fake_state, fake_layout = pytree.tree_map_only(Tensor, mode.from_tensor, (x, state, layout))
    with mode:
        fake = fake_layer(fake_x, fake_state, layout=fake_layout, return_state=state is not None)
        found = _describe({"y": fake.y, **_tensors(fake.state)})
        if state is not None:
            y_t = fake_layer.step(fake_x[:, 0], fake.state.detach())
            found["step"] = (tuple(y_t.shape), y_t.dtype, y_t.device)
    expected = _describe({"y": real.y, **_tensors(real.state)})
    if state is not None:
        expected["step"] = (tuple(x[:, 0].shape), x.dtype, x.device)
    for name, wanted in expected.items():
        require(found[name] == wanted, f"under fake tensors {name} is {found[name]}; with real ones {wanted}")


def _tensors(state: State | None) -> dict[str, Tensor]:
    return {} if state is None else {f"state.{name}": tensor for name, tensor in state.tensors()}


class CountingBackend:
    """A ``torch.compile`` backend that counts the graphs it is given."""

    def __init__(self, name: str) -> None:
        self.compile = torch._dynamo.lookup_backend(name)
        self.graphs = 0

    def __call__(self, graph: Any, inputs: Any, **options: Any) -> Any:
        self.graphs += 1
        return self.compile(graph, inputs, **options)


def _compiled(function: Callable[..., Any], backend: str) -> tuple[Callable[..., Any], CountingBackend]:
    import torch._dynamo

    counting = CountingBackend(backend)
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=counting), counting


def _check_compiled_forward(
    layer: Mixer, batch_size: int, lengths: Sequence[int], backend: str, *, packed: bool
) -> None:
    """Training without a state (packed False), or documents that carry states (packed True)."""
    stateful = packed and is_stateful(layer)
    device = reference_tensor(layer).device
    warmup, what = 4, "forward over packed documents" if packed else "forward"
    state = warm_state(layer, 2 * batch_size + 1, warmup, warmup + max(lengths)) if stateful else None

    def function(x: Tensor, state: Any, layout: Layout | None) -> tuple[Tensor, Any]:
        result = layer(x, state, layout=layout, return_state=stateful)
        return result.y, result.state

    compiled, counting = _compiled(function, backend)
    for length in lengths:
        x = random_input(layer, batch_size, length).requires_grad_()
        layout = prefix_layout(layer, batch_size, length, 3)
        if packed:
            rows = [[length // 3, length // 2]] * batch_size
            layout = Layout.packed(rows, length, capacity=2 * batch_size + 1, device=device)
        eager = results(*function(x, state, layout))
        weights = cotangents(eager)
        expected = {**eager, **gradients(layer, weighted(eager, weights), {"x": x})}
        for tensor in (x, *(() if layout is None else (layout.document, layout.position))):
            torch._dynamo.mark_dynamic(tensor, 1)
        try:
            fast = results(*compiled(x, state, layout))
            found = {**fast, **gradients(layer, weighted(fast, weights), {"x": x})}
        except Exception as error:
            message = f"torch.compile(fullgraph=True, backend={backend!r}) of {what} at length {length}: {error}"
            raise Violated(message) from error
        check_close(f"compiled {what}, length {length}", found, expected, exact_bound(x.dtype, length))
        require(
            counting.graphs == 1,
            f"length {length} compiled {what} again ({counting.graphs} graphs for lengths {tuple(lengths)}); "
            "something reads the length as a Python number",
        )


def _check_compiled_step(layer: Mixer, batch_size: int, backend: str) -> None:
    tokens = 3
    x = random_input(layer, batch_size, tokens)
    state = warm_state(layer, batch_size, 4, 4 + tokens)
    own = state.clone()
    compiled, counting = _compiled(layer.step, backend)
    for t in range(tokens):
        expected = layer.step(x[:, t], state)
        try:
            found = compiled(x[:, t], own)
        except Exception as error:
            raise Violated(f"torch.compile(fullgraph=True, backend={backend!r}) of step: {error}") from error
        where = f"compiled step, token {t}"
        check_close(where, results(found, own), results(expected, state), exact_bound(x.dtype, tokens))
    require(counting.graphs == 1, f"step compiled {counting.graphs} times for {tokens} tokens; expected once")
