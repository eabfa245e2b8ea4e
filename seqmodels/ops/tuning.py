"""Finds the best shipped tile of every kernel on one device, by timing, and stores it for later runs.

The built-in heuristics stay the default; this refines them where a device disagrees. Only shipped
tiles are tried, so whatever is chosen has been audited, and only a tile that gives the default's
results and is faster by more than :data:`MARGIN` is stored.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from seqmodels import backends
from seqmodels.ops import canary, tiles
from seqmodels.ops.examples import EXAMPLES, Arguments, Draw
from seqmodels.ops.kernels import KernelSpec, choosing_tiles
from seqmodels.ops.registration import OPERATORS, Operator
from seqmodels.ops.tiles import Device, Tile, tuned_path, variant_label

MARGIN = 0.03  # below it a difference is noise
Measure = Callable[[Callable[[], Any]], float]
Asked = dict[tuple[str, str, str], tuple[KernelSpec, Mapping[str, Any], str]]


def milliseconds(run: Callable[[], Any], *, samples: int = 20) -> float:
    """Median of CUDA-event times, after a warm-up; writes over the L2 cache between calls."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    run()
    times = []
    for _ in range(samples):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def tune(
    device: torch.device,
    *,
    ops: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype] = (torch.bfloat16, torch.float32),
    batch: int = 8,
    length: int = 4096,
    backend: str = "triton",
    measure: Measure = milliseconds,
    say: Callable[[str], None] = print,
) -> int:
    """Times the shipped tiles of every kernel and stores the better ones; returns how many it stored.

    Raises:
        ValueError: an op without Triton kernels.
    """
    properties = tiles.device_properties(device.index)
    known = {name for name in EXAMPLES if name in OPERATORS and backend in OPERATORS[name].modules}
    chosen = sorted(known if ops is None else ops)
    for name in chosen:
        if name not in known:
            raise ValueError(
                f"op {name!r} has no {backend} kernels to tune; expected one of {', '.join(sorted(known))}"
            )
    found: dict[tuple[str, str, str], Tile] = {}
    for name in chosen:
        for dtype in dtypes:
            for arguments in EXAMPLES[name](Draw(dtype, device, batch=batch, length=length)):
                try:
                    found.update(_tune_problem(OPERATORS[name], backend, arguments, properties, measure, say))
                except NotImplementedError as reason:
                    say(f"{name}, {dtype}: left out: {reason}")
    store(properties, found)
    say(f"{len(found)} tiles stored in {tuned_path(properties)}")
    return len(found)


def _tune_problem(
    operator: Operator, backend: str, arguments: Arguments, device: Device, measure: Measure, say: Callable[[str], None]
) -> dict[tuple[str, str, str], Tile]:
    """Better tiles of the kernels that one problem launches, one kernel at a time, the others at their defaults."""
    asked: Asked = {}

    def only(key: tuple[str, str, str] | None, tile: Tile | None) -> Callable[..., Tile]:
        def choice(spec: KernelSpec, variant: Mapping[str, Any], dtype: str) -> Tile:
            here = (spec.name, variant_label(variant), dtype)
            asked.setdefault(here, (spec, dict(variant), dtype))
            return tile if here == key and tile is not None else spec.default_tile(device, variant, dtype)

        return choice

    def run() -> Any:
        with backends.backend(backend):
            return canary.results(operator, backend, arguments)

    with choosing_tiles(only(None, None)):
        expected = run()
        base = measure(run)
    better: dict[tuple[str, str, str], Tile] = {}
    for key, (spec, variant, dtype) in list(asked.items()):
        default = spec.default_tile(device, variant, dtype)
        times = {default: base}
        for tile in spec.shipped_tiles(variant, dtype):
            if tile == default:
                continue
            try:
                with choosing_tiles(only(key, tile)):
                    error = max(canary.compare(run(), expected).values())
                    if error > canary.TOLERANCE[arguments[0].dtype]:
                        say(f"{spec.name} {tile.label}: differs from the default tile by {error:.1e}; not taken")
                        continue
                    times[tile] = measure(run)
            except Exception as failure:  # out of shared memory or registers on this device: not a candidate
                say(f"{spec.name} {tile.label}: {type(failure).__name__}; not taken")
        best = min(times, key=times.__getitem__)
        if times[best] < (1 - MARGIN) * base:
            better[key] = best
            say(f"{spec.name} {key[1]} {dtype}: {best.label} takes {times[best]:.3g} ms, {default.label} {base:.3g} ms")
    return better


def store(device: Device, found: Mapping[tuple[str, str, str], Tile]) -> None:
    """Adds the tiles to the device's file; entries of kernels that were not tuned this time stay."""
    path = tuned_path(device)
    kept = dict(tiles.tuned_tiles(device))
    kept.update(found)
    rows = [
        {"kernel": kernel, "variant": variant, "dtype": dtype, "constants": dict(tile.constants)}
        | {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        for (kernel, variant, dtype), tile in sorted(kept.items())
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"device": device.name, "torch": torch.__version__, "tiles": rows}, indent=1) + "\n")
    tiles.tuned_tiles.cache_clear()
