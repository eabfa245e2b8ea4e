"""Documents of the GPU kernels: flags of tokens, and the states at documents' ends as gathers."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.documents import token_table

INSIDE, FIRST, LAST = 1, 2, 4


def token_flags(x: Tensor, starts: Tensor | None, lengths: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(batch, length) document slot, and the sum of INSIDE, FIRST and LAST, of every token; None, None without."""
    if starts is None or lengths is None:
        return None, None
    table = token_table(starts, lengths, x.shape[0], x.shape[1])
    flags = INSIDE * table.valid.byte() + FIRST * table.first.byte() + LAST * table.last.byte()
    return table.document.contiguous(), flags


def final_state_of(h: Tensor, initial_state: Tensor | None, starts: Tensor | None, lengths: Tensor | None) -> Tensor:
    """The last state of every document; its initial state where it is empty."""
    if starts is None or lengths is None:
        return h[:, -1].clone(memory_format=torch.contiguous_format)
    last = (starts + lengths - 1).clamp(0, h.shape[0] * h.shape[1] - 1)
    empty = torch.zeros_like(h[0, :1]) if initial_state is None else initial_state
    return torch.where(_used(lengths, h), h.flatten(0, 1)[last], empty)


def grad_initial_state(
    decay: Tensor, g: Tensor, grad_final: Tensor, starts: Tensor | None, lengths: Tensor | None
) -> Tensor:
    """conj(decay) g of every document's first token; the gradient to its final state where it is empty."""
    rows, length = g.shape[:2]
    first = torch.arange(rows, device=g.device) * length if starts is None else starts.clamp(max=rows * length - 1)
    g_first = g.flatten(0, 1)[first]
    decay_first = decay.flatten(0, 1)[first] if decay.dim() == g.dim() else decay
    if g.dim() == 3:
        found = decay_first * g_first
    else:
        (real, imaginary), (g_real, g_imaginary) = decay_first.unbind(-1), g_first.unbind(-1)
        found = torch.stack((real * g_real + imaginary * g_imaginary, real * g_imaginary - imaginary * g_real), -1)
    return found if lengths is None else torch.where(_used(lengths, g), found, grad_final)


def _used(lengths: Tensor, h: Tensor) -> Tensor:
    return (lengths > 0).view(-1, *([1] * (h.dim() - 2)))
