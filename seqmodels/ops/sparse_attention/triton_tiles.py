"""The tiles of sparse global attention's kernels, and how a kernel is declared for each kind of number.

Registers decide (255 a thread). bf16 and fp16: 64 rows of the result feed a warpgroup, so a kernel that walks
keys takes 64 query rows, and one that walks queries 64 keys. Machines whose every product is an ``mma.sync`` or
goes to tensor memory, and heads of 128, take 32 on the other side. Float32 is three TF32 products, with four times
the registers of one in bf16, so its tiles are small and no warpgroup's; AMD's matrix units take float32 as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton

from seqmodels.ops.kernels import KernelSpec
from seqmodels.ops.tiles import Device, Tile

LARGEST_WIDTH = 128  # of a head; the tiles of 256 spill


def constants(heads: int, repeat: int, width: int) -> dict[str, Any]:
    """What a kernel knows of the heads: key heads, query heads for each, their width."""
    return {"HEADS": heads, "REPEAT": repeat, "WIDTH": width, "BLOCK_P": max(16, triton.next_power_of_2(width))}


SHAPES = (constants(8, 1, 64), constants(2, 4, 128), constants(4, 3, 80))


def tile_of(rows: int, keys: int, num_warps: int, num_stages: int, *, tf32x3: bool = False) -> Tile:
    return Tile({"BLOCK_M": rows, "BLOCK_N": keys, "TF32X3": int(tf32x3)}, num_warps=num_warps, num_stages=num_stages)


# Walking keys, and walking queries, in bf16 and fp16.
ROWS, ROWS_WIDE = tile_of(64, 32, 4, 2), tile_of(64, 64, 4, 2)
KEYS, KEYS_NARROW = tile_of(32, 64, 8, 2), tile_of(32, 64, 4, 2)
# Float32, walking keys and walking queries with heads of up to 64; and for wider ones.
EXACT_ROWS, EXACT_KEYS, EXACT = (tile_of(*sizes, 4, 1, tf32x3=True) for sizes in ((32, 32), (32, 16), (16, 16)))
ROWS_AMD, KEYS_AMD, EXACT_AMD = (tile_of(*sizes, 4, 1) for sizes in ((64, 32), (32, 64), (32, 32)))


def _narrow(variant: Mapping[str, Any]) -> bool:
    return variant["BLOCK_P"] <= 64


def _takes(tile: Tile, variant: Mapping[str, Any], dtype: str) -> bool:
    if tile in (ROWS_AMD, KEYS_AMD, EXACT_AMD):
        return (tile == EXACT_AMD) == (dtype == "fp32")
    if tile in (ROWS_WIDE, KEYS_NARROW, EXACT_ROWS, EXACT_KEYS):
        return _narrow(variant)
    return tile != EXACT or not _narrow(variant)


def declare(
    name: str, function: Any, signature: Mapping[str, str], variants: tuple[Mapping[str, Any], ...], *, walks: str
) -> tuple[KernelSpec, KernelSpec, KernelSpec]:
    """One kernel for bf16 and fp16, for float32, and for AMD; ``walks`` is "keys" or "queries"."""
    over_keys = walks == "keys"
    usual, wide_machine = (ROWS, ROWS_WIDE) if over_keys else (KEYS, KEYS_NARROW)
    exact = EXACT_ROWS if over_keys else EXACT_KEYS
    amd = ROWS_AMD if over_keys else KEYS_AMD
    shared: dict[str, Any] = {"function": function, "signature": signature, "variants": variants, "valid": _takes}

    def choose(device: Device, variant: Mapping[str, Any], dtype: str) -> Tile:
        return wide_machine if device.target == "sm_90" and _narrow(variant) else usual

    return (
        KernelSpec(
            name=f"sparse_attention.{name}",
            tiles=(usual, wide_machine),
            dtypes=("bf16", "fp16"),
            matrix_units=("bf16", "fp16"),
            devices=lambda device: device.backend == "cuda",
            choose=choose,
            **shared,
        ),
        KernelSpec(
            name=f"sparse_attention.{name}_float32",
            tiles=(exact, EXACT),
            dtypes=("fp32",),
            matrix_units=("fp32",),
            warpgroup=False,
            devices=lambda device: device.backend == "cuda",
            choose=lambda device, variant, dtype: exact if _narrow(variant) else EXACT,
            **shared,
        ),
        KernelSpec(
            name=f"sparse_attention.{name}_amd",
            tiles=(amd, EXACT_AMD),
            matrix_units=("bf16", "fp16", "fp32"),
            devices=lambda device: device.backend == "hip",
            choose=lambda device, variant, dtype: EXACT_AMD if dtype == "fp32" else amd,
            **shared,
        ),
    )


def declared(specs: tuple[KernelSpec, ...], device: Device, dtype: str) -> KernelSpec:
    """The declaration that serves a device and a dtype."""
    return next(s for s in specs if dtype in s.dtypes and (s.devices is None or s.devices(device)))
