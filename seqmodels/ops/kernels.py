"""How an op declares its Triton kernels, next to their code.

``seqmodels audit`` finds the list ``KERNELS`` of every ``ops/*/triton*.py``, compiles each entry
ahead of time and refuses kernels that nobody declared. The declaration knows nothing of the
audit. A declared kernel is launched with the tile that :meth:`KernelSpec.tile` picks, so what is
audited is what runs::

    @triton.jit(do_not_specialize=["length", "stride"])
    def _scale_kernel(x, y, length, stride, HEAD_DIM: tl.constexpr, BLOCK_L: tl.constexpr): ...

    SCALE = KernelSpec(
        name="scale.forward",
        function=_scale_kernel,
        signature={"x": "*{dtype}", "y": "*{dtype}", "length": "i64", "stride": "i64"},
        tiles=(Tile({"BLOCK_L": 64}, num_warps=4), Tile({"BLOCK_L": 32}, num_warps=2)),
        variants=({"HEAD_DIM": 64}, {"HEAD_DIM": 128}),
        matrix_units=("bf16", "fp16"),
    )
    KERNELS = [SCALE]

    def forward(x):
        tile = SCALE.tile(device_properties(x.device.index), {"HEAD_DIM": head_dim}, dtype_name(x.dtype))
        _scale_kernel[grid](x, y, length, stride, HEAD_DIM=head_dim, **tile.launch())
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from seqmodels.ops.tiles import Device, Tile, tuned_tile

TRITON_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}


def dtype_name(dtype: torch.dtype) -> str:
    """Triton's name of a floating-point dtype: ``"bf16"`` for ``torch.bfloat16``."""
    return TRITON_NAMES[dtype]


@dataclass(frozen=True, eq=False)
class KernelSpec:
    """One Triton kernel: its types, its shipped tiles and the sizes that stand for the rest.

    Attributes:
        name: ``<op>.<what it computes>``, unique: ``"short_conv.backward"``.
        function: the ``@triton.jit`` function.
        signature: type of every argument that is not constexpr, in Triton's notation; ``{dtype}``
            stands for the inputs' dtype, and the tile's and variant's constants may stand in it too:
            ``"*{dtype}"``, ``"*fp32"``, ``"*i64"``, ``"i64"``, ``"fp32"``.
            Pointers are taken to be aligned to 16 bytes, as Triton sees them at a launch.
        tiles: every shipped configuration. Without ``choose`` the first one is the default.
        variants: values of the other constexpr arguments: representative head sizes and flags, the
            most usual first. ``None`` for an argument of ``signature`` means an absent optional tensor.
        dtypes: dtypes of the inputs that are shipped.
        matrix_units: input dtypes whose ``tl.dot`` must reach the matrix units.
        warpgroup: on sm_90 those matrix instructions must be ``wgmma``. Set it to False for a kernel
            whose products have fewer than 64 rows, with a comment that says so.
        divisible: integer arguments that are always multiples of 16 and not in ``do_not_specialize``.
        choose: ``choose(device, variant, dtype) -> Tile``, one of ``tiles``: the heuristic. It must not
            look at the length.
        valid: ``valid(tile, variant, dtype) -> bool``: False for combinations that are never launched
            (a large tile with a large head); the audit and the tuner leave them out.
        devices: ``devices(device) -> bool``: False where the kernel is never launched, so that the audit does
            not compile it there. Another declaration of the same function serves the rest.
    """

    name: str
    function: Any
    signature: Mapping[str, str]
    tiles: tuple[Tile, ...]
    variants: tuple[Mapping[str, Any], ...] = ({},)
    dtypes: tuple[str, ...] = ("bf16", "fp16", "fp32")
    matrix_units: tuple[str, ...] = ()
    warpgroup: bool = True
    divisible: tuple[str, ...] = ()
    choose: Callable[[Device, Mapping[str, Any], str], Tile] | None = None
    valid: Callable[[Tile, Mapping[str, Any], str], bool] | None = None
    devices: Callable[[Device], bool] | None = None

    def __post_init__(self) -> None:
        if not self.tiles or not self.variants or not self.dtypes:
            raise ValueError(f"kernel {self.name!r} needs at least one tile, one variant and one dtype")
        unknown = set(self.matrix_units) - set(self.dtypes)
        if unknown:
            raise ValueError(
                f"kernel {self.name!r}: matrix_units names {sorted(unknown)}, which dtypes {self.dtypes} lacks"
            )
        known = {*self.signature, *self.tiles[0].constants, *self.variants[0]}
        arguments = list(getattr(self.function, "arg_names", known))
        missing = [argument for argument in arguments if argument not in known]
        extra = sorted(known - set(arguments))
        if missing or extra:
            raise ValueError(
                f"kernel {self.name!r}: the arguments are {arguments}; "
                f"the declaration lacks {missing} and names unknown {extra}"
            )

    def tile(self, device: Device, variant: Mapping[str, Any], dtype: str) -> Tile:
        """The configuration to launch with: tuned for this device if the user tuned it, else the heuristic's."""
        if _chosen is not None:
            tile = _chosen(self, variant, dtype)
            if tile is not None:
                return tile
        tuned = tuned_tile(device, self.name, variant, dtype)
        if tuned is not None and tuned in self.shipped_tiles(variant, dtype):
            return tuned
        return self.default_tile(device, variant, dtype)

    def default_tile(self, device: Device, variant: Mapping[str, Any], dtype: str) -> Tile:
        """The heuristic's configuration; the same on every run."""
        shipped = self.shipped_tiles(variant, dtype)
        tile = shipped[0] if self.choose is None else self.choose(device, variant, dtype)
        if tile not in shipped:
            raise ValueError(
                f"kernel {self.name!r}: the heuristic chose {tile.label!r} for {device.target}, {dict(variant)}, "
                f"{dtype}, which is not among the shipped tiles: {', '.join(t.label for t in shipped)}"
            )
        return tile

    def shipped_tiles(self, variant: Mapping[str, Any], dtype: str) -> tuple[Tile, ...]:
        """Every tile that may be launched for these constants and inputs."""
        if self.valid is None:
            return self.tiles
        shipped = tuple(tile for tile in self.tiles if self.valid(tile, variant, dtype))
        if not shipped:
            raise ValueError(f"kernel {self.name!r}: no tile is valid for {dict(variant)} and {dtype}")
        return shipped


Choice = Callable[["KernelSpec", Mapping[str, Any], str], "Tile | None"]
_chosen: Choice | None = None


@contextlib.contextmanager
def choosing_tiles(choice: Choice) -> Iterator[None]:
    """Inside the block ``choice(kernel, variant, dtype)`` decides every tile; None leaves it to the kernel.

    What the tuner and the test of every shipped tile use.
    """
    global _chosen
    previous, _chosen = _chosen, choice
    try:
        yield
    finally:
        _chosen = previous
