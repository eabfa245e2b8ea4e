"""Short convolution by the causal-conv1d package, where it is installed.

Its weight gradient adds with atomics, so its last bits differ from run to run: it runs when it
is asked for by name, never by ``auto``. The package keeps states in the inputs' dtype; ours,
float32, are rounded on the way in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.documents import token_table
from seqmodels.ops.short_conv.causal_conv1d_package import package_function, refusal
from seqmodels.ops.short_conv.states import final_state_of

BY_NAME_ONLY = True


def supports(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    *rest: object,
) -> str | None:
    if starts is not None and initial_state is not None:
        return "causal-conv1d takes packed documents or an initial state, not both"
    return refusal("causal_conv1d_fn", x, weight)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    function = package_function("causal_conv1d_fn")
    assert function is not None  # supports() has looked
    batch_size, length, channels = x.shape
    x = x.contiguous()
    history, valid, document = weight.shape[1] - 1, None, None
    if starts is not None and lengths is not None:
        table = token_table(starts, lengths, batch_size, length)
        valid = table.valid.unsqueeze(-1)
        # Padding is a document of its own, so that no garbage crosses into a real one.
        document = torch.where(table.valid, table.document, starts.shape[0]).to(torch.int32)
    y = function(
        x.transpose(1, 2),
        weight.contiguous(),
        None if bias is None else bias.to(weight.dtype),
        seq_idx=document,
        initial_states=None if initial_state is None else initial_state.to(x.dtype).transpose(1, 2),
        activation="silu" if silu else None,
    ).transpose(1, 2)
    if valid is not None:
        y = torch.where(valid, y, 0)
    documents = batch_size if starts is None else starts.shape[0]
    if initial_state is None:
        initial_state = x.new_zeros((documents, history, channels), dtype=torch.float32)
    if starts is None or lengths is None:
        starts = torch.arange(batch_size, device=x.device) * length
        lengths = torch.full_like(starts, length)
    return y.contiguous(), final_state_of(x, initial_state, starts, lengths)
