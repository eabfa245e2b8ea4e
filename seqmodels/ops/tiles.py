"""What a kernel's tiling may depend on: the device, the dtype and the head sizes, never the length.

A :class:`Tile` is one shipped launch configuration. A kernel lists all of them in its
:class:`~seqmodels.ops.kernels.KernelSpec`, which is what ``seqmodels audit`` compiles, and
picks one with a plain function of the :class:`Device`. Nothing is timed in training;
``seqmodels tune`` may store a better choice for one device (see :func:`tuned_tile`).
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import types
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger("seqmodels")


@dataclass(frozen=True)
class Tile:
    """One launch configuration: ``Tile({"BLOCK_L": 64}, num_warps=4, num_stages=2)``.

    Attributes:
        constants: constexpr arguments that the tiling decides.
        num_warps: warps of 32 threads (64 on AMD) in a block.
        num_stages: depth of software pipelining.
    """

    constants: Mapping[str, int]
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "constants", types.MappingProxyType(dict(sorted(self.constants.items()))))
        if self.num_warps not in (1, 2, 4, 8, 16, 32):
            raise ValueError(f"num_warps is {self.num_warps}; expected a power of two up to 32")

    def __hash__(self) -> int:
        return hash(self.label)

    def __reduce__(self) -> tuple[Any, ...]:  # the read-only view of the constants cannot be pickled
        return Tile, (dict(self.constants), self.num_warps, self.num_stages)

    @property
    def label(self) -> str:
        """A short name that identifies the configuration: ``BLOCK_L=64 w4 s2``."""
        constants = [f"{name}={value}" for name, value in self.constants.items()]
        return " ".join([*constants, f"w{self.num_warps}", f"s{self.num_stages}"])

    def launch(self) -> dict[str, int]:
        """Keywords for ``kernel[grid](*args, **tile.launch())``."""
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Device:
    """The properties of an accelerator that tiling may look at.

    Attributes:
        backend: ``"cuda"`` or ``"hip"``.
        architecture: 90 for sm_90, ``"gfx942"`` on AMD.
        shared_memory: bytes one block may use (opt-in limit on NVIDIA, LDS on AMD).
        multiprocessors: streaming multiprocessors or compute units.
        warp_size: threads in a warp.
        registers: 32-bit registers of one multiprocessor.
        multiprocessor_shared_memory: bytes of shared memory of one multiprocessor.
        max_warps: resident warps of one multiprocessor.
        max_blocks: resident blocks of one multiprocessor.
    """

    name: str
    backend: str
    architecture: int | str
    shared_memory: int
    multiprocessors: int
    warp_size: int = 32
    registers: int = 65536
    multiprocessor_shared_memory: int = 0
    max_warps: int = 64
    max_blocks: int = 32

    @property
    def target(self) -> str:
        """``sm_90``, ``gfx942``: the name used by the audit and by stored results."""
        return f"sm_{self.architecture}" if self.backend == "cuda" else str(self.architecture)


# Limits of the architectures that are compiled for without a GPU
# (CUDA C++ programming guide, table of technical specifications; CDNA 3 white paper).
KNOWN_DEVICES = {
    device.target: device
    for device in (
        Device("A100", "cuda", 80, 166912, 108, multiprocessor_shared_memory=167936),
        Device("RTX 3090", "cuda", 86, 101376, 82, multiprocessor_shared_memory=102400, max_warps=48, max_blocks=16),
        Device("H100", "cuda", 90, 232448, 132, multiprocessor_shared_memory=233472),
        Device("B200", "cuda", 100, 232448, 148, multiprocessor_shared_memory=233472),
        Device(
            "MI300X", "hip", "gfx942", 65536, 304, warp_size=64, registers=131072,
            multiprocessor_shared_memory=65536, max_warps=32,
        ),
    )
}  # fmt: skip


@functools.cache
def device_properties(index: int | None = None) -> Device:
    """The :class:`Device` behind ``cuda:index`` (the current one when None).

    Under the Triton interpreter there is no GPU; the H100 stands in for it.
    """
    if not torch.cuda.is_available():
        return KNOWN_DEVICES["sm_90"]
    properties = torch.cuda.get_device_properties(torch.cuda.current_device() if index is None else index)
    hip = getattr(properties, "gcnArchName", None) if torch.version.hip else None
    architecture = hip.split(":")[0] if hip else properties.major * 10 + properties.minor
    known = KNOWN_DEVICES.get(hip.split(":")[0] if hip else f"sm_{architecture}")
    return Device(
        name=properties.name,
        backend="hip" if hip else "cuda",
        architecture=architecture,
        shared_memory=getattr(properties, "shared_memory_per_block_optin", 0)
        or (known.shared_memory if known else 49152),
        multiprocessors=properties.multi_processor_count,
        warp_size=properties.warp_size,
        registers=getattr(properties, "regs_per_multiprocessor", 65536),
        multiprocessor_shared_memory=getattr(properties, "shared_memory_per_multiprocessor", 0),
        max_warps=properties.max_threads_per_multi_processor // properties.warp_size,
        max_blocks=known.max_blocks if known else 32,
    )


def variant_label(variant: Mapping[str, Any]) -> str:
    """``HEAD_DIM=64 BIAS=True without mask``: a variant as text, the same in tables, baselines and stored results."""
    given = " ".join(f"{name}={value}" for name, value in sorted(variant.items()) if value is not None)
    absent = ", ".join(sorted(name for name, value in variant.items() if value is None))
    return f"{given} without {absent}".strip() if absent else given


def cache_folder() -> Path:
    """``$SEQMODELS_CACHE``, or ``seqmodels`` in the user's cache folder."""
    root = os.environ.get("SEQMODELS_CACHE")
    return Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seqmodels"


def tuned_path(device: Device) -> Path:
    """Where ``seqmodels tune`` stores its result for a device."""
    slug = re.sub(r"[^a-z0-9]+", "-", f"{device.name} {device.target}".lower()).strip("-")
    return cache_folder() / "tiles" / f"{slug}.json"


@functools.cache
def tuned_tiles(device: Device) -> dict[tuple[str, str, str], Tile]:
    """(kernel, variant, dtype) -> tile, as stored for this device; empty where ``seqmodels tune`` never ran."""
    path = tuned_path(device)
    if not path.exists():
        return {}
    try:
        rows = json.loads(path.read_text())["tiles"]
        return {
            (row["kernel"], row["variant"], row["dtype"]): Tile(row["constants"], row["num_warps"], row["num_stages"])
            for row in rows
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning(
            "%s is unreadable (%s); the built-in tiles are used. Delete it or run `seqmodels tune`", path, error
        )
        return {}


def tuned_tile(device: Device, kernel: str, variant: Mapping[str, Any], dtype: str) -> Tile | None:
    """What ``seqmodels tune`` found best on this device, or None where it never ran."""
    tuned = tuned_tiles(device)
    return tuned.get((kernel, variant_label(variant), dtype)) if tuned else None
