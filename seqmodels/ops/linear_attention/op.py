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
    owner = "linear_attention"
    q, k, v, (batch_size, length), ranked = _inputs(owner, ("batch", "length"), *cast_inputs(q, k, v))
    _check_grid(owner, length, chunk_size)
    shape = (batch_size, length, v.shape[3])
    log_decay = _weight(owner, "log_decay", log_decay, shape, v.dtype)
    past_weight = _weight(owner, "past_weight", past_weight, shape, v.dtype)
    diagonal_weight = _weight(owner, "diagonal_weight", diagonal_weight, shape, v.dtype)
    starts, lengths, documents = _documents(owner, layout, batch_size, length)
    if initial_state is not None:
        _check_state(owner, "initial_state", initial_state, _state_shape(documents, q, v, normalize), v.dtype)
    y, final_state, _ = _operator(
        q, k, v, log_decay, past_weight, diagonal_weight, initial_state, starts, lengths, normalize, epsilon, chunk_size
    )
    return (y if ranked else y.squeeze(2)), final_state


def linear_attention_state(
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    past_weight: Tensor | None = None,
    initial_state: Tensor | None = None,
    normalize: bool = False,
    layout: Layout | None = None,
    chunk_size: int = 64,
) -> Tensor:
    r"""The state that :func:`linear_attention` ends with, without its queries and outputs.

    .. code-block:: text

        S = e^{c_L} S_0 + sum_j e^{c_L - c_j} past_j k_j v_j^T

    An encoder's keys and values become the initial state of a decoder this way (prefix linear
    attention, arXiv:2407.05483, section 4.2). Differentiable.

    Args: those of :func:`linear_attention`; H is the larger of k's and v's groups.

    Returns:
        The state (documents, H, N, P), or P + 1 with ``normalize``; float32 (float64 beside float64).

    Raises:
        ValueError: shapes that do not fit together. TypeError: mixed or unsupported dtypes.
    """
    owner = "linear_attention_state"
    _, k, v, (batch_size, length), _ = _inputs(owner, ("batch", "length"), *cast_inputs(k, k, v))
    _check_grid(owner, length, chunk_size)
    shape = (batch_size, length, v.shape[3])
    log_decay = _weight(owner, "log_decay", log_decay, shape, v.dtype)
    past_weight = _weight(owner, "past_weight", past_weight, shape, v.dtype)
    starts, lengths, documents = _documents(owner, layout, batch_size, length)
    if initial_state is not None:
        _check_state(owner, "initial_state", initial_state, _state_shape(documents, k, v, normalize), v.dtype)
    return _state_operator(k, v, log_decay, past_weight, initial_state, starts, lengths, normalize, chunk_size)


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
    owner = "linear_attention_step"
    q, k, v, (batch_size,), ranked = _inputs(owner, ("batch",), *cast_inputs(q, k, v))
    shape = (batch_size, v.shape[2])
    log_decay = _weight(owner, "log_decay", log_decay, shape, v.dtype)
    past_weight = _weight(owner, "past_weight", past_weight, shape, v.dtype)
    diagonal_weight = _weight(owner, "diagonal_weight", diagonal_weight, shape, v.dtype)
    _check_state(owner, "state", state, _state_shape(batch_size, q, v, normalize), v.dtype)
    if not state.is_contiguous():
        raise ValueError(f"{owner}: state is not contiguous and cannot be updated in place; clone it")
    y = _step_operator(q, k, v, log_decay, past_weight, diagonal_weight, state, normalize, epsilon)
    return y if ranked else y.squeeze(1)


def _check_grid(owner: str, length: int, chunk_size: int) -> None:
    if chunk_size < 1:
        raise ValueError(f"{owner}: chunk_size is {chunk_size}; expected a positive integer")
    if length < 1:
        raise ValueError(f"{owner}: the inputs have length 0; expected at least one token")


def _documents(
    owner: str, layout: Layout | None, batch_size: int, length: int
) -> tuple[Tensor | None, Tensor | None, int]:
    """Starts, lengths and number of documents; a layout must be for this grid."""
    if layout is None:
        return None, None, batch_size
    if (layout.batch_size, layout.length) != (batch_size, length):
        raise ValueError(
            f"{owner}: layout is for a grid of {(layout.batch_size, layout.length)}; "
            f"the inputs are {(batch_size, length)} (batch, length)"
        )
    return layout.starts, layout.lengths, layout.num_documents


