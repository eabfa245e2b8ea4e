"""Launches of feature attention's kernels: sizes, tiles, segments, and what the audit compiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from seqmodels.ops.feature_attention.maps import feature_width
from seqmodels.ops.feature_attention.triton_gradient import _gradient
from seqmodels.ops.feature_attention.triton_scan import _combine, _scan
from seqmodels.ops.kernels import KernelSpec, dtype_name
from seqmodels.ops.linear_attention.triton_scan import COMBINE, _operand
from seqmodels.ops.linear_attention.triton_scan import _combine as _combine_unscaled
from seqmodels.ops.tiles import Device, Tile, device_properties

MAX_WIDTH, MAX_TAYLOR, MAX_DEPTH = 64, 16, 128
CHUNK = 64  # a multiple of every tile's tokens: segments end between tiles of all passes


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def sizes(feature_map: str, depth: int, width: int, value_dim: int, columns: int, heads: int) -> dict[str, Any]:
    """Constants that all passes share."""
    taylor = feature_map == "taylor"
    return {
        "FEATURE_MAP": "relu" if feature_map == "t2r" else feature_map,
        "HEADS": heads, "KEY_DIM": depth, "WIDTH": width, "VALUE_DIM": value_dim,
        "FEATURES": feature_width(feature_map, width), "STATE_COLUMNS": columns,
        "BLOCK_K": 32 if taylor and depth <= 32 else _block(depth), "BLOCK_U": 32 if taylor else _block(width),
    }  # fmt: skip


def of_scan(shared: Mapping[str, Any]) -> dict[str, Any]:
    """The scan holds Hedgehog's halves apart."""
    name, block = shared["FEATURE_MAP"], shared["BLOCK_U"]
    return {
        "PARTS": 3 if name == "taylor" else 1 + name.startswith("hedgehog"),
        "BLOCK_F": 64 if name == "taylor" else block,
    }


def of_gradient(shared: Mapping[str, Any]) -> dict[str, Any]:
    """The gradient holds them in one tile."""
    name, block = shared["FEATURE_MAP"], shared["BLOCK_U"]
    if name == "taylor":
        return {"PARTS": 3, "BLOCK_F": 64}
    return {"PARTS": 1, "BLOCK_F": block * (1 + name.startswith("hedgehog"))}


# ---- declarations for the audit

_WEIGHTS = ("query_weight", "key_weight")


def _declared(
    feature_map: str, depth: int, width: int, value_dim: int, *, weight: bool, decay: bool = False,
    packed: bool = False, normalize: bool = True, reverse: bool = False, outputs: bool = True, gradient: bool = False,
) -> dict[str, Any]:  # fmt: skip
    shared = sizes(feature_map, depth, width, value_dim, value_dim + normalize, 32)
    found = shared | (of_gradient if gradient else of_scan)(shared)
    found |= {"QUERY_HEADS": 32, "KEY_HEADS": 32, "REVERSE": reverse, "MASKED": packed}
    absent = set() if packed else {"starts", "lengths"}
    if not weight:
        absent |= {*_WEIGHTS}
    if not decay:
        absent |= {"log_decay"}
    if feature_map != "hedgehog_exp":
        absent |= {"scale_in", "offset"}
    if not normalize:
        absent |= {"lane"}
    if gradient:
        absent |= set() if weight else {"weight_gradient"}
        absent |= set() if decay else {"dot_out"}
        return found | dict.fromkeys(absent)
    found["NORMALIZE"] = normalize and not reverse
    if feature_map != "hedgehog_exp":
        absent |= {"scale_out"}
    if not reverse:
        absent |= {"lane", "offset"}
    if not found["NORMALIZE"]:
        absent |= {"denominator"}
    if not outputs:
        absent |= {"query", "query_weight", "output", "denominator"}
    if outputs or not decay:
        absent |= {"decay_out"}
    return found | dict.fromkeys(absent)


