"""The public functions of sparse global attention: equation, checks, dispatch and one step."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from seqmodels import backends
from seqmodels.layout import Layout
from seqmodels.ops.registration import Operator, cast_inputs, state_dtype
from seqmodels.ops.sparse_attention import reference
from seqmodels.ops.sparse_attention.selection import block_tables
from seqmodels.ops.sparse_attention.state import SparseCache, all_scores, universe

_PACKAGE = "seqmodels.ops.sparse_attention"


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor,
    *,
    window: int,
    num_globals: int,
    block: int,
    scale: float | None = None,
    cache: SparseCache | None = None,
    layout: Layout | None = None,
) -> Tensor:
    r"""Softmax attention over a local window and the best-scored tokens of earlier blocks (specs: Hydra, section 2).

    For the query at position t of its document, in block b = floor(t / block):

    .. code-block:: text

        local   = {j : t - window < j <= t}
        global  = the num_globals best of {j : j < b block} by score_j, earlier first where equal, without local
        y_t     = sum_j softmax_j(scale q_t . k_j + [j in global] log sigmoid(score_j)) v_j   over both

    Later tokens never change an earlier choice. The bias is the scores' only gradient. With
    ``num_globals`` of at least the length it is full causal attention with biased far keys.

    Args:
        q: (batch, length, H, head_dim). k, v: (batch, length, G, head_dim); G divides H.
        scores: (batch, length), float32 (float64 beside float64).
        window: visible neighbours, the token itself included; at least ``block``.
        num_globals: tokens chosen for each block, 0 or more.
        block: queries that share a choice.
        scale: 1 / sqrt(head_dim) when omitted.
        cache: what came before, see :class:`SparseCache`. None: the documents begin here.
        layout: documents; None: one a row. Outputs at padding are zero.

    Backend "cpu" goes by blocks through PyTorch's own kernels; there is no C++ of ours in it. "triton" reads the keys
    where they are, in bfloat16, float16 and float32 with heads of up to 128; "torch" gathers each block's keys.

    Returns:
        y (batch, length, H, head_dim). Memory is linear in the length; gradients flow to q, k, v,
        scores and the cache.

    Raises:
        ValueError: shapes that do not fit; a window below the block, whose tokens would fall out of the
            window before they can be chosen.
    """
    owner = "sparse_attention"
    q, k, v = cast_inputs(q, k, v)
    _check(owner, q, k, v, scores, window, num_globals, block)
    if layout is not None and (layout.batch_size, layout.length) != scores.shape:
        raise ValueError(
            f"{owner}: layout is for a grid of {(layout.batch_size, layout.length)}; "
            f"scores are {tuple(scores.shape)} (batch, length)"
        )
    documents = q.shape[0] if layout is None else layout.num_documents
    if cache is not None:
        _check_cache(owner, cache, documents, k, window, num_globals, block)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    starts, lengths = (None, None) if layout is None else (layout.starts, layout.lengths)
    if layout is not None:
        # The derivative of log sigmoid at NaN times no gradient is NaN.
        scores = torch.where(layout.valid, scores, 0)
    if backends.requested_backend() == "reference":
        return reference.forward(q, k, v, scores, cache, starts, lengths, window, num_globals, block, scale)
    tables = block_tables(scores.detach(), starts, lengths, cache, window, num_globals, block)
    keys = universe(k, *((None, None) if cache is None else (cache.key, cache.global_key)))
    values = universe(v, *((None, None) if cache is None else (cache.value, cache.global_value)))
    bias = logsigmoid(all_scores(scores, cache))
    return _operator(q, keys, values, bias, *tables[:5], window, scale)[0]


@torch.no_grad()
def sparse_attention_step(
    q: Tensor, k: Tensor, v: Tensor, score: Tensor, cache: SparseCache, *, scale: float | None = None
) -> Tensor:
    """One token of :func:`sparse_attention`; every tensor of ``cache`` changes in place, no gradient.

    Nothing is read on the host on a GPU: the choice at a block's edge is a mask there.

    Args:
        q: (batch, H, head_dim). k, v: (batch, G, head_dim). score: (batch,).

    Returns:
        y (batch, H, head_dim).
    """
    window, num_globals, block = cache.key.shape[2], cache.global_score.shape[1], cache.recent_score.shape[1]
    _check("sparse_attention_step", q, k, v, score, window, num_globals, block)
    _check_cache("sparse_attention_step", cache, q.shape[0], k, window, num_globals, block)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    tokens = (x.to(cache.key.dtype) for x in (q, k, v))  # casting one token is cheaper than casting a cache
    return _step_operator(*tokens, score.to(cache.recent_score.dtype), *cache, scale).to(q.dtype)


def _check(
    owner: str, q: Tensor, k: Tensor, v: Tensor, scores: Tensor, window: int, num_globals: int, block: int
) -> None:
    shape = "(batch, length, heads, head_dim)" if scores.dim() == 2 else "(batch, heads, head_dim)"
    rank = scores.dim() + 2
    if q.dim() != rank or k.shape != v.shape or q.shape[:-2] != k.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{owner}: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together; "
            f"expected {shape} that differ in q's heads only"
        )
    if scores.shape != q.shape[:-2]:
        raise ValueError(f"{owner}: scores are {tuple(scores.shape)}; expected {tuple(q.shape[:-2])}, one for a token")
    if q.shape[-2] % k.shape[-2]:
        raise ValueError(f"{owner}: {q.shape[-2]} query heads are not a multiple of {k.shape[-2]} key heads")
    if scores.dtype != state_dtype(q.dtype):
        raise TypeError(f"{owner}: scores are {scores.dtype}; expected {state_dtype(q.dtype)} beside q of {q.dtype}")
    if block < 1 or num_globals < 0:
        raise ValueError(f"{owner}: block is {block} and num_globals {num_globals}; expected at least 1 and 0")
    if window < block:
        raise ValueError(
            f"{owner}: window is {window} and block {block}; expected a window of at least a block, since a block's "
            "tokens are chosen when it ends and must still be kept then"
        )


def _check_cache(
    owner: str, cache: SparseCache, documents: int, k: Tensor, window: int, num_globals: int, block: int
) -> None:
    heads, head_dim = k.shape[-2:]
    expected = {
        "key": (documents, heads, window, head_dim),
        "value": (documents, heads, window, head_dim),
        "position": (documents,),
        "recent_score": (documents, block),
        "global_key": (documents, heads, num_globals, head_dim),
        "global_value": (documents, heads, num_globals, head_dim),
        "global_score": (documents, num_globals),
        "global_position": (documents, num_globals),
    }
    for name, shape in expected.items():
        found = tuple(getattr(cache, name).shape)
        if found != shape:
            raise ValueError(f"{owner}: cache.{name} is {found}; expected {shape}")


_operator = Operator(
    "sparse_attention",
    "Tensor q, Tensor keys, Tensor values, Tensor bias, Tensor token, Tensor position, Tensor local_source, "
    "Tensor global_source, Tensor global_position, int window, float scale",
    outputs=2,
    residuals=1,
    keep_outputs=True,
    fake=lambda q, *_: (q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=state_dtype(q.dtype))),
    modules={
        "reference": f"{_PACKAGE}.reference_blocks",
        **{name: f"{_PACKAGE}.{name}" for name in ("torch", "cpu", "triton")},
    },
    differentiable=(0, 1, 2, 3),
)
_step_operator = Operator(
    "sparse_attention_step",
    "Tensor q, Tensor k, Tensor v, Tensor score, Tensor(a!) key, Tensor(b!) value, Tensor(c!) position, "
    "Tensor(d!) recent_score, Tensor(e!) global_key, Tensor(f!) global_value, Tensor(g!) global_score, "
    "Tensor(h!) global_position, float scale",
    outputs=1,
    fake=lambda q, *_: q.new_empty(q.shape),
    modules={name: f"{_PACKAGE}.torch_step" for name in ("reference", "torch", "cpu", "triton")},  # one way
)
