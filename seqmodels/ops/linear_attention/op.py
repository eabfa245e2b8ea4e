"""The public functions of linear attention: equation, checks, casts and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.ops.registration import Operator, cast_inputs, state_dtype

_PACKAGE = "seqmodels.ops.linear_attention"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    past_weight: Tensor | None = None,
    diagonal_weight: Tensor | None = None,
    initial_state: Tensor | None = None,
    normalize: bool = False,
    epsilon: float = 1e-6,
    layout: Layout | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    r"""Linear attention with a per-head scalar decay.

    With c the inclusive running sum of ``log_decay`` from the document's first token on, and S_0
    its initial state, for each head:

    .. code-block:: text

        y_i = sum_{j<i} e^{c_i - c_j} (q_i . k_j) past_j v_j + diagonal_i (q_i . k_i) v_i + e^{c_i} q_i S_0
        S   = e^{c_L} S_0 + sum_j e^{c_L - c_j} past_j k_j v_j^T

    which is the recurrence S_t = e^{g_t} S_{t-1} + past_t k_t v_t^T read by q. With R ranks,
    products with k and v sum over the key side's ranks, and y has one row for each rank of q.
    With ``normalize`` every v carries a further entry 1, and y is divided by that column plus
    ``epsilon``. This covers Mamba-2 (specs: SSD), Mamba-3 SISO and MIMO, RetNet and plain,
    Hedgehog, Based and prefix linear attention (their feature maps applied to q and k before).

    Args:
        q: (batch, length, [R,] Gq, N). Head h of H uses group h * Gq // H.
        k: (batch, length, [R,] Gk, N).
        v: (batch, length, [R,] Gv, P). H is the largest of Gq, Gk, Gv; each divides it.
        log_decay: (batch, length, H), at most 0 (below -1000 is -1000: nothing is left). None: no decay.
        past_weight: (batch, length, H), weight of a token for all later ones. None: 1.
        diagonal_weight: (batch, length, H), weight of a token for itself. None: 1.
        initial_state: (documents, H, N, P), or (documents, H, N, P + 1) with ``normalize``, whose
            last column is the normaliser; float32 (float64 beside float64 inputs). None: zero.
        normalize: divide by the accumulated weights. Needs q . k >= 0 to be a mean.
        epsilon: added to the divisor.
        layout: documents; one state row for each. None: one document a row.
        chunk_size: rows (tokens x ranks) of one tile; a speed knob of the PyTorch form.

    Returns:
        y of v's dtype, (batch, length, [R,] H, P), zero outside documents, and the final state
        in the shape and dtype of ``initial_state``. Accumulated in float32 (float64).

    Raises:
        ValueError: shapes that do not fit together. TypeError: mixed or unsupported dtypes.
    """
    q, k, v = cast_inputs(q, k, v)
    ranked = q.dim() == 5
    if not ranked:
        _check_rank_of_tensors(q, k, v, 4, "(batch, length, groups, width)")
        q, k, v = q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2)
    _check_rank_of_tensors(q, k, v, 5, "(batch, length, ranks, groups, width)")
    if chunk_size < 1:
        raise ValueError(f"linear_attention: chunk_size is {chunk_size}; expected a positive integer")
    if q.shape[1] < 1:
        raise ValueError(f"linear_attention: q has length 0 (shape {tuple(q.shape)}); expected at least one token")
    v = _check_inputs("linear_attention", q, k, v)
    batch_size, length, heads = v.shape[0], v.shape[1], v.shape[3]
    log_decay, past_weight, diagonal_weight = _weights(
        "linear_attention", (batch_size, length, heads), v.dtype, log_decay, past_weight, diagonal_weight
    )
    starts, lengths = (None, None) if layout is None else (layout.starts, layout.lengths)
    if layout is not None and (layout.batch_size, layout.length) != (batch_size, length):
        raise ValueError(
            f"linear_attention: layout is for a grid of {(layout.batch_size, layout.length)}; "
            f"q is {(batch_size, length)} (batch, length)"
        )
    documents = batch_size if layout is None else layout.num_documents
    if initial_state is not None:
        _check_state("initial_state", initial_state, _state_shape(documents, q, v, normalize), v.dtype)
    y, final_state, _ = _operator(
        q, k, v, log_decay, past_weight, diagonal_weight, initial_state, starts, lengths, normalize, epsilon, chunk_size
    )
    return (y if ranked else y.squeeze(2)), final_state


@torch.no_grad()
def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    *,
    past_weight: Tensor | None = None,
    diagonal_weight: Tensor | None = None,
    normalize: bool = False,
    epsilon: float = 1e-6,
) -> Tensor:
    """One token of :func:`linear_attention`; updates ``state`` in place, no gradient.

    Args:
        q, k: (batch, [R,] G, N). v: (batch, [R,] Gv, P).
        log_decay, past_weight, diagonal_weight: (batch, H) or None.
        state: (batch, H, N, P), or P + 1 with ``normalize``; contiguous; float32 (float64 beside
            float64 inputs).

    Returns:
        y (batch, [R,] H, P) of v's dtype.
    """
    q, k, v = cast_inputs(q, k, v)
    ranked = q.dim() == 4
    if not ranked:
        _check_rank_of_tensors(q, k, v, 3, "(batch, groups, width)")
        q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
    _check_rank_of_tensors(q, k, v, 4, "(batch, ranks, groups, width)")
    v = _check_inputs("linear_attention_step", q, k, v)
    batch_size, heads = v.shape[0], v.shape[2]
    log_decay, past_weight, diagonal_weight = _weights(
        "linear_attention_step", (batch_size, heads), v.dtype, log_decay, past_weight, diagonal_weight
    )
    _check_state("state", state, _state_shape(batch_size, q, v, normalize), v.dtype)
    if not state.is_contiguous():
        raise ValueError("linear_attention_step: state is not contiguous and cannot be updated in place; clone it")
    y = _step_operator(q, k, v, log_decay, past_weight, diagonal_weight, state, normalize, epsilon)
    return y if ranked else y.squeeze(1)


def _state_shape(documents: int, q: Tensor, v: Tensor, normalize: bool) -> tuple[int, int, int, int]:
    return (documents, v.shape[-2], q.shape[-1], v.shape[-1] + int(normalize))


def _check_rank_of_tensors(q: Tensor, k: Tensor, v: Tensor, dims: int, shape: str) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != dims:
            raise ValueError(
                f"linear_attention: {name} has shape {tuple(tensor.shape)}; expected {dims} dimensions {shape}. "
                "The rank axis is there for all of q, k and v, or for none."
            )


def _check_inputs(owner: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Refuses q, k, v that do not fit together; returns v with one entry for each head."""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
        raise TypeError(
            f"{owner}: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; expected one floating-point dtype for all three"
        )
    if q.shape[:-2] != k.shape[:-2] or q.shape[:-2] != v.shape[:-2] or q.shape[-1] != k.shape[-1]:
        raise ValueError(
            f"{owner}: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together; "
            "expected equal batch, length and ranks, and equal key width in q and k"
        )
    heads = max(q.shape[-2], k.shape[-2], v.shape[-2])
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.shape[-2] < 1 or heads % tensor.shape[-2]:
            raise ValueError(f"{owner}: {name} has {tensor.shape[-2]} groups, which do not divide the {heads} heads")
    return v if v.shape[-2] == heads else v.repeat_interleave(heads // v.shape[-2], dim=-2)


def _weights(owner: str, shape: tuple[int, ...], dtype: torch.dtype, *weights: Tensor | None) -> list[Tensor | None]:
    """Per-head weights in the state's dtype; refuses other shapes."""
    result: list[Tensor | None] = []
    for name, weight in zip(("log_decay", "past_weight", "diagonal_weight"), weights, strict=True):
        if weight is not None and weight.shape != shape:
            axes = "(batch, length, heads)" if len(shape) == 3 else "(batch, heads)"
            raise ValueError(f"{owner}: {name} has shape {tuple(weight.shape)}; expected {shape} {axes}")
        result.append(None if weight is None else weight.to(state_dtype(dtype)))
    return result


def _check_state(name: str, state: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if state.shape != shape or state.dtype != state_dtype(dtype):
        raise ValueError(
            f"linear_attention: {name} is {tuple(state.shape)} {state.dtype}; expected {shape} {state_dtype(dtype)} "
            "(documents, heads, key width, value width; one wider with normalize)"
        )


def _fake(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and what y was divided by: (batch, length, R, H), empty without ``normalize``."""
    starts, normalize = rest[4], bool(rest[6])
    documents = starts.shape[0] if isinstance(starts, Tensor) else v.shape[0]
    state = v.new_empty(_state_shape(documents, q, v, normalize), dtype=state_dtype(v.dtype))
    denominator = state.new_empty(v.shape[:-1] if normalize else 0)
    return torch.empty_like(v, memory_format=torch.contiguous_format), state, denominator


_operator = Operator(
    "linear_attention",
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? past_weight, Tensor? diagonal_weight, "
    "Tensor? initial_state, Tensor? starts, Tensor? lengths, bool normalize, float epsilon, SymInt chunk_size",
    outputs=3,
    residuals=1,
    keep_outputs=True,
    fake=_fake,
    modules={
        "reference": f"{_PACKAGE}.reference",
        "torch": f"{_PACKAGE}.torch",
        "cpu": f"{_PACKAGE}.cpu",
        "triton": f"{_PACKAGE}.triton",
    },
    differentiable=(0, 1, 2, 3, 4, 5, 6),
)
_step_operator = Operator(
    "linear_attention_step",
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? past_weight, Tensor? diagonal_weight, "
    "Tensor(a!) state, bool normalize, float epsilon",
    outputs=1,
    fake=lambda q, k, v, *rest: torch.empty_like(v, memory_format=torch.contiguous_format),
    modules={
        "reference": f"{_PACKAGE}.reference_step",
        "torch": f"{_PACKAGE}.torch_step",
        "cpu": f"{_PACKAGE}.cpu_step",
    },
)
