"""Small random problems of every op that has GPU kernels.

The canary runs them at the first use on an unknown GPU, the GPU check with guarded memory, and
``seqmodels tune`` at a larger size. Sizes are odd on purpose: partial chunks, one-token documents,
padding, unused document slots, grouped heads, several ranks, strided rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Arguments = tuple[Any, ...]


@dataclass
class Draw:
    """A source of random tensors of one dtype on one device; the global generator is left alone.

    Attributes:
        dtype: of the matrix inputs; decays and states are float32.
        batch, length: the grid.
    """

    dtype: torch.dtype
    device: torch.device | str
    batch: int = 2
    length: int = 131
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return self.wide(*shape, scale=scale).to(self.dtype)

    def wide(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Float32 whatever the dtype: what recurrence parameters and carried states are."""
        return (scale * torch.randn(shape, generator=self.generator)).to(self.device)

    def log_decay(self, *shape: int) -> Tensor:
        """From almost no decay to e^-5 a token."""
        return -F.softplus(3 * self.wide(*shape) - 3)

    def documents(self) -> tuple[Tensor, Tensor]:
        """Starts and lengths: a document of one token, one behind it up to padding, a full row, an unused slot."""
        size, length = self.batch * self.length, self.length
        first = [(0, 1), (1, length - 4)] if length > 5 else [(0, length)]
        spans = [*first, *((row * length, length) for row in range(1, self.batch)), (size, 0)]
        starts, lengths = ([span[part] for span in spans] for part in (0, 1))
        return torch.tensor(starts, device=self.device), torch.tensor(lengths, device=self.device)