_HEDGEHOG = ("hedgehog_split", 64, 64, 64)
_LOLCATS = ("hedgehog_split", 128, 64, 128)
_BASED = ("taylor", 16, 16, 64)
_EXP = ("hedgehog_exp", 64, 64, 64)
_SCANS = (
    _declared(*_BASED, weight=False),
    _declared(*_BASED, weight=False, outputs=False),
    _declared(*_BASED, weight=False, reverse=True),
    _declared(*_BASED, weight=False, decay=True),
    _declared(*_BASED, weight=False, packed=True),
    _declared(*_HEDGEHOG, weight=True),
    _declared(*_HEDGEHOG, weight=True, outputs=False),
    _declared(*_HEDGEHOG, weight=True, reverse=True),
    _declared(*_HEDGEHOG, weight=True, decay=True),
    _declared(*_EXP, weight=True),
    _declared(*_EXP, weight=True, reverse=True),
    _declared(*_EXP, weight=True, packed=True),
    _declared("hedgehog_joint", 64, 64, 64, weight=True),
    _declared(*_LOLCATS, weight=True),
    _declared("elu", 64, 64, 64, weight=False),
    _declared("relu", 64, 64, 64, weight=True),
    _declared("identity", 64, 64, 64, weight=False, normalize=False),
)
_GRADIENTS = (
    _declared(*_BASED, weight=False, gradient=True),
    _declared(*_BASED, weight=False, gradient=True, reverse=True),
    _declared(*_BASED, weight=False, gradient=True, decay=True),
    _declared(*_BASED, weight=False, gradient=True, packed=True),
    _declared(*_HEDGEHOG, weight=True, gradient=True),
    _declared(*_HEDGEHOG, weight=True, gradient=True, reverse=True),
    _declared(*_HEDGEHOG, weight=True, gradient=True, decay=True),
    _declared(*_EXP, weight=True, gradient=True),
    _declared(*_EXP, weight=True, gradient=True, reverse=True),
    _declared(*_EXP, weight=True, gradient=True, packed=True),
    _declared("hedgehog_joint", 64, 64, 64, weight=True, gradient=True),
    _declared(*_LOLCATS, weight=True, gradient=True),
    _declared("elu", 64, 64, 64, weight=False, gradient=True),
    _declared("relu", 64, 64, 64, weight=True, gradient=True),
    _declared("identity", 64, 64, 64, weight=False, normalize=False, gradient=True),
)
_POINTERS = {
    **dict.fromkeys(_WEIGHTS, "*{dtype}"),
    **dict.fromkeys(("log_decay", "lane", "offset", "state_in", "scale_in"), "*fp32"),
    **dict.fromkeys(("starts", "lengths"), "*i64"),
    **dict.fromkeys(("length", "num_segments", "segment_length"), "i64"),
}
_SCAN_POINTERS = _POINTERS | {
    **dict.fromkeys(("query", "key", "value", "output"), "*{dtype}"),
    **dict.fromkeys(("state_out", "scale_out", "decay_out", "denominator"), "*fp32"),
    "epsilon": "fp32",
}
_GRADIENT_POINTERS = _POINTERS | {
    **dict.fromkeys(("query", "key", "left", "right", "query_gradient"), "*{dtype}"),
    **dict.fromkeys(("weight_gradient", "dot_out"), "*fp32"),
    "total_rows": "i64",
}
_KEYS = dict.fromkeys(("query", "key"), "tensordesc<{dtype}[1, 1, {BLOCK_M}, {BLOCK_K}]>")
_VALUES = "tensordesc<{dtype}[1, 1, {BLOCK_M}, {BLOCK_V}]>"


def tile_of(rows: int, columns: int, num_warps: int, num_stages: int, *, tma: bool = True) -> Tile:
    constants = {"BLOCK_M": rows, "BLOCK_V": columns, "TMA": int(tma)}
    return Tile(constants, num_warps=num_warps, num_stages=num_stages)


