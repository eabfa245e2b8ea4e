"""The public functions of feature attention: equation, checks, casts and dispatch."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.ops.feature_attention.maps import FEATURE_MAPS, NO_KEY, NONNEGATIVE, feature_width
from seqmodels.ops.registration import Operator, cast_inputs, state_dtype
from seqmodels.state import State

_PACKAGE = "seqmodels.ops.feature_attention"
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EPSILON = 1e-6


class FeatureState(State):
    """What feature attention carries: the sum S e^m, held as ``matrix`` = S and ``log_scale`` = m.

    Only hedgehog_exp has a scale: m is the largest log phi(k) so far, so S and m are the same however
    the sequence was cut. m is constant for gradients, since only S e^m means anything.
    """

    matrix: Tensor  # (documents, heads, features, value_dim); one wider with the normaliser
    log_scale: Tensor | None  # (documents, heads, features) for hedgehog_exp, else None

    @classmethod
    def empty(cls, like: Tensor, documents: int, heads: int, width: int, value_dim: int, feature_map: str,
              normalize: bool = True) -> FeatureState:  # fmt: skip
        """The state before the first token, on the device of ``like``; ``width`` is that of u."""
        size, dtype = (documents, heads, feature_width(feature_map, width)), state_dtype(like.dtype)
        scale = like.new_full(size, NO_KEY, dtype=dtype) if feature_map == "hedgehog_exp" else None
        return cls(like.new_zeros((*size, value_dim + int(normalize)), dtype=dtype), scale)


def feature_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    *,
    feature_map: str,
    log_decay: Tensor | None = None,
    initial_state: FeatureState | None = None,
    normalize: bool = True,
    epsilon: float | None = None,
    layout: Layout | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, FeatureState]:
    r"""Causal linear attention between features of q and k, made where they are used.

    For each head, with u = x W (u = x without W) and phi one of the maps in
    :mod:`seqmodels.ops.feature_attention.maps`:

    .. code-block:: text

        S_t = e^{log_decay_t} S_{t-1} + phi(k_t) [v_t, 1]^T
        y_t = (phi(q_t) S_t)[values] / ((phi(q_t) S_t)[last] + epsilon)

    which is :func:`seqmodels.ops.linear_attention.linear_attention` of phi(q) and phi(k), but the
    kernels never hold the features of more than one tile of tokens.

    * ``hedgehog_exp``, ``hedgehog_split``, ``hedgehog_joint``: Hedgehog (arXiv:2402.04347, section 4),
      as published, as the authors' code has it, and over both halves. ``hedgehog_exp`` is exactly
      stable: a running maximum per feature scales S (:class:`FeatureState`), and cancels. It has no
      decay, always the normaliser, and needs no epsilon, since the divisor cannot vanish.
    * ``taylor``: 1 + s + s^2 / 2 with s = q . k / sqrt(width), packed (Based, arXiv:2402.18668).
    * ``t2r``: relu(x W) (arXiv:2103.13076). ``elu`` (+ 1), ``relu``, ``identity``.

    Args:
        q: (batch, length, Gq, D). Head h of H uses group h * Gq // H.
        k: (batch, length, Gk, D).
        v: (batch, length, Gv, P). H is the largest number of groups, or of heads in a weight.
        query_weight, key_weight: (H, D, f) per query head, or None for u = x. Both u have width f.
        feature_map: a name in ``FEATURE_MAPS``.
        log_decay: (batch, length, H), at most 0. None: no decay.
        initial_state: one row for each document. None: nothing seen.
        normalize: divide by the sum of weights; the state has one more column for it.
        epsilon: added to the divisor; hedgehog_exp leaves it out. Default: 1e-6.
        layout: documents; one state row for each. None: one document a row.
        chunk_size: tokens of one tile; a speed knob of the PyTorch form.

    Returns:
        y (batch, length, H, P) of v's dtype, zero outside documents, and the state at each
        document's end, float32 (float64 beside float64 inputs).

    Raises:
        ValueError: shapes that do not fit together, options a map does not have. TypeError: dtypes.
    """
    owner = "feature_attention"
    q, k, v = cast_inputs(q, k, v)
    heads = _heads(owner, 4, {"q": q, "k": k, "v": v}, query_weight, key_weight)
    batch_size, length = v.shape[:2]
    v = v.repeat_interleave(heads // v.shape[2], dim=2)
    query_weight, width = _weight(owner, "query_weight", query_weight, heads, q, feature_map)
    key_weight, key_width = _weight(owner, "key_weight", key_weight, heads, k, feature_map)
    if width != key_width:
        raise ValueError(f"{owner}: queries are mapped to width {width} and keys to {key_width}; expected one width")
    epsilon = _options(owner, feature_map, normalize, epsilon, log_decay)
    starts, lengths, documents = _grid(owner, layout, batch_size, length, chunk_size)
    log_decay = _decay(owner, log_decay, (batch_size, length, heads), v.dtype)
    matrix, scale = _given(owner, initial_state, (documents, heads, feature_width(feature_map, width)), v, normalize,
                           feature_map)  # fmt: skip
    y, final, log_scale, _ = _operator(
        q, k, v, query_weight, key_weight, log_decay, matrix, scale, starts, lengths,
        feature_map, normalize, epsilon, chunk_size,
    )  # fmt: skip
    return y, FeatureState(final, log_scale if feature_map == "hedgehog_exp" else None)


def feature_state(
    k: Tensor,
    v: Tensor,
    key_weight: Tensor | None = None,
    *,
    feature_map: str,
    log_decay: Tensor | None = None,
    initial_state: FeatureState | None = None,
    normalize: bool = True,
    layout: Layout | None = None,
    chunk_size: int = 64,
) -> FeatureState:
    """The state that :func:`feature_attention` ends with, without its queries and outputs.

    An encoder's keys and values become a decoder's initial state this way (prefix linear attention,
    arXiv:2407.05483, section 4.2). Differentiable; arguments as in :func:`feature_attention`.
    """
    owner = "feature_state"
    k, v = cast_inputs(k, v)
    heads = _heads(owner, 4, {"k": k, "v": v}, key_weight)
    batch_size, length = v.shape[:2]
    v = v.repeat_interleave(heads // v.shape[2], dim=2)
    key_weight, width = _weight(owner, "key_weight", key_weight, heads, k, feature_map)
    _options(owner, feature_map, normalize, None, log_decay)
    starts, lengths, documents = _grid(owner, layout, batch_size, length, chunk_size)
    log_decay = _decay(owner, log_decay, (batch_size, length, heads), v.dtype)
    matrix, scale = _given(owner, initial_state, (documents, heads, feature_width(feature_map, width)), v, normalize,
                           feature_map)  # fmt: skip
    final, log_scale = _state_operator(
        k, v, key_weight, log_decay, matrix, scale, starts, lengths, feature_map, normalize, chunk_size
    )
    return FeatureState(final, log_scale if feature_map == "hedgehog_exp" else None)


@torch.no_grad()
def feature_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: FeatureState,
    query_weight: Tensor | None = None,
    key_weight: Tensor | None = None,
    *,
    feature_map: str,
    log_decay: Tensor | None = None,
    normalize: bool = True,
    epsilon: float | None = None,
) -> Tensor:
    """One token of :func:`feature_attention`; updates ``state`` in place, no gradient.

    Args:
        q, k: (batch, G, D). v: (batch, Gv, P).
        state: contiguous; see :class:`FeatureState`, one row for each sequence.
        log_decay: (batch, H) or None. The others as in :func:`feature_attention`.

    Returns:
        y (batch, H, P) of v's dtype.
    """
    owner = "feature_attention_step"
    q, k, v = cast_inputs(q, k, v)
    heads = _heads(owner, 3, {"q": q, "k": k, "v": v}, query_weight, key_weight)
    batch_size = v.shape[0]
    v = v.repeat_interleave(heads // v.shape[1], dim=1)
    query_weight, width = _weight(owner, "query_weight", query_weight, heads, q, feature_map)
    key_weight, key_width = _weight(owner, "key_weight", key_weight, heads, k, feature_map)
    if width != key_width:
        raise ValueError(f"{owner}: queries are mapped to width {width} and keys to {key_width}; expected one width")
    epsilon = _options(owner, feature_map, normalize, epsilon, log_decay)
    log_decay = _decay(owner, log_decay, (batch_size, heads), v.dtype)
    if state is None:
        raise TypeError(f"{owner}: state is None; expected a FeatureState, such as FeatureState.empty(...)")
    matrix, scale = _given(owner, state, (batch_size, heads, feature_width(feature_map, width)), v, normalize,
                           feature_map)  # fmt: skip
    if not all(x is None or x.is_contiguous() for x in (matrix, scale)):
        raise ValueError(f"{owner}: state is not contiguous and cannot be updated in place; clone it")
    return _step_operator(q, k, v, query_weight, key_weight, log_decay, matrix, scale, feature_map, normalize, epsilon)


def _heads(owner: str, dims: int, inputs: dict[str, Tensor], *parameters: Tensor | None) -> int:
    """Number of heads; refuses inputs that do not fit together."""
    values = inputs["v"]
    axes = "(batch, length, groups, width)" if dims == 4 else "(batch, groups, width)"
    for name, x in inputs.items():
        if x.dim() != dims or x.shape[: dims - 2] != values.shape[: dims - 2]:
            raise ValueError(f"{owner}: {_shapes(inputs)}; expected {axes} with equal leading sizes")
        if x.dtype != values.dtype or x.dtype not in _DTYPES:
            raise TypeError(f"{owner}: {name} is {x.dtype}, v is {values.dtype}; expected one floating-point dtype")
    if "q" in inputs and inputs["q"].shape[-1] != inputs["k"].shape[-1]:
        raise ValueError(f"{owner}: {_shapes(inputs)}; expected equal width of q and k")
    groups = {name: x.shape[-2] for name, x in inputs.items()}
    heads = max([*groups.values(), *(x.shape[0] for x in parameters if x is not None and x.dim() > 0)])
    for name, count in groups.items():
        if count < 1 or heads % count:
            raise ValueError(f"{owner}: {name} has {count} groups, which do not divide the {heads} heads")
    if any(x.shape[-1] < 1 for x in inputs.values()):
        raise ValueError(f"{owner}: {_shapes(inputs)}; expected widths of at least 1")
    return heads


def _shapes(inputs: dict[str, Tensor]) -> str:
    """For messages alone: made only then, since torch.compile cannot trace it."""
    return ", ".join(f"{name} {tuple(x.shape)}" for name, x in inputs.items())


def _weight(
    owner: str, name: str, weight: Tensor | None, heads: int, x: Tensor, feature_map: str
) -> tuple[Tensor | None, int]:
    """A weight in the state's dtype (it is small, and a map's exponentials are not), and the width of u."""
    depth = x.shape[-1]
    if weight is None:
        if feature_map == "t2r":
            raise ValueError(f"{owner}: feature_map 't2r' is relu(x W), but {name} is None; give one, or use 'relu'")
        return None, depth
    if weight.dim() != 3 or weight.shape[:2] != (heads, depth) or weight.shape[2] < 1:
        raise ValueError(
            f"{owner}: {name} has shape {tuple(weight.shape)}; "
            f"expected ({heads}, {depth}, f) (heads, D, f), f at least 1"
        )
    return weight.to(state_dtype(x.dtype)), weight.shape[2]


def _options(owner: str, feature_map: str, normalize: bool, epsilon: float | None, log_decay: Tensor | None) -> float:
    """The epsilon in force; refuses what a map cannot do."""
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"{owner}: unknown feature_map {feature_map!r}; expected one of {', '.join(FEATURE_MAPS)}")
    if epsilon is not None and not epsilon > 0:
        raise ValueError(f"{owner}: epsilon is {epsilon}; expected a positive number")
    if feature_map == "hedgehog_exp":
        if log_decay is not None:
            raise ValueError(
                f"{owner}: hedgehog_exp has no decay; use hedgehog_split or hedgehog_joint, or no log_decay"
            )
        if not normalize:
            raise ValueError(
                f"{owner}: hedgehog_exp needs normalize=True: its scale cancels in a mean only; use hedgehog_split"
            )
        return 0.0
    if normalize and feature_map not in NONNEGATIVE:
        raise ValueError(
            f"{owner}: normalize=True divides by a sum of weights, which {feature_map!r} does not keep positive; "
            "use normalize=False or another map"
        )
    return EPSILON if epsilon is None else epsilon


def _grid(
    owner: str, layout: Layout | None, batch_size: int, length: int, chunk_size: int
) -> tuple[Tensor | None, Tensor | None, int]:
    if chunk_size < 1:
        raise ValueError(f"{owner}: chunk_size is {chunk_size}; expected a positive integer")
    if length < 1:
        raise ValueError(f"{owner}: the inputs have length 0; expected at least one token")
    if layout is None:
        return None, None, batch_size
    if (layout.batch_size, layout.length) != (batch_size, length):
        raise ValueError(
            f"{owner}: layout is for a grid of {(layout.batch_size, layout.length)}; "
            f"the inputs are {(batch_size, length)} (batch, length)"
        )
    return layout.starts, layout.lengths, layout.num_documents


def _decay(owner: str, log_decay: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    if log_decay is None:
        return None
    if log_decay.shape != shape:
        axes = "(batch, length, heads)" if len(shape) == 3 else "(batch, heads)"
        raise ValueError(f"{owner}: log_decay has shape {tuple(log_decay.shape)}; expected {shape} {axes}")
    return log_decay.to(state_dtype(dtype))


def _given(
    owner: str, state: FeatureState | None, size: tuple[int, int, int], v: Tensor, normalize: bool, feature_map: str
) -> tuple[Tensor | None, Tensor | None]:
    """Matrix and scale of a given state, checked."""
    if state is None:
        return None, None
    if not isinstance(state, FeatureState):
        raise TypeError(f"{owner}: the state is a {type(state).__name__}; expected a FeatureState (matrix, log_scale)")
    dtype, shape = state_dtype(v.dtype), (*size, v.shape[-1] + int(normalize))
    matrix, scale = state.matrix, state.log_scale
    if matrix.shape != shape or matrix.dtype != dtype:
        raise ValueError(
            f"{owner}: the state's matrix is {tuple(matrix.shape)} {matrix.dtype}; expected {shape} {dtype} "
            "(documents, heads, features, value width; one wider with normalize)"
        )
    if (scale is not None) != (feature_map == "hedgehog_exp"):
        raise ValueError(
            f"{owner}: the state's log_scale is {'missing' if scale is None else 'given'}; hedgehog_exp carries one, "
            f"other maps do not, and feature_map is {feature_map!r}"
        )
    if scale is not None and (scale.shape != size or scale.dtype != dtype):
        raise ValueError(
            f"{owner}: the state's log_scale is {tuple(scale.shape)} {scale.dtype}; expected {size} {dtype} "
            "(documents, heads, features)"
        )
    return matrix, (None if scale is None else scale.detach())


def _fake_states(
    k: Tensor, v: Tensor, weight: Tensor | None, starts: Tensor | None, feature_map: str, normalize: bool
) -> tuple[Tensor, Tensor]:
    documents = v.shape[0] if starts is None else starts.shape[0]
    width = k.shape[-1] if weight is None else weight.shape[2]
    size, dtype = (documents, v.shape[-2], feature_width(feature_map, width)), state_dtype(v.dtype)
    scale = v.new_empty(size if feature_map == "hedgehog_exp" else 0, dtype=dtype)
    return v.new_empty((*size, v.shape[-1] + int(normalize)), dtype=dtype), scale


def _fake(
    q: Tensor, k: Tensor, v: Tensor, query_weight: Tensor | None, key_weight: Tensor | None, *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the final state, its scale (empty without one), and what y was divided by (empty without ``normalize``)."""
    starts, feature_map, normalize = rest[3], str(rest[5]), bool(rest[6])
    state, scale = _fake_states(
        k, v, key_weight, starts if isinstance(starts, Tensor) else None, feature_map, normalize
    )
    y = torch.empty_like(v, memory_format=torch.contiguous_format)
    return y, state, scale, state.new_empty(v.shape[:-1] if normalize else 0)


