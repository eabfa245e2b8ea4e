"""Long convolution by FFT: one transform of the inputs, one of the kernels, one back.

A group of documents is copied to a (documents, channels, n) buffer of zeros, n a fast size of at
least their length and the kernel's reach, so that nothing wraps around onto a token and nothing passes
from one document to the next. On the CPU documents of one size form a group; elsewhere lengths are not read: groups of
``batch`` documents are padded to the whole length.

A reverse kernel occupies the far end of the buffer: tap j, which reaches j + 1 ahead, lies at n - 1 - j.

The backward multiplies by conjugates: grad x = corr(grad y, kernel), grad kernel = corr(grad y, x) summed over
documents. Transforms of x are computed again, not kept: they are four times x.

G documents of a group, T their tokens, n FFT size, R rows, C channels, F frequencies.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.fft import irfft, rfft

from seqmodels.ops.long_conv.sizes import fft_size


class _Group(NamedTuple):
    """Documents that are transformed together; ``token`` and ``slot`` None: all rows as they are."""

    length: int
    token: Tensor | None  # (G, T) flat index; batch * length behind a document's end
    slot: Tensor | None  # (G,) row of the initial state


def forward(
    x: Tensor,
    kernel: Tensor,
    reverse_kernel: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
) -> Tensor:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch_size, length, channels = x.shape
    y = None
    for group in _groups(batch_size, length, starts, lengths):
        history, taps, reverse_taps, size = _sizes(group, kernel, reverse_kernel, initial_state)
        spectrum_RCF = _kernel_spectrum(kernel, reverse_kernel, taps, reverse_taps, size, compute)
        x_GCF = rfft(_inputs(x, initial_state, group, size, compute))
        values = irfft(x_GCF[:, None] * spectrum_RCF, n=size)[..., history : history + group.length]
        y = _place(y, group, values.permute(0, 3, 1, 2), batch_size * length)
    return _grid(y, x, (batch_size, length, kernel.shape[0], channels))


def backward(
    grad: Tensor,
    x: Tensor,
    kernel: Tensor,
    reverse_kernel: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    batch_size, length, _ = x.shape
    grad_x = None
    grad_kernel = torch.zeros_like(kernel, dtype=compute)
    grad_reverse = None if reverse_kernel is None else torch.zeros_like(reverse_kernel, dtype=compute)
    grad_state = None if initial_state is None else torch.zeros_like(initial_state, dtype=compute)
    for group in _groups(batch_size, length, starts, lengths):
        history, taps, reverse_taps, size = _sizes(group, kernel, reverse_kernel, initial_state)
        grad_GRCF = rfft(_outputs(grad, group, history, size, compute))
        spectrum_RCF = _kernel_spectrum(kernel, reverse_kernel, taps, reverse_taps, size, compute)
        values = irfft((grad_GRCF * spectrum_RCF.conj_physical()).sum(1), n=size)
        after = values[..., history : history + group.length].transpose(1, 2)
        grad_x = _place(grad_x, group, after, batch_size * length)
        if grad_state is not None:
            before = values[..., :history].transpose(1, 2)
            rows = slice(None) if group.slot is None else group.slot
            grad_state[rows] = before
        x_GCF = rfft(_inputs(x, initial_state, group, size, compute))
        found = irfft((grad_GRCF * x_GCF.conj_physical()[:, None]).sum(0), n=size)
        grad_kernel[..., :taps] += found[..., :taps]
        if grad_reverse is not None:
            grad_reverse[..., :reverse_taps] += found.flip(-1)[..., :reverse_taps]
    return (
        _grid(grad_x, x, tuple(x.shape)),
        grad_kernel.to(kernel.dtype),
        grad.new_empty(0) if reverse_kernel is None or grad_reverse is None else grad_reverse.to(reverse_kernel.dtype),
        grad.new_empty(0) if initial_state is None or grad_state is None else grad_state.to(initial_state.dtype),
    )


def _groups(batch_size: int, length: int, starts: Tensor | None, lengths: Tensor | None) -> Iterator[_Group]:
    if starts is None or lengths is None:
        yield _Group(length, None, None)
        return
    documents = starts.shape[0]
    if starts.device.type == "cpu":
        by_size: dict[int, list[int]] = {}
        sizes = lengths.tolist()
        for slot, size in enumerate(sizes):
            if size > 0:
                by_size.setdefault(fft_size(2 * size), []).append(slot)
        chosen = [(max(sizes[slot] for slot in slots), torch.tensor(slots)) for _, slots in sorted(by_size.items())]
    else:
        slots = torch.arange(documents, device=starts.device)
        chosen = [(length, part) for part in slots.split(batch_size)]
    for longest, slot in chosen:
        position = torch.arange(longest, device=starts.device)
        inside = position < lengths[slot][:, None]
        yield _Group(longest, torch.where(inside, starts[slot][:, None] + position, batch_size * length), slot)


def _sizes(
    group: _Group, kernel: Tensor, reverse_kernel: Tensor | None, initial_state: Tensor | None
) -> tuple[int, int, int, int]:
    """Rows of initial state, taps and reverse taps in use, FFT size: what wraps around must miss all tokens."""
    history = 0 if initial_state is None else initial_state.shape[1]
    taps = min(kernel.shape[-1], group.length + history)
    reverse_taps = 0 if reverse_kernel is None else min(reverse_kernel.shape[-1], group.length - 1)
    return history, taps, reverse_taps, fft_size(group.length + max(history, taps - 1, reverse_taps))


def _inputs(x: Tensor, initial_state: Tensor | None, group: _Group, size: int, dtype: torch.dtype) -> Tensor:
    """(initial state, x) of the group's documents, zeros to ``size``: (G, C, n)."""
    history = 0 if initial_state is None else initial_state.shape[1]
    values = x if group.token is None else _gather(x, group.token)
    buffer = x.new_zeros((values.shape[0], x.shape[2], size), dtype=dtype)
    if initial_state is not None:
        before = initial_state if group.slot is None else initial_state[group.slot]
        buffer[..., :history] = before.transpose(1, 2)
    buffer[..., history : history + group.length] = values.transpose(1, 2)
    return buffer