# The widest that fits 255 registers. Taylor's three blocks of states need eight warps, and its decays the least tile;
# exponentials that walk back to front, or carry two more vectors a block, half the values.
WIDE, NARROW, SHORT, THIN = tile_of(64, 32, 4, 2), tile_of(64, 16, 8, 2), tile_of(32, 32, 4, 2), tile_of(32, 16, 4, 2)
TAYLOR, LEAST = tile_of(64, 32, 8, 2), tile_of(16, 16, 4, 2)


def _scan_tile(variant: Mapping[str, Any]) -> Tile:
    name, reverse, decay = variant["FEATURE_MAP"], variant["REVERSE"], "log_decay" not in variant
    crowded = reverse and (decay or variant["MASKED"])
    if name == "taylor":
        if decay or crowded or variant["BLOCK_K"] > 32:
            return LEAST
        return NARROW if reverse else TAYLOR
    if not name.startswith("hedgehog"):
        return SHORT if decay or crowded or variant["BLOCK_K"] > 64 else WIDE
    if crowded or (reverse and name == "hedgehog_exp") or (decay and variant["MASKED"]):
        return THIN
    return SHORT if reverse or decay or name == "hedgehog_joint" or variant["BLOCK_K"] > 64 else WIDE


DEEP, HALF, TALL = tile_of(16, 64, 4, 2), tile_of(16, 32, 4, 2), tile_of(32, 64, 8, 2)


def _gradient_tile(variant: Mapping[str, Any]) -> Tile:
    if variant["FEATURE_MAP"] != "taylor":
        return TALL
    return HALF if "log_decay" not in variant or variant["MASKED"] or variant["BLOCK_K"] > 32 else DEEP


def _is_hopper(device: Device) -> bool:
    """Where these tiles were sized: products of Blackwell leave through tensor memory, and registers do not suffice."""
    return device.backend == "cuda" and 90 <= int(device.architecture) < 100


SCAN = KernelSpec(
    name="feature_attention.scan",
    function=_scan,
    signature=_SCAN_POINTERS | _KEYS | {"value": _VALUES},
    tiles=(WIDE, NARROW, SHORT, THIN, TAYLOR, LEAST),
    variants=_SCANS,
    dtypes=("bf16", "fp16"),
    matrix_units=("bf16", "fp16"),
    choose=lambda device, variant, dtype: _scan_tile(variant),
    valid=lambda tile, variant, dtype: tile == _scan_tile(variant),
    devices=_is_hopper,
)
GRADIENT = KernelSpec(
    name="feature_attention.gradient",
    function=_gradient,
    signature=_GRADIENT_POINTERS | _KEYS | dict.fromkeys(("left", "right"), _VALUES),
    tiles=(DEEP, HALF, TALL),
    variants=_GRADIENTS,
    dtypes=("bf16", "fp16"),
    matrix_units=("bf16", "fp16"),
    choose=lambda device, variant, dtype: _gradient_tile(variant),
    valid=lambda tile, variant, dtype: tile == _gradient_tile(variant),
    devices=_is_hopper,
)
# mma.sync and mfma: operands in registers, where a right-hand one stands once in every warp. The smallest tiles.
SMALL, SMALL_FOUR = tile_of(16, 16, 8, 1, tma=False), tile_of(16, 16, 4, 1, tma=False)


def _is_small(device: Device) -> bool:
    if device.backend == "hip":
        return device.architecture == "gfx942"
    return int(device.architecture) == 80 or 100 <= int(device.architecture) < 120


def _takes_taylor(device: Device) -> bool:
    """On sm_80 the three blocks of states beside a mean exceed 255 registers by 8 to 24 bytes with 2, 4 and 8 warps."""
    return _is_hopper(device) or (_is_small(device) and device.target != "sm_80")


def _choose_small(device: Device, variant: Mapping[str, Any], dtype: str) -> Tile:
    """Four warps have twice the registers on AMD; elsewhere eight, but where the operands of eight are copies."""
    if variant["FEATURE_MAP"] == "taylor":
        plain = "log_decay" in variant and not variant["REVERSE"]
        return SMALL_FOUR if device.backend == "hip" or plain else SMALL
    return SMALL_FOUR if variant["FEATURE_MAP"] == "hedgehog_split" and variant.get("NORMALIZE") and (
        device.target == "sm_80" and "log_decay" in variant and variant["BLOCK_K"] <= 64
    ) else SMALL  # fmt: skip


