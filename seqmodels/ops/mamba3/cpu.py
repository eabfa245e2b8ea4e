"""Mamba-3 by the C++ kernels of ``csrc/cpu/mamba3.cpp`` and ``mamba3_backward.cpp``.

What is small beside the recurrence is made here: the trapezoid weights, and the token that a
state carries. The kernels keep nothing of the forward for the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqmodels.ops.documents import TokenTable, token_table

PER_TOKEN_WEIGHTS = slice(4, 9)  # dt, log_decay, trapezoid, phase_step, rate in the op's arguments


def supports(x: Tensor, b: Tensor, *rest: object) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"the C++ kernels take float32 and bfloat16; x is {x.dtype}"
    if b.shape[2] > 64:
        return f"the C++ kernels take at most 64 ranks; b has {b.shape[2]}"
    return None


def _dense_tokens(x: Tensor) -> Tensor:
    """``x`` itself where tokens alone are spaced out, evenly (a slice of a projection); else a copy."""
    strides = [1]
    for size in reversed(x.shape[3:]):
        strides.append(strides[-1] * size)
    dense = all(n == 1 or own == s for n, own, s in zip(x.shape[2:], x.stride()[2:], reversed(strides), strict=True))
    even = x.shape[0] == 1 or x.shape[1] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    return x if dense and even else x.contiguous()


def _recurrence_weights(
    dt: Tensor,
    trapezoid: Tensor,
    mimo_x: Tensor | None,
    initial: Sequence[Tensor | None],
    starts: Tensor | None,
    lengths: Tensor | None,
    table: TokenTable | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Past and own weight of every token, and the initial state with the carried token in it."""
    own = trapezoid * dt
    look_back = dt - own
    look_ahead = F.pad(look_back[:, 1:], (0, 0, 0, 1))
    if table is not None:
        look_ahead = look_ahead.masked_fill(table.last[..., None], 0)
    initial_ssm, initial_k, initial_v = initial
    if initial_ssm is None or initial_k is None or initial_v is None:  # all or none
        return own + look_ahead, own, None
    if starts is None:
        weight = look_back[:, 0]
    else:
        assert lengths is not None
        weight = look_back.flatten(0, 1)[starts.clamp_max(dt.shape[0] * dt.shape[1] - 1)] * (lengths > 0)[:, None]
    values = weight[..., None] * initial_v
    if mimo_x is None:
        carried = values[..., None] * initial_k[:, 0, :, None]
    else:
        carried = torch.einsum("hrp,dhp,drhn->dhpn", mimo_x, values, initial_k)
    return own + look_ahead, own, initial_ssm + carried


def _prepared(args: tuple[Any, ...]) -> tuple[list[Any], TokenTable | None]:
    """The op's arguments with dense tokens; of padding, which may hold anything, nothing but zeros."""
    prepared = [arg.contiguous() if isinstance(arg, Tensor) and index > 3 else arg for index, arg in enumerate(args)]
    prepared[:4] = [_dense_tokens(tensor) for tensor in args[:4]]
    starts, lengths = args[22], args[23]
    if starts is None:
        return prepared, None
    table = token_table(starts, lengths, args[0].shape[0], args[0].shape[1])
    padding = ~table.valid[..., None]
    prepared[PER_TOKEN_WEIGHTS] = [weight.masked_fill(padding, 0) for weight in prepared[PER_TOKEN_WEIGHTS]]
    return prepared, table


def _kernel_arguments(args: list[Any], past: Tensor, own: Tensor, state: Tensor | None) -> tuple[Any, ...]:
    """The C++ op's arguments from the op's."""
    x, b, c, z, _, log_decay, _, phase_step, rate, *parameters = args[:18]
    starts, lengths, pairing, epsilon = args[22:26]
    return (
        x, b, c, z, log_decay, past.contiguous(), own, phase_step, rate, *parameters, args[18],
        None if state is None else state.contiguous(), starts, lengths, pairing == "half", epsilon,
    )  # fmt: skip


def _last_rows(tokens: Tensor, starts: Tensor | None, lengths: Tensor | None) -> Tensor:
    """(documents, ...) of each document's last token; any token for an unused slot."""
    if starts is None:
        return tokens[:, -1]
    assert lengths is not None
    return tokens.flatten(0, 1)[(starts + lengths - 1).clamp(0, tokens.shape[0] * tokens.shape[1] - 1)]