def _state_shape(documents: int, q: Tensor, v: Tensor, normalize: bool) -> tuple[int, int, int, int]:
    return (documents, v.shape[-2], q.shape[-1], v.shape[-1] + int(normalize))


def _inputs(
    owner: str, axes: tuple[str, ...], q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, list[int], bool]:
    """q, k, v with a rank axis, v with an entry for each head; sizes of the leading ``axes``; was there a rank axis."""
    shapes = (q.shape, k.shape, v.shape)
    dims = len(shapes[0])
    ranked = dims == len(axes) + 3
    if not (dims == len(shapes[1]) == len(shapes[2]) and (ranked or dims == len(axes) + 2)):
        raise ValueError(
            f"{owner}: q, k, v have shapes {', '.join(str(tuple(shape)) for shape in shapes)}; expected "
            f"({', '.join(axes)}, [ranks,] groups, width). The rank axis is there for all of q, k and v, or for none."
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _DTYPES:
        raise TypeError(
            f"{owner}: q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; expected one floating-point dtype for all three"
        )
    (*leading, q_groups, q_width), (*k_leading, k_groups, k_width), (*v_leading, v_groups, _) = shapes
    if leading != k_leading or leading != v_leading or q_width != k_width:
        raise ValueError(
            f"{owner}: q, k, v have shapes {', '.join(str(tuple(shape)) for shape in shapes)}; "
            "expected equal batch, length and ranks, and equal key width in q and k"
        )
    heads = max(q_groups, k_groups, v_groups)
    for name, groups in (("q", q_groups), ("k", k_groups), ("v", v_groups)):
        if groups < 1 or heads % groups:
            raise ValueError(f"{owner}: {name} has {groups} groups, which do not divide the {heads} heads")
    if any(0 in shape[len(axes) :] for shape in shapes):
        raise ValueError(
            f"{owner}: q, k, v have shapes {', '.join(str(tuple(shape)) for shape in shapes)}; "
            "expected ranks and widths of at least 1"
        )
    if v_groups != heads:
        v = v.repeat_interleave(heads // v_groups, dim=-2)
    if not ranked:
        axis = len(axes)
        q, k, v = q.unsqueeze(axis), k.unsqueeze(axis), v.unsqueeze(axis)
    return q, k, v, leading[: len(axes)], ranked


def _weight(owner: str, name: str, weight: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """A per-head weight in the state's dtype; refuses other shapes."""
    if weight is None:
        return None
    if weight.shape != shape:
        axes = "(batch, length, heads)" if len(shape) == 3 else "(batch, heads)"
        raise ValueError(f"{owner}: {name} has shape {tuple(weight.shape)}; expected {shape} {axes}")
    return weight.to(state_dtype(dtype))


def _check_state(owner: str, name: str, state: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if state.shape != shape or state.dtype != state_dtype(dtype):
        raise ValueError(
            f"{owner}: {name} is {tuple(state.shape)} {state.dtype}; expected {shape} {state_dtype(dtype)} "
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


def _fake_state(k: Tensor, v: Tensor, *rest: object) -> Tensor:
    starts, normalize = rest[3], bool(rest[5])
    documents = starts.shape[0] if isinstance(starts, Tensor) else v.shape[0]
    return v.new_empty(_state_shape(documents, k, v, normalize), dtype=state_dtype(v.dtype))


_state_operator = Operator(
    "linear_attention_state",
    "Tensor k, Tensor v, Tensor? log_decay, Tensor? past_weight, Tensor? initial_state, Tensor? starts, "
    "Tensor? lengths, bool normalize, SymInt chunk_size",
    outputs=1,
    fake=_fake_state,
    modules={
        "reference": f"{_PACKAGE}.reference_state",
        "torch": f"{_PACKAGE}.torch_state",
        "cpu": f"{_PACKAGE}.cpu_state",
    },
    differentiable=(0, 1, 2, 3, 4),
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
        "triton": f"{_PACKAGE}.triton_step",
    },
)