def _small(name: str, function: Any, signature: Mapping[str, str], variants: Any, devices: Any) -> KernelSpec:
    return KernelSpec(
        name=f"feature_attention.{name}", function=function, signature=signature, tiles=(SMALL, SMALL_FOUR),
        variants=variants, dtypes=("bf16", "fp16"), matrix_units=("bf16", "fp16"), choose=_choose_small,
        devices=devices,
    )  # fmt: skip


def _taylors(variants: tuple[dict[str, Any], ...], wanted: bool) -> tuple[dict[str, Any], ...]:
    return tuple(variant for variant in variants if (variant["FEATURE_MAP"] == "taylor") == wanted)


SCAN_SMALL = _small("scan_small", _scan, _SCAN_POINTERS, _taylors(_SCANS, False), _is_small)
SCAN_SMALL_TAYLOR = _small(
    "scan_small_taylor", _scan, _SCAN_POINTERS, _taylors(_SCANS, True),
    lambda device: _takes_taylor(device) and not _is_hopper(device),
)  # fmt: skip
GRADIENT_SMALL = _small("gradient_small", _gradient, _GRADIENT_POINTERS, _taylors(_GRADIENTS, False), _is_small)
GRADIENT_SMALL_TAYLOR = _small(
    "gradient_small_taylor", _gradient, _GRADIENT_POINTERS, _taylors(_GRADIENTS, True), SCAN_SMALL_TAYLOR.devices
)
CHAIN = KernelSpec(
    name="feature_attention.combine",
    function=_combine,
    signature={
        **dict.fromkeys(("local", "local_scale", "initial", "initial_scale", "entering", "entering_scale"), "*fp32"),
        **dict.fromkeys(("final", "final_scale"), "*fp32"),
        "num_segments": "i64",
        "heads": "i32",
    },
    tiles=(Tile({"BLOCK": 1024}, num_warps=4),),
    variants=tuple({"FEATURES": 128, "STATE_COLUMNS": 65, "REVERSE": reverse} for reverse in (False, True)),
    dtypes=("fp32",),
)
KERNELS = [SCAN, GRADIENT, SCAN_SMALL, SCAN_SMALL_TAYLOR, GRADIENT_SMALL, GRADIENT_SMALL_TAYLOR, CHAIN]


def _spec(device: Device, feature_map: str, gradient: bool) -> KernelSpec:
    if _is_hopper(device):
        return GRADIENT if gradient else SCAN
    if feature_map == "taylor":
        return GRADIENT_SMALL_TAYLOR if gradient else SCAN_SMALL_TAYLOR
    return GRADIENT_SMALL if gradient else SCAN_SMALL


def refusal(k: Tensor, v: Tensor, key_weight: Tensor | None, feature_map: str) -> str | None:
    """Why the kernels cannot take such arguments, or None."""
    if v.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"it computes in bfloat16, float16 or float32, not {v.dtype}"
    if v.dtype == torch.float32 and v.device.type != "cpu":
        return "three TF32 products for one of bfloat16 exceed its registers in float32; it takes bfloat16 and float16"
    device = device_properties(v.device.index)
    if not (_takes_taylor(device) if feature_map == "taylor" else _is_hopper(device) or _is_small(device)):
        return f"its tiles for {feature_map} do not fit the registers of {device.target}, or were never compiled for it"
    depth = k.shape[-1]
    width = depth if key_weight is None else key_weight.shape[-1]
    widest = MAX_TAYLOR if feature_map == "taylor" else MAX_WIDTH
    if width > widest or depth > MAX_DEPTH:
        return (
            f"its tiles hold inputs up to {MAX_DEPTH} wide mapped to widths up to {widest} for {feature_map}, "
            f"not {depth} and {width}"
        )
    if v.shape[0] * v.shape[1] >= 2**31:
        return f"it counts tokens in 32 bits; {tuple(v.shape[:2])} (batch, length) are too many"
    return None