def _where_used(lengths: Tensor | None, used: Tensor, unused: Tensor) -> Tensor:
    """Rows of used slots from one tensor, of unused slots from another."""
    return used if lengths is None else torch.where((lengths > 0).view(-1, *[1] * (used.dim() - 1)), used, unused)


def forward(*args: Any) -> tuple[Tensor, ...]:
    prepared, table = _prepared(args)
    initial, (starts, lengths) = prepared[18:22], prepared[22:24]
    past, own, state = _recurrence_weights(prepared[4], prepared[6], prepared[14], initial[1:], starts, lengths, table)
    out, angle, ssm, k = torch.ops.seqmodels_cpu.mamba3(*_kernel_arguments(prepared, past, own, state))
    after = [angle, ssm, k, _last_rows(prepared[0], starts, lengths).to(angle.dtype, copy=True)]
    if lengths is not None:
        after = [
            _where_used(lengths, new, torch.zeros_like(new) if old is None else old)
            for new, old in zip(after, initial, strict=True)
        ]
    return (out, *after)


def backward(
    grad_out: Tensor, grad_angle: Tensor, grad_ssm: Tensor, grad_k: Tensor, grad_v: Tensor, *args: Any
) -> tuple[Tensor, ...]:
    prepared, table = _prepared(args)
    x, dt, trapezoid, mimo_x, b_bias = (prepared[index] for index in (0, 4, 6, 14, 11))
    initial, (starts, lengths) = prepared[18:22], prepared[22:24]
    leaves: list[Any] = [
        None if leaf is None else leaf.detach().requires_grad_() for leaf in (dt, trapezoid, mimo_x, *initial[1:])
    ]
    with torch.enable_grad():
        past, own, state = _recurrence_weights(leaves[0], leaves[1], leaves[2], leaves[3:], starts, lengths, table)
    gradients = torch.ops.seqmodels_cpu.mamba3_backward(
        grad_out.contiguous(),
        grad_angle.contiguous(),
        grad_ssm.contiguous(),
        grad_k.contiguous(),
        *_kernel_arguments(prepared, past.detach(), own.detach(), None if state is None else state.detach()),
    )
    grad_x, grad_b, grad_c, grad_z, grad_log_decay, grad_past, grad_own, grad_step, grad_rate = gradients[:9]
    grad_parameters, grad_initial_angle, grad_state = gradients[9:]

    # Through the weights and the carried token.
    outputs, grads = [past, own], [grad_past, grad_own]
    if state is not None:
        outputs.append(state)
        grads.append(grad_state)
    wanted = [leaf for leaf in leaves if leaf is not None]
    found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
    through: list[Any] = [None if leaf is None else next(found) for leaf in leaves]
    grad_dt, grad_trapezoid, grad_mimo_x, *grad_initial = through

    # The final v is x itself.
    last = _last_rows(torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2]), starts, lengths)
    into_x = _where_used(lengths, grad_v, torch.zeros_like(grad_v)).to(grad_x.dtype)
    grad_x.view(-1, *x.shape[2:]).index_add_(0, last, into_x)

    heads, ranks, d_state = b_bias.shape
    keys, mixes, head_dim = ranks * d_state, ranks * x.shape[-1], x.shape[-1]
    sizes = (keys, keys, d_state, d_state, mixes, mixes, mixes, head_dim, 1)
    b_bias, c_bias, b_weight, c_weight, own_mimo_x, mimo_z, mimo_o, norm, skip = grad_parameters.split(sizes, dim=1)
    empty = grad_parameters.new_empty(0)

    def mix(gradient: Tensor) -> Tensor:
        return empty if mimo_x is None else gradient.reshape(heads, ranks, head_dim)

    if grad_mimo_x is not None:
        own_mimo_x = own_mimo_x + grad_mimo_x.flatten(1)
    state_gradients = [empty] * 4
    if state is not None:
        given = (grad_initial_angle, *grad_initial)
        finals = (grad_angle, grad_ssm, grad_k, grad_v)
        state_gradients = [_where_used(lengths, g, final).contiguous() for g, final in zip(given, finals, strict=True)]
    return (
        grad_x, grad_b, grad_c, grad_z, grad_dt, grad_log_decay, grad_trapezoid, grad_step, grad_rate,
        b_weight.sum(0), c_weight.sum(0), b_bias.reshape(heads, ranks, d_state), c_bias.reshape(heads, ranks, d_state),
        skip.flatten(), mix(own_mimo_x), mix(mimo_z), mix(mimo_o), empty if args[17] is None else norm.flatten(),
        *state_gradients,
    )  # fmt: skip