def _linear_attention(draw: Draw) -> list[Arguments]:
    grid = (draw.batch, draw.length)
    starts, lengths = draw.documents()
    slots = len(starts)

    def qkv(ranks: int, groups: int, heads: int, width: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
        q, k = (draw.normal(*grid, ranks, groups, width, scale=width**-0.25) for _ in range(2))
        return q, k, draw.normal(*grid, ranks, heads, head)

    def weights(heads: int) -> tuple[Tensor, Tensor, Tensor]:
        past, diagonal = (torch.sigmoid(draw.wide(*grid, heads)) for _ in range(2))
        return draw.log_decay(*grid, heads), past, diagonal

    q, k, v = qkv(1, 1, 2, 32, 32)
    normalized = (q.abs(), k.abs(), v, None, None, None, None, None, None, True, 1e-6, 64)
    return [
        (*qkv(1, 1, 4, 128, 64), draw.log_decay(*grid, 4), None, None, None, None, None, False, 1e-6, 64),
        (
            *qkv(1, 2, 4, 64, 64), *weights(4), draw.wide(slots, 4, 64, 64), starts, lengths, False, 1e-6, 64,
        ),
        (*qkv(4, 1, 2, 32, 16), *weights(2), None, starts, lengths, False, 1e-6, 64),
        normalized,
    ]  # fmt: skip


def _linear_attention_step(draw: Draw) -> list[Arguments]:
    batch, heads, width, head = draw.batch, 4, 128, 64
    q, k = (draw.normal(batch, 1, 1, width, scale=width**-0.25) for _ in range(2))
    v, state = draw.normal(batch, 1, heads, head), draw.wide(batch, heads, width, head)
    return [(q, k, v, draw.log_decay(batch, heads), None, None, state, False, 1e-6)]


def _feature_attention(draw: Draw) -> list[Arguments]:
    grid = (draw.batch, draw.length)
    documents = draw.documents()
    slots = len(documents[0])

    def qkv(heads: int, width: int, head: int) -> tuple[Tensor, Tensor, Tensor]:
        return draw.normal(*grid, heads, width), draw.normal(*grid, heads, width), draw.normal(*grid, heads, head)

    def maps(heads: int, width: int, mapped: int) -> tuple[Tensor, Tensor]:
        query, key = (draw.wide(heads, width, mapped, scale=width**-0.5) for _ in range(2))
        return query, key

    def state(count: int, heads: int, features: int, head: int) -> Tensor:
        """Values of either sign, and the positive sum of weights of a mean."""
        return torch.cat([draw.wide(count, heads, features, head), 1 + draw.wide(count, heads, features, 1).abs()], -1)

    def taylor_state(count: int, heads: int, features: int, head: int) -> Tensor:
        """A mean's state of one token whose key is zero: only the constant feature has a weight."""
        first = (torch.arange(features, device=draw.device) == 0)[:, None]
        return torch.where(first, state(count, heads, features, head), 0.0)

    grouped = draw.normal(*grid, 1, 16)
    return [
        (*qkv(2, 16, 64), None, None, None, taylor_state(draw.batch, 2, 153, 64), None, None, None,
         "taylor", True, 1e-6, 64),
        (*qkv(2, 16, 64), None, None, draw.log_decay(*grid, 2), taylor_state(slots, 2, 153, 64), None, *documents,
         "taylor", True, 1e-6, 64),
        (*qkv(2, 64, 64), *maps(2, 64, 64), None, state(slots, 2, 128, 64),
         draw.wide(slots, 2, 128), *documents, "hedgehog_exp", True, 0.0, 64),
        (*qkv(2, 128, 96), *maps(2, 128, 64), draw.log_decay(*grid, 2), None, None, None, None,
         "hedgehog_split", True, 1e-6, 64),
        (*qkv(2, 24, 40), *maps(2, 24, 12), None, state(draw.batch, 2, 24, 40), None, None, None,
         "hedgehog_joint", True, 1e-6, 64),
        (grouped, grouped.roll(1, 1), draw.normal(*grid, 2, 40), None, None, draw.log_decay(*grid, 2), None, None,
         *documents, "elu", True, 1e-6, 64),
        # Maps that the inputs' dtype holds exactly: a relu's gradient jumps where rounding changes the sign of u.
        (*qkv(2, 24, 32), *(weight.to(draw.dtype).float() for weight in maps(2, 24, 32)), None, None, None, None, None,
         "t2r", False, 1e-6, 64),
    ]  # fmt: skip


def _feature_state(draw: Draw) -> list[Arguments]:
    """The same problems without their queries."""
    found: list[Arguments] = []
    for _, k, v, _, weight, decay, state, scale, starts, lengths, name, normalize, _, chunk in _feature_attention(draw):
        found.append((k, v, weight, decay, state, scale, starts, lengths, name, normalize, chunk))
    return found


def _feature_attention_step(draw: Draw) -> list[Arguments]:
    """The first tokens of the same problems, one sequence a document, from a state or from nothing."""
    found: list[Arguments] = []
    for q, k, v, query_weight, key_weight, decay, state, scale, _, _, name, normalize, epsilon, _ in _feature_attention(
        draw
    ):
        if state is None:
            continue
        token_decay = None if decay is None else decay[:, 0]
        rows = (state[: draw.batch].contiguous(), None if scale is None else scale[: draw.batch].contiguous())
        found.append(
            (q[:, 0], k[:, 0], v[:, 0], query_weight, key_weight, token_decay, *rows, name, normalize, epsilon)
        )
    return found


def _short_conv(draw: Draw) -> list[Arguments]:
    starts, lengths = draw.documents()
    found: list[Arguments] = []
    for channels, width, silu, packed in ((200, 4, True, False), (64, 3, False, True), (128, 1, True, False)):
        x = draw.normal(draw.batch, draw.length, channels + 8)[..., :channels]  # strided rows: part of a projection
        weight, bias = draw.normal(channels, width, scale=0.5), draw.normal(channels)
        slots = len(starts) if packed else draw.batch
        state = draw.wide(slots, width - 1, channels)
        documents = (starts, lengths) if packed else (None, None)
        found.append((x, weight, bias if silu else None, state, *documents, silu))
    return found


def _short_conv_step(draw: Draw) -> list[Arguments]:
    found: list[Arguments] = []
    for channels, width, silu in ((200, 4, True), (64, 3, False), (128, 1, True)):
        weight, bias = draw.normal(channels, width, scale=0.5), draw.normal(channels)
        state = draw.wide(draw.batch, width - 1, channels)
        found.append((draw.normal(draw.batch, channels), weight, bias if silu else None, state, silu))
    return found


def _mamba3(draw: Draw) -> list[Arguments]:
    return [_mamba3_case(draw, ranks=1, state=128, packed=False), _mamba3_case(draw, ranks=4, state=64, packed=True)]


def _mamba3_case(draw: Draw, *, ranks: int, state: int, packed: bool) -> Arguments:
    grid, heads, width, angles = (draw.batch, draw.length), 4, 64, state // 4
    starts, lengths = draw.documents() if packed else (None, None)
    slots = draw.batch if starts is None else len(starts)
    dt = F.softplus(draw.wide(*grid, heads) - 3)
    mixes = [draw.wide(heads, ranks, width, scale=1 / ranks) if ranks > 1 else None for _ in range(3)]
    carried = (
        draw.wide(slots, heads, angles),
        draw.wide(slots, heads, width, state),
        draw.wide(slots, ranks, heads, state),
        draw.wide(slots, heads, width),
    )
    return (
        draw.normal(*grid, heads, width),
        draw.normal(*grid, ranks, 1, state),
        draw.normal(*grid, ranks, 1, state),
        draw.normal(*grid, heads, width),
        dt,
        -dt * (1 + draw.wide(*grid, heads).abs()),
        torch.sigmoid(draw.wide(*grid, heads)),
        dt,
        torch.pi * torch.tanh(draw.wide(*grid, angles)),
        1 + draw.wide(state, scale=0.1),
        1 + draw.wide(state, scale=0.1),
        1 + draw.wide(heads, ranks, state, scale=0.1),
        1 + draw.wide(heads, ranks, state, scale=0.1),
        1 + draw.wide(heads, scale=0.1),
        *mixes,
        None,
        *carried,
        starts,
        lengths,
        "adjacent",
        1e-5,
        64,
    )


def _mamba3_step(draw: Draw) -> list[Arguments]:
    heads, width, found = 4, 64, []
    for ranks, state, pairing in ((1, 128, "adjacent"), (4, 64, "half")):
        angles, keys = state // 4, ranks * state
        found.append(
            (
                draw.normal(draw.batch, 2 * heads * width + 2 * keys + 3 * heads + angles),
                draw.wide(heads),
                *(1 + draw.wide(state, scale=0.1) for _ in "bc"),
                *(1 + draw.wide(heads, ranks, state, scale=0.1) for _ in "bc"),
                1 + draw.wide(heads, scale=0.1),
                *(draw.wide(heads, ranks, width, scale=1 / ranks) if ranks > 1 else None for _ in range(3)),
                None,
                draw.wide(draw.batch, heads, angles),
                draw.wide(draw.batch, heads, width, state),
                draw.wide(draw.batch, ranks, heads, state),
                draw.wide(draw.batch, heads, width),
                1,
                pairing,
                "heavy_tail",
                1e-4,
                "data_dependent",
                True,
                1e-5,
            )
        )
    return found


def _linear_recurrence(draw: Draw) -> list[Arguments]:
    starts, lengths = draw.documents()
    grid = (draw.batch, draw.length)
    found: list[Arguments] = []
    for channels, tail, varying, packed in ((17, (2,), False, False), (5, (2,), True, True), (7, (), True, False)):
        decay = torch.tanh(draw.wide(*(grid if varying else ()), channels, *tail)) * 0.7
        state = draw.wide(len(starts) if packed else draw.batch, channels, *tail)
        documents = (starts, lengths) if packed else (None, None)
        found.append((decay, draw.wide(*grid, channels, *tail), state, *documents))
    if draw.length > 128:  # one row long enough that time is cut into segments
        one = (1, 4 * draw.length + 1, 3, 2)
        found.append((torch.tanh(draw.wide(*one)) * 0.7, draw.wide(*one), draw.wide(1, 3, 2), None, None))
    return found


def _exponents(draw: Draw, heads: int, states: int) -> Tensor:
    """Half-lives from a few tokens to hundreds, phases of many turns a token."""
    decay = -0.2 * torch.sigmoid(4 * draw.wide(heads, states))
    return torch.stack((decay, draw.wide(heads, states, scale=30)), -1)


def _diagonal_ssm(draw: Draw) -> list[Arguments]:
    """One and two groups of modes and more, rows of c, documents, either direction."""
    starts, lengths = draw.documents()
    grid, slots = (draw.batch, draw.length), len(starts)
    found: list[Arguments] = []
    for heads, modes, rows, packed, state, reverse in (
        (9, 32, 1, False, False, False), (5, 35, 2, True, True, False), (4, 3, 1, True, False, True)
    ):  # fmt: skip
        pairs = (heads, modes, 2)
        skip = draw.wide(rows, heads) if not reverse else torch.zeros(rows, heads, device=draw.device)
        found.append(
            (
                draw.wide(*grid, heads), _exponents(draw, heads, modes).double(), draw.wide(*pairs),
                draw.wide(rows, *pairs), skip, draw.wide(slots if packed else draw.batch, *pairs) if state else None,
                *((starts, lengths) if packed else (None, None)), reverse,
            )
        )  # fmt: skip
    if draw.length > 128:  # long enough for segments
        pairs = (3, 20, 2)
        found.append(
            (
                draw.wide(1, 4 * draw.length + 1, 3), _exponents(draw, 3, 20).double(), draw.wide(*pairs),
                draw.wide(1, *pairs), draw.wide(1, 3), draw.wide(1, *pairs), None, None, False,
            )
        )  # fmt: skip
    return found


def _sparse_attention(draw: Draw) -> list[Arguments]:
    """Grouped heads and odd widths, documents, the window alone, a state in front."""
    from seqmodels.ops.sparse_attention import advance, empty
    from seqmodels.ops.sparse_attention.selection import block_tables
    from seqmodels.ops.sparse_attention.state import all_scores, universe

    found: list[Arguments] = []
    for heads, groups, width, window, num_globals, block, packed, past in (
        (4, 2, 64, 48, 21, 32, False, 0), (6, 2, 40, 16, 5, 16, True, 0), (1, 1, 128, 33, 0, 17, False, 0),
        (4, 1, 32, 40, 12, 24, False, 69),
    ):  # fmt: skip
        rows, cache = (draw.batch, draw.length), None
        k, v = (draw.normal(*rows, groups, width) for _ in range(2))
        scores = draw.wide(*rows)
        if past:
            before = (draw.batch, past)
            old_k, old_v = (draw.normal(*before, groups, width) for _ in range(2))
            start = empty(
                draw.batch, groups, width, window=window, num_globals=num_globals, block=block, device=draw.device,
                dtype=draw.dtype,
            )  # fmt: skip
            cache = advance(start, old_k, old_v, draw.wide(*before))
        documents = draw.documents() if packed else (None, None)
        found.append(
            (
                draw.normal(*rows, heads, width),
                universe(k, *((None, None) if cache is None else (cache.key, cache.global_key))),
                universe(v, *((None, None) if cache is None else (cache.value, cache.global_value))),
                F.logsigmoid(all_scores(scores, cache)),
                *block_tables(scores, *documents, cache, window, num_globals, block)[:5],
                window,
                width**-0.5,
            )
        )
    return found


def _vandermonde(draw: Draw) -> list[Arguments]:
    sizes = ((2, 3, 20), (1, 2, 64))
    return [
        (_exponents(draw, heads, states), draw.wide(rows, heads, states, 2), draw.length, 2.0)
        for rows, heads, states in sizes
    ]


def _vandermonde_adjoint(draw: Draw) -> list[Arguments]:
    sizes = ((2, 3, 20), (1, 2, 64))
    return [(_exponents(draw, heads, states), draw.wide(rows, heads, draw.length)) for rows, heads, states in sizes]


EXAMPLES: dict[str, Callable[[Draw], list[Arguments]]] = {
    "diagonal_ssm": _diagonal_ssm,
    "feature_attention": _feature_attention,
    "feature_attention_step": _feature_attention_step,
    "feature_state": _feature_state,
    "linear_attention": _linear_attention,
    "linear_attention_step": _linear_attention_step,
    "linear_recurrence": _linear_recurrence,
    "short_conv": _short_conv,
    "short_conv_step": _short_conv_step,
    "sparse_attention": _sparse_attention,
    "mamba3": _mamba3,
    "mamba3_step": _mamba3_step,
    "vandermonde": _vandermonde,
    "vandermonde_adjoint": _vandermonde_adjoint,
}