def _fake_state(k: Tensor, v: Tensor, key_weight: Tensor | None, *rest: object) -> tuple[Tensor, Tensor]:
    starts, feature_map, normalize = rest[3], str(rest[5]), bool(rest[6])
    return _fake_states(k, v, key_weight, starts if isinstance(starts, Tensor) else None, feature_map, normalize)


_PARAMETERS = "Tensor? query_weight, Tensor? key_weight, Tensor? log_decay"
_DOCUMENTS = "Tensor? initial_state, Tensor? initial_log_scale, Tensor? starts, Tensor? lengths, str feature_map"

_operator = Operator(
    "feature_attention",
    f"Tensor q, Tensor k, Tensor v, {_PARAMETERS}, {_DOCUMENTS}, bool normalize, float epsilon, SymInt chunk_size",
    outputs=4,
    residuals=2,
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
_state_operator = Operator(
    "feature_state",
    f"Tensor k, Tensor v, Tensor? key_weight, Tensor? log_decay, {_DOCUMENTS}, bool normalize, SymInt chunk_size",
    outputs=2,
    residuals=1,
    fake=_fake_state,
    modules={
        "reference": f"{_PACKAGE}.reference_state",
        "torch": f"{_PACKAGE}.torch_state",
        "cpu": f"{_PACKAGE}.cpu_state",
        "triton": f"{_PACKAGE}.triton_state",
    },
    differentiable=(0, 1, 2, 3, 4),
)
_step_operator = Operator(
    "feature_attention_step",
    f"Tensor q, Tensor k, Tensor v, {_PARAMETERS}, Tensor(a!) state, Tensor(b!)? log_scale, str feature_map, "
    "bool normalize, float epsilon",
    outputs=1,
    fake=lambda q, k, v, *rest: torch.empty_like(v, memory_format=torch.contiguous_format),
    modules={
        "reference": f"{_PACKAGE}.reference_step",
        "torch": f"{_PACKAGE}.torch_step",
        "cpu": f"{_PACKAGE}.cpu_step",
        "triton": f"{_PACKAGE}.triton_step",
    },
)
