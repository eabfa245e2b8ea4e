"""The public functions: equation, checks, casts and dispatch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.ops.registration import Operator, cast_inputs, state_dtype

_PACKAGE = "seqmodels.ops.window_linear_attention"
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def window_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Tensor,
    factor: Tensor,
    *,
    window: int,
    scale: float | None = None,
    layout: Layout | None = None,
    key_cache: Tensor | None = None,
    value_cache: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    r"""Softmax attention over a sliding window and a linear attention over what came before it, under one normaliser.

    For each head, over i - window < j <= i of the same document, with s_ij = scale q_i . k_j,
    c_i = max_j s_ij, the head's factor f, and past_i = [n_i, z_i]:

    .. code-block:: text

        y_i = (f sum_j e^{s_ij - c_i} v_j + n_i) / (f sum_j e^{s_ij - c_i} + z_i)

    The past is not scaled by e^{-c_i} (LoLCATs, arXiv:2410.10254, equation 6, as published), so its weight
    depends on c_i. It is what an unnormalised linear attention reads of the tokens j <= i - window: the
    values' sum weighted by phi(q_i) . phi(k_j), and the sum of the weights; see
    :func:`~seqmodels.ops.window_linear_attention.evicted_tokens`. Without a past (the window holds the
    whole document) y is softmax attention for every f > 0.

    Args:
        q: (batch, length, H, head_dim). k: (batch, length, G, head_dim). v: (batch, length, G, value_dim). Query
            head h reads key head h * G // H.
        past: (batch, length, H, value_dim + 1), its last column at least 0.
        factor: (H,) f, at least 0.
        window: visible keys, the token itself included.
        scale: 1 / sqrt(head_dim) when omitted.
        layout: documents; None: one a row. Outputs at padding are zero.
        key_cache, value_cache: rings (documents, G, window, width) of the tokens before; slot p mod window holds
            position p.
        position: (documents,) int64, tokens seen before. Given together with the rings.

    Returns:
        y (batch, length, H, value_dim) in q's dtype; differentiable in all of q, k, v, past, factor and rings.
        Memory of its own is linear in the length.

    Raises:
        ValueError: shapes that do not fit together. TypeError: mixed or unsupported dtypes.
    """
    owner = "window_linear_attention"
    q, k, v = cast_inputs(q, k, v)
    scale = _check(owner, q, k, v, past, factor, 4, scale)
    if isinstance(window, bool) or window < 1:
        raise ValueError(f"{owner}: window is {window!r}; expected at least 1, the token itself")
    starts, lengths, documents = None, None, q.shape[0]
    if layout is not None:
        if (layout.batch_size, layout.length) != q.shape[:2]:
            raise ValueError(
                f"{owner}: layout is for a grid of {(layout.batch_size, layout.length)}; "
                f"q is {tuple(q.shape[:2])} (batch, length)"
            )
        starts, lengths, documents = layout.starts, layout.lengths, layout.num_documents
    given = [tensor is not None for tensor in (key_cache, value_cache, position)]
    if any(given) and not all(given):
        raise ValueError(f"{owner}: key_cache, value_cache and position go together; got only some of them")
    if key_cache is not None and value_cache is not None and position is not None:
        _check_rings(owner, k, v, key_cache, value_cache, position, documents, window)
    wide = state_dtype(q.dtype)
    arguments = (q, k, v, past.to(wide), factor.to(wide), key_cache, value_cache, position, starts, lengths)
    return _operator(*arguments, window, scale)[0]


@torch.no_grad()
def window_linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Tensor,
    factor: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    position: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """One token of :func:`window_linear_attention`: writes k and v into slot ``position`` mod window, then attends.

    Both rings change in place; ``position`` does not. What was in the slot has left the window: read it
    before, for ``past``. No gradient; nothing is read on the host.

    Args:
        q: (batch, H, head_dim). k: (batch, G, head_dim). v: (batch, G, value_dim).
        past: (batch, H, value_dim + 1). factor: (H,).
        key_cache, value_cache: (batch, G, window, width), contiguous.
        position: (batch,) int64, tokens each row has seen before this one.

    Returns:
        y (batch, H, value_dim) in q's dtype.
    """
    owner = "window_linear_attention_step"
    scale = _check(owner, q, k, v, past, factor, 3, scale)
    window = key_cache.shape[2] if key_cache.dim() == 4 else 0
    _check_rings(owner, k, v, key_cache, value_cache, position, q.shape[0], window)
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        raise ValueError(f"{owner}: a ring is not contiguous and cannot be updated in place; clone the state")
    # In the ring's dtype, under autocast too: casting one token is cheaper than casting a ring.
    tokens = (tensor.to(key_cache.dtype) for tensor in (q, k, v))
    wide = state_dtype(key_cache.dtype)
    rings = (key_cache, value_cache, position)
    return _step_operator(*tokens, past.to(wide), factor.to(wide), *rings, scale).to(q.dtype)


def _check(
    owner: str, q: Tensor, k: Tensor, v: Tensor, past: Tensor, factor: Tensor, dims: int, scale: float | None
) -> float:
    axes = "(batch, length, heads, width)" if dims == 4 else "(batch, heads, width)"
    for name, tensor in (("q", q), ("k", k), ("v", v), ("past", past)):
        if tensor.dim() != dims or tensor.shape[:-2] != q.shape[:-2] or 0 in tensor.shape:
            raise ValueError(
                f"{owner}: {name} has shape {tuple(tensor.shape)}; expected {axes}, "
                f"the same {axes[1:-1].rpartition(', heads')[0]} as q's {tuple(q.shape)}, and no axis of size 0"
            )
    heads, groups = q.shape[-2], k.shape[-2]
    if q.shape[-1] != k.shape[-1] or v.shape[-2] != groups:
        raise ValueError(
            f"{owner}: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together; expected "
            "one head width in q and k, and as many heads in k as in v"
        )
    if heads % groups:
        raise ValueError(f"{owner}: {heads} query heads are not a multiple of {groups} key heads")
    if past.shape[-2:] != (heads, v.shape[-1] + 1):
        raise ValueError(
            f"{owner}: past has shape {tuple(past.shape)}; expected {heads} heads of {v.shape[-1]} value entries and "
            "one for the normaliser"
        )
    if factor.shape != (heads,):
        raise ValueError(f"{owner}: factor has shape {tuple(factor.shape)}; expected ({heads},), one for each head")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
        raise TypeError(f"{owner}: q is {q.dtype}, k {k.dtype} and v {v.dtype}; expected one floating-point dtype")
    return 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)


def _check_rings(
    owner: str,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    position: Tensor,
    documents: int,
    window: int,
) -> None:
    for name, ring, token in (("key_cache", key_cache, k), ("value_cache", value_cache, v)):
        expected = (documents, k.shape[-2], window, token.shape[-1])
        if ring.shape != expected or window < 1 or ring.dtype != key_cache.dtype:
            raise ValueError(
                f"{owner}: {name} is {tuple(ring.shape)} {ring.dtype}; expected {expected} "
                "(documents, key heads, window, width), both rings in one dtype"
            )
    if position.shape != (documents,) or position.dtype != torch.int64:
        raise ValueError(
            f"{owner}: position is {tuple(position.shape)} {position.dtype}; expected ({documents},) torch.int64"
        )


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """y, and what it was divided by (batch, length, H)."""
    return q.new_empty((*q.shape[:3], v.shape[-1])), q.new_empty(q.shape[:3], dtype=state_dtype(q.dtype))


_operator = Operator(
    "window_linear_attention",
    "Tensor q, Tensor k, Tensor v, Tensor past, Tensor factor, Tensor? key_cache, Tensor? value_cache, "
    "Tensor? position, Tensor? starts, Tensor? lengths, SymInt window, float scale",
    outputs=2,
    residuals=1,
    keep_outputs=True,
    fake=_fake,
    # The blocks are PyTorch's own matrix products, so that "cpu" asked for by name means them too.
    modules={"reference": f"{_PACKAGE}.reference", "torch": f"{_PACKAGE}.torch", "cpu": f"{_PACKAGE}.torch"},
    differentiable=(0, 1, 2, 3, 4, 5, 6),
)
_step_operator = Operator(
    "window_linear_attention_step",
    "Tensor q, Tensor k, Tensor v, Tensor past, Tensor factor, Tensor(a!) key_cache, Tensor(b!) value_cache, "
    "Tensor position, float scale",
    outputs=1,
    fake=lambda q, k, v, *rest: q.new_empty((*q.shape[:2], v.shape[-1])),
    modules={
        "reference": f"{_PACKAGE}.reference_step",
        "torch": f"{_PACKAGE}.torch_step",
        "cpu": f"{_PACKAGE}.cpu_step",
    },
)