def _outputs(grad: Tensor, group: _Group, history: int, size: int, dtype: torch.dtype) -> Tensor:
    """Gradients to y of the group's documents, at the outputs' places: (G, R, C, n)."""
    values = grad if group.token is None else _gather(grad, group.token)
    buffer = grad.new_zeros((values.shape[0], *grad.shape[2:], size), dtype=dtype)
    buffer[..., history : history + group.length] = values.permute(0, 2, 3, 1)
    return buffer


def _gather(values: Tensor, token: Tensor) -> Tensor:
    """Rows ``token`` of the flattened grid, zeros at its end's index (what lies in padding is never used)."""
    flat = values.flatten(0, 1)
    found = flat[token.clamp(max=flat.shape[0] - 1)]
    return torch.where((token < flat.shape[0]).view(*token.shape, *([1] * (found.dim() - 2))), found, 0)


def _kernel_spectrum(
    kernel: Tensor, reverse_kernel: Tensor | None, taps: int, reverse_taps: int, size: int, dtype: torch.dtype
) -> Tensor:
    """Transform of the kernels, (R, C, F)."""
    buffer = kernel.new_zeros((*kernel.shape[:-1], size), dtype=dtype)
    buffer[..., :taps] = kernel[..., :taps]
    if reverse_kernel is not None:
        buffer[..., size - reverse_taps :] = reverse_kernel[..., :reverse_taps].flip(-1)
    return rfft(buffer)


def _place(result: Tensor | None, group: _Group, values: Tensor, tokens: int) -> Tensor:
    """Adds a group's (G, T, ...) values to the flat result; one row more takes what is no token."""
    if group.token is None:
        return values.flatten(0, 1)
    if result is None:
        result = values.new_zeros((tokens + 1, *values.shape[2:]))
    return result.index_copy_(0, group.token.flatten(), values.flatten(0, 1))


def _grid(result: Tensor | None, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The flat result as a contiguous (B, L, ...) grid of x's dtype; zeros where no document was."""
    if result is None:
        return x.new_zeros(shape)
    return result[: shape[0] * shape[1]].view(shape).to(x.dtype, memory_format=torch.contiguous_format)
