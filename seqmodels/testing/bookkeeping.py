"""Laws 7 and 8: a layer survives being saved and moved (round trip) and holds what it says it holds (accounting)."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from seqmodels.configuration import dump_yaml, parse_yaml
from seqmodels.mixers.base import Mixer
from seqmodels.testing.subject import (
    initial_state,
    is_stateful,
    law,
    prefix_layout,
    prepared,
    random_input,
    results,
)
from seqmodels.testing.violation import require


@law
def round_trip(
    layer: Mixer,
    factory: Callable[..., Mixer] | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    batch_size: int = 2,
    length: int = 13,
) -> None:
    """Law 7: arguments, state dict, dtype, device, deepcopy.

    ``config`` goes to YAML and back, and ``factory(**config)`` builds a layer with the same
    parameters, to which the state dict gives the same function, bit for bit; also when it was
    built on the meta device and filled by ``to_empty`` and ``load_state_dict(assign=True)``.
    Parameters and buffers are real. ``to(bfloat16)`` computes in bfloat16, and going to bfloat16
    and back changes only parameters, to what bfloat16 holds. A deepcopy shares no memory. Every
    name in ``parameter_hints`` is a parameter, on the copies too.

    Args:
        factory, config: what built ``layer``. Without them the copies stand in for a rebuilt layer.
    """
    layer = prepared(layer, torch.float32)
    for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
        require(not tensor.is_complex(), f"{name} is {tensor.dtype}; keep real and imaginary parts as real tensors")
    _check_hints(layer, "the layer")
    run = _runner(layer, batch_size, length)
    expected = run(layer)

    twin = copy.deepcopy(layer)
    _check_same("deepcopy", expected, run(twin))
    _check_hints(twin, "its deepcopy")
    owned = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    for name, tensor in (*twin.named_parameters(), *twin.named_buffers()):
        require(
            tensor.numel() == 0 or tensor.untyped_storage().data_ptr() not in owned,
            f"deepcopy shares the memory of {name}",
        )

    _check_dtypes(layer, run, batch_size, length)
    if factory is not None:
        arguments = dict(config or {})
        again = parse_yaml(dump_yaml(arguments))
        require(again == arguments, f"the configuration {arguments} reads back from YAML as {again}")
        _check_rebuilt(layer, factory, again, run, expected)


def _check_rebuilt(
    layer: Mixer,
    factory: Callable[..., Mixer],
    config: Mapping[str, Any],
    run: Callable[[Mixer], dict[str, Tensor]],
    expected: dict[str, Tensor],
) -> None:
    saved = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    rebuilt = factory(**config).eval()
    rebuilt.load_state_dict(saved)
    _check_same("rebuilt from its arguments and state dict", expected, run(rebuilt))
    with torch.device("meta"):
        empty = factory(**config).eval()
    shapes = {name: (tuple(p.shape), p.dtype) for name, p in layer.named_parameters()}
    found = {name: (tuple(p.shape), p.dtype) for name, p in empty.named_parameters()}
    require(found == shapes, f"on the meta device the parameters are {found}; on the CPU {shapes}")
    empty.to_empty(device="cpu").load_state_dict(saved, assign=True)
    where = "built on the meta device, to_empty, load_state_dict(assign=True)"
    _check_same(where, expected, run(empty))
    _check_hints(empty, "the layer " + where)


def _check_dtypes(layer: Mixer, run: Any, batch_size: int, length: int) -> None:
    half = copy.deepcopy(layer).to(torch.bfloat16)
    for name, tensor in run(half).items():
        if name == "y":
            require(tensor.dtype == torch.bfloat16, f"after to(bfloat16) y is {tensor.dtype}")
        require(bool(torch.isfinite(tensor).all()), f"after to(bfloat16) {name} is not finite")
    back = copy.deepcopy(half).to(torch.float32)
    direct = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in direct.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    _check_same("to(bfloat16) and back, against rounded parameters (a buffer lost precision)", run(direct), run(back))
    wide = copy.deepcopy(layer).to(torch.float64)
    require(run(wide)["y"].dtype == torch.float64, "after to(float64) y is not float64")
    _check_same("to(float64) and back", run(layer), run(wide.to(torch.float32)))


def _runner(layer: Mixer, batch_size: int, length: int) -> Callable[[Mixer], dict[str, Tensor]]:
    x = random_input(layer, batch_size, length)
    stateful = is_stateful(layer)

    def run(candidate: Mixer) -> dict[str, Tensor]:
        like = next(candidate.parameters(), x)
        state = initial_state(candidate, batch_size, length)
        layout = prefix_layout(candidate, batch_size, length, 3)
        with torch.no_grad():
            result = candidate(x.to(like.dtype), state, layout=layout, return_state=stateful)
        return results(result.y, result.state)

    return run


def _check_same(where: str, expected: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name, wanted in expected.items():
        require(torch.equal(found[name], wanted), f"{where}: {name} is not the same, bit for bit")


def _check_hints(layer: Mixer, where: str) -> None:
    for path, module in layer.named_modules():
        for name in getattr(module, "parameter_hints", {}):
            owner = f"{path or type(module).__name__}"
            require(
                name in module._parameters,
                f"{where}: parameter_hints of {owner} names {name!r}, which is not one of its parameters "
                f"({', '.join(module._parameters) or 'none'}); register_parameter(name, None) declares an absent one",
            )


@law
def accounting(layer: Mixer, *, batch_size: int = 3, length: int = 13, steps: int = 3) -> None:
    """Law 8: ``state_bytes`` and parameter counts equal what is allocated.

    ``state_bytes`` equals the bytes of the memory that states of ``init_state``, ``forward`` and
    ``step`` hold on to (a view keeps all of what it looks into), in float32 and bfloat16, for one
    and for several samples. Fields are all that a state holds. Parameters own exactly their
    elements, and no tensor of a module is outside its parameters and buffers.
    """
    layer = prepared(layer, torch.float32)
    tensors = {name: t for name, t in (*layer.named_parameters(), *layer.named_buffers())}
    counted = sum(t.numel() * t.element_size() for t in tensors.values())
    require(
        _allocated(tensors) == counted,
        f"parameters and buffers count {counted} bytes and hold {_allocated(tensors)}",
    )
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            require(
                not isinstance(value, Tensor),
                f"{path or type(module).__name__}.{name} is a tensor outside parameters and buffers: "
                "it is not counted, saved or moved",
            )
    if not is_stateful(layer):
        return
    half = copy.deepcopy(layer).to(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, batch_size):
            expected = layer.state_bytes(length + steps, batch_size=rows, dtype=dtype)
            asked = layer.init_state(rows, max_length=length + steps, dtype=dtype)
            _check_bytes(f"init_state(dtype={dtype})", asked, expected, rows)
            _check_carried_bytes(layer if dtype == torch.float32 else half, rows, length, steps, expected)


def _check_carried_bytes(layer: Mixer, rows: int, length: int, steps: int, expected: int) -> None:
    """States of ``init_state``, ``forward`` and ``step`` in the layer's own dtype."""
    x = random_input(layer, rows, length + steps)
    where = f"of a {str(x.dtype).removeprefix('torch.')} layer"
    start = initial_state(layer, rows, length + steps)
    _check_bytes(f"init_state {where}", start, expected, rows)
    layout = prefix_layout(layer, rows, length, 3)
    with torch.no_grad():
        state = layer(x[:, :length], start, layout=layout, return_state=True).state
    _check_bytes(f"forward {where}", state, expected, rows)
    for t in range(length, length + steps):
        layer.step(x[:, t], state)
    _check_bytes(f"step {where}", state, expected, rows)


def _allocated(tensors: Mapping[str, Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors.values()}
    return sum(storages.values())


def _check_bytes(where: str, state: Any, expected: int, rows: int) -> None:
    found = _allocated(dict(state.tensors()))
    require(
        found == expected,
        f"the state of {where} for batch size {rows} holds {found} bytes; state_bytes says {expected}",
    )
    extra = sorted(set(vars(state)) - {field for field in type(state).__dataclass_fields__})
    require(not extra, f"the state of {where} has attributes outside its fields: {extra}")
