"""Feature attention by the C++ kernels of ``csrc/cpu/feature_attention.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.documents import token_table

_DTYPES = (torch.float32, torch.bfloat16)


def supports(*args: object) -> str | None:
    dtype = next(arg.dtype for arg in args if isinstance(arg, Tensor))
    return None if dtype in _DTYPES else f"the C++ kernels take float32 and bfloat16, not {dtype}"


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    initial_log_scale: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    feature_map: str,
    normalize: bool,
    epsilon: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = contiguous(q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2))
    rest = contiguous(query_weight, key_weight, log_decay, initial_state, initial_log_scale, starts, lengths)
    y, state, log_scale, denominator = torch.ops.seqmodels_cpu.feature_attention(
        *tokens, *rest, feature_map, normalize, epsilon
    )
    return y.squeeze(2), state, log_scale, denominator.view(v.shape[:-1] if normalize else 0)


def backward(
    grad_y: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    initial_log_scale: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    feature_map: str,
    normalize: bool,
    epsilon: float,
    chunk_size: int,
    y: Tensor,
    final_state: Tensor,
    log_scale: Tensor,
    denominator: Tensor,
) -> tuple[Tensor, ...]:
    grads = contiguous(grad_y.unsqueeze(2), grad_state)
    tokens = contiguous(q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2))
    rest = contiguous(query_weight, key_weight, log_decay, initial_state, initial_log_scale, starts, lengths)
    du_q, du_k, grad_v, grad_decay, grad_initial = torch.ops.seqmodels_cpu.feature_attention_backward(
        *grads, *tokens, *rest, feature_map, normalize, epsilon, y.unsqueeze(2), denominator
    )
    (grad_q, grad_query_weight), (grad_k, grad_key_weight) = (
        through_weight(du.squeeze(2), inside(x, starts, lengths), weight)
        for du, x, weight in ((du_q, q, query_weight), (du_k, k, key_weight))
    )
    return grad_q, grad_k, grad_v.squeeze(2), grad_query_weight, grad_key_weight, grad_decay, grad_initial


def inside(x: Tensor, starts: Tensor | None, lengths: Tensor | None) -> Tensor:
    """Zero outside documents: what stands in the padding must not meet a gradient of zero."""
    if starts is None or lengths is None:
        return x
    return x.masked_fill(~token_table(starts, lengths, x.shape[0], x.shape[1]).valid[..., None, None], 0)


def through_weight(du: Tensor, x: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of x (batch, length, groups, D) and of a weight (H, D, f) from that of u (batch, length, H, f)."""
    heads, groups = du.shape[2], x.shape[2]
    if weight is None:
        grad_x = du if heads == groups else du.unflatten(2, (groups, heads // groups)).sum(3)
        return grad_x.to(x.dtype), du.new_empty(0)
    tokens = x.shape[0] * x.shape[1]
    rows = x.reshape(tokens, groups, -1).transpose(0, 1).to(du.dtype)  # (groups, tokens, D)
    du = du.reshape(tokens, groups, -1).transpose(0, 1)  # (groups, tokens, heads of a group x f)
    matrix = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(2)  # (groups, D, heads of a group x f)
    grad_x = (du @ matrix.transpose(1, 2)).transpose(0, 1).reshape(x.shape)
    grad_weight = (rows.transpose(1, 2) @ du).unflatten(2, (heads // groups, -1)).transpose(1, 2)
    return grad_x.to(x.dtype), grad_weight.reshape(weight.shape)
