"""The public functions of softmax attention: equation, checks, casts and dispatch."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmodels import backends
from seqmodels.layout import Layout
from seqmodels.ops.attention.cpu import fits
from seqmodels.ops.registration import Operator, cast_inputs, state_dtype

_PACKAGE = "seqmodels.ops.attention"
_HAS_FLASH = importlib.util.find_spec("flash_attn") is not None
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    bidirectional: bool = False,
    pinned: int = 0,
    scale: float | None = None,
    layout: Layout | None = None,
    key_cache: Tensor | None = None,
    value_cache: Tensor | None = None,
    position: Tensor | None = None,
) -> Tensor:
    r"""Softmax attention over a document and what its cache holds of the tokens before it, causal unless told.

    For the query at absolute position i of its document (``position`` of that document's first
    token here, plus the index), with j over the same document's positions:

    .. code-block:: text

        y_i = sum_j p_ij v_j,   p_i = softmax_j(scale * q_i . k_j) over max(0, i - window + 1) <= j <= i

    so ``window`` is the number of visible keys, the token itself included; None: all. With ``pinned`` the
    keys at j < pinned are seen beside them (attention sinks, arXiv:2309.17453). Query head
    h of H reads key head h * G // H. flash-attn's window (a, 0) is ``window = a + 1`` here.
    With ``bidirectional`` the sum is over |i - j| < window, 2 window - 1 keys: flash-attn's (a, a).

    Memory is linear in the length on every path but ``reference`` and the last one named here. On the
    CPU causal float32 rows of up to 512 tokens have C++ kernels (backend "cpu"); longer rows, documents
    and windows go by blocks through PyTorch's CPU flash attention, under that name too.
    On a GPU: PyTorch's attention for the dense case, flash-attn (backend "cuda") where it is
    installed, else FlexAttention (backend "triton"). Neither takes float64 or heads below 16 wide; these,
    and backend "torch" there, go under one mask of all scores, whose memory grows with the square.

    Args:
        q: (batch, length, H, head_dim). k, v: (batch, length, G, head_dim); G divides H.
        window: visible keys, at least 1; on either side, the token itself included, when bidirectional.
        bidirectional: see later tokens of the document too; there are no caches then.
        pinned: first tokens of a document that every later one sees, whatever the window.
        scale: 1 / sqrt(head_dim) when omitted.
        layout: documents; None: one a row. Outputs at padding are zero.
        key_cache, value_cache: (documents, G, capacity, head_dim), keys as they enter the product
            (rotated), in the slots of :mod:`seqmodels.ops.attention.cache`. A windowed cache has at most
            ``pinned + window`` slots. There need be no room in them for the new tokens.
        position: (documents,) int64, tokens seen before. Given together with the caches.

    Returns:
        y (batch, length, H, head_dim). Gradients flow to q, k, v and both caches.

    Raises:
        ValueError: shapes that do not fit, a bidirectional call with caches or with pinned tokens.
        BackendUnavailable: a backend asked for by name that cannot take these tensors.
    """
    scale = _check("attention", q, k, v, 4, window, scale)
    pinned = _pinned("attention", pinned, window)
    if bidirectional and pinned:
        raise ValueError(f"attention: pinned is {pinned}, but bidirectional attention pins no tokens")
    _check_cache("attention", k, layout, window, pinned, key_cache, value_cache, position)
    if bidirectional and key_cache is not None:
        raise ValueError(
            "attention: bidirectional attention takes no caches, since the tokens in them would have to see these; "
            "give the whole document in one call"
        )
    q, k, v = cast_inputs(q, k, v)
    backend = backends.requested_backend()
    starts, lengths = (None, None) if layout is None else (layout.starts, layout.lengths)
    arguments = (q, k, v, key_cache, value_cache, position, starts, lengths, window, scale, bidirectional, pinned)
    whole = window is None and layout is None and key_cache is None
    if whole and not bidirectional and q.device.type == "cpu" and backend in ("auto", "cpu") and fits(q):
        return _operator.overload(*arguments, backend)[0]
    if whole and backend not in ("reference", "triton"):
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=not bidirectional,
            scale=scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return y.transpose(1, 2)
    if q.device.type == "cuda" and backend != "reference":
        return _on_gpu(q, k, v, key_cache, value_cache, position, layout, window, scale, bidirectional, pinned, backend)
    if backend in ("cuda", "triton"):
        raise backends.BackendUnavailable(
            f"attention: backend {backend!r} was asked for, but q is on {q.device.type!r}"
        )
    return _operator.overload(*arguments, "torch" if backend == "cpu" else backend)[0]


@torch.no_grad()
def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    position: Tensor,
    *,
    window: int | None = None,
    pinned: int = 0,
    scale: float | None = None,
) -> Tensor:
    """One token of :func:`attention`: writes k and v into their slot, then attends.

    Both caches change in place; ``position`` does not (advance it once all layers that share it
    have run). No gradient; on a GPU nothing is read on the host.

    Args:
        q: (batch, H, head_dim). k, v: (batch, G, head_dim).
        key_cache, value_cache: (batch, G, capacity, head_dim), contiguous.
        position: (batch,) int64, tokens each row has seen before this one.
        window, pinned, scale: as in :func:`attention`.

    Returns:
        y (batch, H, head_dim).

    Raises:
        ValueError: shapes that do not fit, or (on the CPU) a full cache; on a GPU that is a device assertion.
    """
    scale = _check("attention_step", q, k, v, 3, window, scale)
    pinned = _pinned("attention_step", pinned, window)
    _check_cache("attention_step", k, None, window, pinned, key_cache, value_cache, position)
    if not (key_cache.is_contiguous() and value_cache.is_contiguous()):
        raise ValueError("attention_step: a cache is not contiguous and cannot be updated in place; clone the state")
    # In the cache's dtype, under autocast too: casting one token is cheaper than casting a cache.
    tokens = (tensor.to(key_cache.dtype) for tensor in (q, k, v))
    return _step_operator(*tokens, key_cache, value_cache, position, window, scale, pinned).to(q.dtype)


def _on_gpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_cache: Tensor | None,
    value_cache: Tensor | None,
    position: Tensor | None,
    layout: Layout | None,
    window: int | None,
    scale: float,
    bidirectional: bool,
    pinned: int,
    backend: str,
) -> Tensor:
    from seqmodels.ops.attention import flash, flex, masked

    rest = (key_cache, value_cache, position, layout, window, scale, bidirectional, pinned)
    flash_refusal = (
        flash.refusal(q, key_cache, pinned) if _HAS_FLASH else "flash-attn is not installed; pip install flash-attn"
    )
    flex_refusal = flex.refusal(q) if _HAS_TRITON else "Triton is not installed; pip install 'triton>=3.6'"
    if backend == "cpu":
        flash_refusal = flex_refusal = f"q is on {q.device.type!r}"
    if flash_refusal is None and backend in ("auto", "cuda"):
        return flash.forward(q, k, v, layout, window, scale, bidirectional)
    if flex_refusal is None and backend in ("auto", "triton"):
        return flex.forward(q, k, v, *rest)
    if backend in ("cuda", "triton", "cpu"):
        reason = flash_refusal if backend == "cuda" else flex_refusal
        raise backends.BackendUnavailable(f"attention: backend {backend!r} was asked for, but {reason}")
    if backend == "auto" and not torch.compiler.is_compiling():
        reasons = (f"not 'cuda': {flash_refusal}", f"not 'triton': {flex_refusal}")
        backends.announce("attention", "cuda", "torch", reasons)
    return masked.forward(q, k, v, *rest)


def _check(owner: str, q: Tensor, k: Tensor, v: Tensor, dims: int, window: int | None, scale: float | None) -> float:
    shape = "(batch, length, heads, head_dim)" if dims == 4 else "(batch, heads, head_dim)"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != dims:
            raise ValueError(f"{owner}: {name} has shape {tuple(tensor.shape)}; expected {shape}")
    if k.shape != v.shape or q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{owner}: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together; "
            f"expected {shape} that differ in q's heads only"
        )
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{owner}: {q.shape[-2]} query heads are not a multiple of {k.shape[-2]} key heads")
    if not (q.dtype == k.dtype == v.dtype) or not q.is_floating_point():
        raise TypeError(f"{owner}: q is {q.dtype}, k {k.dtype} and v {v.dtype}; expected one floating-point dtype")
    if window is not None and window < 1:
        raise ValueError(f"{owner}: window is {window}; expected at least 1 (the token itself), or None for all")
    return 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)


def _pinned(owner: str, pinned: int, window: int | None) -> int:
    """Without a window every token is seen, pinned or not."""
    if isinstance(pinned, bool) or not isinstance(pinned, int) or pinned < 0:
        raise ValueError(f"{owner}: pinned is {pinned!r}; expected a number of tokens, 0 for none")
    return 0 if window is None else pinned


def _check_cache(
    owner: str,
    k: Tensor,
    layout: Layout | None,
    window: int | None,
    pinned: int,
    key_cache: Tensor | None,
    value_cache: Tensor | None,
    position: Tensor | None,
) -> None:
    if key_cache is None and value_cache is None and position is None:
        return
    if key_cache is None or value_cache is None or position is None:
        raise ValueError(f"{owner}: key_cache, value_cache and position go together; got only some of them")
    documents = k.shape[0] if layout is None else layout.num_documents
    capacity = key_cache.shape[2] if key_cache.dim() == 4 else 0
    expected = (documents, k.shape[-2], capacity, k.shape[-1])
    if capacity < 1 or key_cache.shape != expected or value_cache.shape != expected:
        raise ValueError(
            f"{owner}: caches have shapes {tuple(key_cache.shape)} and {tuple(value_cache.shape)}; expected "
            f"({documents}, {k.shape[-2]}, capacity, {k.shape[-1]}) (documents, key heads, capacity, head_dim)"
        )
    if position.shape != (documents,) or position.dtype != torch.int64:
        raise ValueError(
            f"{owner}: position is {tuple(position.shape)} {position.dtype}; expected ({documents},) torch.int64"
        )
    if window is not None and capacity > window + pinned:
        beside = f" beside {pinned} pinned tokens" if pinned else ""
        raise ValueError(
            f"{owner}: the cache has {capacity} slots for a window of {window}{beside}; "
            f"expected at most {window + pinned}"
        )


def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=state_dtype(q.dtype))


_operator = Operator(
    "attention",
    "Tensor q, Tensor k, Tensor v, Tensor? key_cache, Tensor? value_cache, Tensor? position, "
    "Tensor? starts, Tensor? lengths, int? window, float scale, bool bidirectional, int pinned",
    outputs=2,
    residuals=1,
    keep_outputs=True,
    fake=_fake,
    modules={"reference": f"{_PACKAGE}.reference", "torch": f"{_PACKAGE}.torch", "cpu": f"{_PACKAGE}.cpu"},
    differentiable=(0, 1, 2, 3, 4),
)
_step_operator = Operator(
    "attention_step",
    "Tensor q, Tensor k, Tensor v, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor position, "
    "int? window, float scale, int pinned",
    outputs=1,
    fake=lambda q, *_: q.new_empty(q.shape),
    modules={
        "reference": f"{_PACKAGE}.reference_step",
        "torch": f"{_PACKAGE}.torch_step",
        "cpu": f"{_PACKAGE}.cpu_step",
    },
)