# ---- launches


class Side(NamedTuple):
    """Queries or keys: (batch, length, groups, D), and their map (heads, D, f) in the same dtype."""

    x: Tensor
    weight: Tensor | None


class Scanned(NamedTuple):
    """What a scan gives: y (batch, length, heads, P), the state and its scale behind it, divisors."""

    output: Tensor
    state: Tensor
    log_scale: Tensor | None
    denominators: Tensor | None

    def initial_gradient(self, initial_log_scale: Tensor | None) -> Tensor:
        """Of a scan back to front: the gradient of the initial state, which is relative to its own scale."""
        if self.log_scale is None or initial_log_scale is None:
            return self.state
        return self.state * (initial_log_scale + self.log_scale).exp()[..., None]


class Gradients(NamedTuple):
    """Of one side: x (batch, length, heads, D), its map, and phi . dphi of what decays (batch, length, heads)."""

    x: Tensor
    weight: Tensor | None
    dots: Tensor | None


class Entering(NamedTuple):
    """States before each segment (documents x segments, ...), and behind the last."""

    state: Tensor | None
    scale: Tensor | None
    final: Tensor | None
    final_scale: Tensor | None


@dataclass
class Problem:
    """What every pass over one call's tokens shares."""

    shape: tuple[int, int, int]  # batch, length, heads
    shared: dict[str, Any]
    log_decay: Tensor | None
    starts: Tensor | None
    lengths: Tensor | None
    epsilon: float
    device: Device
    dtype: torch.dtype

    @classmethod
    def of(
        cls, v: Tensor, k: Tensor, key_weight: Tensor | None, log_decay: Tensor | None, starts: Tensor | None,
        lengths: Tensor | None, feature_map: str, normalize: bool, epsilon: float,
    ) -> Problem:  # fmt: skip
        batch_size, length, heads, value_dim = v.shape
        width = k.shape[-1] if key_weight is None else key_weight.shape[-1]
        shared = sizes(feature_map, k.shape[-1], width, value_dim, value_dim + normalize, heads)
        decay = None if log_decay is None else log_decay.contiguous()
        device = device_properties(v.device.index)
        return cls((batch_size, length, heads), shared, decay, starts, lengths, epsilon, device, v.dtype)

    def side(self, x: Tensor, weight: Tensor | None) -> Side:
        return Side(x, None if weight is None else weight.to(self.dtype).contiguous())

    @property
    def documents(self) -> int:
        return self.shape[0] if self.starts is None else self.starts.shape[0]

    @property
    def state_shape(self) -> tuple[int, int, int]:
        return self.shape[2], self.shared["FEATURES"], self.shared["STATE_COLUMNS"]

    @property
    def segments(self) -> tuple[int, int]:
        """(number, length): two programs a multiprocessor; less than four chunks are not worth a state."""
        length, heads = self.shape[1:]
        blocks = triton.cdiv(self.shared["VALUE_DIM"], 32)
        wanted = min(
            2 * self.device.multiprocessors // (blocks * heads * self.documents), triton.cdiv(length, 4 * CHUNK)
        )
        segment_length = triton.cdiv(triton.cdiv(length, max(wanted, 1)), CHUNK) * CHUNK
        return triton.cdiv(length, segment_length), segment_length

    def _empty(self, like: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
        """Output over all tokens; zero where documents may leave padding."""
        return (torch.empty if self.starts is None else torch.zeros)(shape, dtype=dtype, device=like.device)

    def _operands(self, tile: Tile, keys: tuple[Tensor | None, ...], values: tuple[Tensor, ...]) -> list[Any]:
        rows, columns = tile.constants["BLOCK_M"], tile.constants["BLOCK_V"]
        if not tile.constants["TMA"]:
            return [None if x is None else x.contiguous() for x in (*keys, *values)]
        wide = [(x, self.shared["BLOCK_K"]) for x in keys] + [(x, columns) for x in values]
        return [
            None if x is None else _operand(x.unsqueeze(2), rows, width, self.starts is not None) for x, width in wide
        ]

    def _launch_scan(
        self, queries: Side | None, keys: Side, value: Tensor, *, segments: tuple[int, int], reverse: bool,
        normalize: bool, **tensors: Tensor | None,
    ) -> None:  # fmt: skip
        variant = self.shared | of_scan(self.shared) | {
            "QUERY_HEADS": 1 if queries is None else queries.x.shape[2], "KEY_HEADS": keys.x.shape[2],
            "REVERSE": reverse, "NORMALIZE": normalize, "MASKED": self.starts is not None,
        }  # fmt: skip
        spec = _spec(self.device, self.shared["FEATURE_MAP"], gradient=False)
        absent = {name: None for name in ("output", "log_decay") if tensors.get(name, self.log_decay) is None}
        tile = spec.tile(self.device, variant | absent, dtype_name(self.dtype))
        query, key, values = self._operands(tile, (None if queries is None else queries.x, keys.x), (value,))
        blocks = triton.cdiv(self.shared["VALUE_DIM"], tile.constants["BLOCK_V"])
        names = ("output", "log_decay", "lane", "offset", "state_in", "scale_in", "state_out", "scale_out", "decay_out")
        given = {"log_decay": self.log_decay} | tensors
        _scan[(blocks * self.shape[2] * self.documents * segments[0],)](
            query, key, values, None if queries is None else queries.weight, keys.weight,
            *(given.get(name) for name in (*names, "denominator")),
            self.starts, self.lengths, self.shape[1], *segments, self.epsilon,
            **variant, **tile.launch(),
        )  # fmt: skip

    def entering(
        self, keys: Side, value: Tensor, state: Tensor | None, scale: Tensor | None, *, lane: Tensor | None = None,
        offset: Tensor | None = None, reverse: bool = False,
    ) -> Entering:  # fmt: skip
        """States at the segments' starts (their ends in reverse); one segment starts from the state given."""
        state = None if state is None else state.contiguous()
        scale = None if scale is None else scale.contiguous()
        segments = self.segments[0]
        if segments == 1:
            return Entering(state, scale, None, None)
        slots, heads = self.documents * segments, self.shape[2]
        exponential = self.shared["FEATURE_MAP"] == "hedgehog_exp"
        local = value.new_empty((slots, *self.state_shape), dtype=torch.float32)
        local_scale = local.new_empty(local.shape[:-1]) if exponential else None
        decay = None if exponential else local.new_zeros((slots, heads))
        normalize = lane is None and self.shared["STATE_COLUMNS"] > self.shared["VALUE_DIM"]
        self._launch_scan(
            None, keys, value, segments=self.segments, reverse=reverse, normalize=normalize, lane=lane, offset=offset,
            state_out=local, scale_out=local_scale, decay_out=None if self.log_decay is None else decay,
        )  # fmt: skip
        entering, final = torch.empty_like(local), local.new_empty((self.documents, *self.state_shape))
        columns = self.shared["FEATURES"] * self.shared["STATE_COLUMNS"]
        if not exponential:
            tile = COMBINE.tiles[0]
            _combine_unscaled[(self.documents * heads * triton.cdiv(columns, tile.constants["BLOCK"]),)](
                local, decay, state, entering, final, segments, heads, columns, REVERSE=reverse, **tile.launch()
            )
            return Entering(entering, None, final, None)
        tile = CHAIN.tiles[0]
        assert local_scale is not None
        entering_scale, final_scale = torch.empty_like(local_scale), final.new_empty(final.shape[:-1])
        sizes = {"FEATURES": self.shared["FEATURES"], "STATE_COLUMNS": self.shared["STATE_COLUMNS"]}
        _combine[(self.documents * heads * triton.cdiv(columns, tile.constants["BLOCK"]),)](
            local, local_scale, state, scale, entering, entering_scale, final, final_scale, segments, heads,
            **sizes, REVERSE=reverse, **tile.launch(),
        )  # fmt: skip
        return Entering(entering, entering_scale, final, final_scale)

    def scan(
        self, queries: Side | None, keys: Side, value: Tensor, start: Entering, *, normalize: bool = False,
        lane: Tensor | None = None, offset: Tensor | None = None, reverse: bool = False,
    ) -> Scanned:  # fmt: skip
        """Outputs (none without queries) and the state behind the walk."""
        output = self._empty(value, self.dtype, *self.shape, self.shared["VALUE_DIM"]) if queries is not None else None
        denominators = self._empty(value, torch.float32, *self.shape) if normalize and queries is not None else None
        final, final_scale = start.final, start.final_scale
        if final is None:
            final = value.new_empty((self.documents, *self.state_shape), dtype=torch.float32)
            if self.shared["FEATURE_MAP"] == "hedgehog_exp":
                final_scale = final.new_empty(final.shape[:-1])
        alone = start.final is None
        if queries is not None or alone:
            self._launch_scan(
                queries, keys, value, segments=self.segments, reverse=reverse, normalize=normalize, output=output,
                lane=lane, offset=offset, state_in=start.state, scale_in=start.scale,
                state_out=final if alone else None, scale_out=final_scale if alone else None, denominator=denominators,
            )  # fmt: skip
        return Scanned(output if output is not None else final.new_empty(0), final, final_scale, denominators)

    def gradient(
        self, queries: Side, keys: Side, left: Tensor, right: Tensor, start: Entering, *, lane: Tensor | None,
        offset: Tensor | None, reverse: bool = False,
    ) -> Gradients:  # fmt: skip
        """Gradients of ``queries`` (of the keys in reverse) and of their map."""
        variant = self.shared | of_gradient(self.shared) | {
            "QUERY_HEADS": queries.x.shape[2], "KEY_HEADS": keys.x.shape[2], "REVERSE": reverse,
            "MASKED": self.starts is not None,
        }  # fmt: skip
        spec = _spec(self.device, self.shared["FEATURE_MAP"], gradient=True)
        absent = {"log_decay": None} if self.log_decay is None else {}
        tile = spec.tile(self.device, variant | absent, dtype_name(self.dtype))
        operands = self._operands(tile, (queries.x, keys.x), (left, right))
        blocks = triton.cdiv(self.shared["VALUE_DIM"], tile.constants["BLOCK_V"])
        segments = self.segments
        programs = blocks * self.shape[2] * self.documents * segments[0]
        depth, width = self.shared["KEY_DIM"], self.shared["WIDTH"]
        shares = torch.float32 if blocks > 1 else self.dtype
        x = self._empty(left, shares, blocks, *self.shape, depth)
        dots = None if self.log_decay is None else self._empty(left, torch.float32, blocks, *self.shape)
        halves = 2 if variant["FEATURE_MAP"].startswith("hedgehog") else 1
        weight = None
        if queries.weight is not None:
            weight = left.new_empty((programs, halves, width, depth), dtype=torch.float32)
        _gradient[(programs,)](
            *operands, queries.weight, keys.weight, x, weight, dots, self.log_decay, lane, offset,
            start.state, start.scale,
            self.starts, self.lengths, self.shape[1], *segments, self.shape[0] * self.shape[1],
            **variant, **tile.launch(),
        )  # fmt: skip
        if weight is not None:
            # Programs stand as (document and segment, head, block of values); the second half is that of -W.
            weight = weight.view(-1, self.shape[2], blocks, halves, width, depth).sum((0, 2))
            weight = (weight[:, 0] - weight[:, 1] if halves == 2 else weight[:, 0]).transpose(1, 2)
        return Gradients(x.sum(0).to(self.dtype) if blocks > 1 else x[0], weight, None if dots is None else dots.sum(0))
