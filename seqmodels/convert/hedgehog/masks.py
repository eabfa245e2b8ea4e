"""Padding masks for converted models: which keys count.

A linear layer forgets nothing and cannot be told afterwards who may see whom. It can leave keys out,
so a two-dimensional padding mask is all that it takes; everything else is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

_ONE_A_ROW = "Give one sequence a row, with position_ids that rise by one, and mark padding in a 2-D attention_mask"
_PLAIN = (masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)


def key_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = masking_utils.causal_mask_function,
    attention_mask: Tensor | None = None,
    config: Any = None,
    **options: Any,
) -> Tensor | None:
    """(batch, tokens seen with these) bool, True on tokens that count; None when all do.

    With softmax kept it is transformers' own mask. Registered as the mask of converted models, with the
    arguments that transformers gives to every mask function.

    Raises:
        ValueError: packed sequences, sliding windows or other patterns between tokens; a mask that is
            neither left nor right padding; a mask of another length.
    """
    if config.hedgehog["kind"] == "softmax":
        return masking_utils.sdpa_mask(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **options
        )
    if mask_function not in _PLAIN:
        raise ValueError(
            "converted attention sees all tokens before the current one and no other pattern; this call asks for "
            f"packed sequences (position_ids that start again), a sliding window or a mask of its own. {_ONE_A_ROW}"
        )
    if attention_mask is None:
        return None
    if attention_mask.shape != (batch_size, kv_length):
        raise ValueError(
            f"attention_mask is {tuple(attention_mask.shape)}; expected (batch, tokens seen so far and now) = "
            f"({batch_size}, {kv_length})"
        )
    if not torch.compiler.is_compiling():
        _check_padding(attention_mask)
        if attention_mask[:, kv_length - q_length :].all():  # old padding never reached the state
            return None
    return attention_mask


def check_positions(positions: Tensor | None, attention_mask: Tensor | None) -> None:
    """Raises ValueError for ``position_ids`` (batch, new tokens) that do not rise by one between tokens that count:
    packed sequences, whose tokens a linear state would mix. Not checked under ``torch.compile``."""
    if positions is None or positions.dim() != 2 or torch.compiler.is_compiling():
        return
    broken = positions.diff(dim=1) != 1
    if attention_mask is not None and attention_mask.dim() == 2:
        real = attention_mask[:, -positions.shape[1] :].bool()
        broken = broken & real[:, 1:] & real[:, :-1]
    if broken.any():
        row = int(broken.any(dim=1).nonzero()[0])
        shown = ", ".join(map(str, positions[row % len(positions), :20].tolist()))
        raise ValueError(
            f"position_ids row {row} is {shown}{', ...' if positions.shape[1] > 20 else ''}: packed sequences, which "
            f"converted attention would mix. {_ONE_A_ROW}"
        )


def check_two_dimensional(mask: Tensor | None) -> None:
    """Raises ValueError for a mask that transformers hands on untouched: one of four dimensions."""
    if mask is not None and mask.dim() != 2:
        raise ValueError(
            f"attention_mask has {mask.dim()} dimensions {tuple(mask.shape)}; converted attention takes padding masks "
            "of shape (batch, length) only, because who may see whom cannot be chosen pair by pair"
        )


def _check_padding(mask: Tensor) -> None:
    changes = (mask[:, 1:] != mask[:, :-1]).sum(dim=1)
    if (changes > 1).any():
        row = int((changes > 1).nonzero()[0])
        shown = "".join("01"[bool(entry)] for entry in mask[row, :60].tolist())
        raise ValueError(
            f"attention_mask row {row} is {shown}{'...' if mask.shape[1] > 60 else ''}: neither left padding (0s, then "
            "1s) nor right padding (1s, then 0s). Pad prompts on the left (tokenizer.padding_side = 'left') before "
            "generating from them"
        )
