"""How a prefix model reads a prompt, above all one that is shorter than the prefix it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.models.config import ModelConfig

ShortPrompts = Literal["pad", "repeat", "reencode"]


class Prompts(NamedTuple):
    """Left-padded prompts, ready to be read.

    Attributes:
        tokens: (batch, longest) int64.
        lengths: tokens of each row that are read.
        prefix_lengths: of them, those that are read in both directions; None where no layer does.
        compat_mask: (batch, longest) bool, True on pads that are read; None when there is none.
    """

    tokens: Tensor
    lengths: list[int]
    prefix_lengths: list[int] | None
    compat_mask: Tensor | None

    def first_piece(self, chunk: int) -> int:
        """Columns of the first call: a token of every row, the whole of every prefix, else ``chunk`` tokens."""
        longest, shortest = max(self.lengths), min(self.lengths)
        end = longest - shortest + chunk
        if self.prefix_lengths is not None:
            pairs = zip(self.lengths, self.prefix_lengths, strict=True)
            end = max(end, *(longest - length + prefix for length, prefix in pairs))
        return min(longest, end)

    def layout(self, columns: int, device: torch.device) -> Layout | None:
        """Of the first ``columns`` columns; None where every row is full and has no prefix."""
        longest = max(self.lengths)
        if self.prefix_lengths is None and min(self.lengths) == longest:
            return None
        lengths = [length - (longest - columns) for length in self.lengths]
        layout = Layout.left_padded(lengths, columns, prefix_lengths=self.prefix_lengths, device=device)
        if self.compat_mask is None:
            return layout
        return layout.with_compat_mask(self.compat_mask[:, :columns].to(device))


class PrefixReading:
    """The reading of prompts by one model; without a prefix objective, plain left padding.

    Prompts of at least M = ``prefix_length`` tokens have their first M as prefix, and the rest is causal.
    For shorter ones (JRT, arXiv:2407.05483, appendix):

    ============  ==========================================================================================
    ``pad``       the prefix is the prompt: what left padding to M under an exact mask gives, without pads
    ``repeat``    the prompt is read twice, so that it fills more of the prefix
    ``reencode``  as ``pad``, and every new token that still fits the prefix joins it: the whole text so far
                  is read again, until it is longer than M
    ============  ==========================================================================================

    Args:
        config: of the model.
        short_prompts: one of the three.
        compat_pad: with ``pad``: left-pad to M with this id instead, as released checkpoints do. The pads are
            tokens to every layer, but prefix linear attention takes their keys for zero (``Layout.compat_mask``).

    Raises:
        ValueError: an unknown way, or one that needs a prefix length for a model without one.
    """

    def __init__(self, config: ModelConfig, short_prompts: ShortPrompts = "pad", compat_pad: int | None = None) -> None:
        if short_prompts not in get_args(ShortPrompts):
            raise ValueError(
                f"short_prompts is {short_prompts!r}; expected one of {', '.join(map(repr, get_args(ShortPrompts)))}"
            )
        if compat_pad is not None and short_prompts != "pad":
            raise ValueError(f"compat_pad={compat_pad} pads prompts, but short_prompts is {short_prompts!r}, not 'pad'")
        if compat_pad is not None and not 0 <= compat_pad < config.vocab_size:
            raise ValueError(f"compat_pad is {compat_pad}; expected 0 <= id < vocab_size={config.vocab_size}")
        if (short_prompts != "pad" or compat_pad is not None) and config.prefix_length is None:
            what = f"short_prompts={short_prompts!r}" if compat_pad is None else f"compat_pad={compat_pad}"
            raise ValueError(
                f"{what} is about prompts shorter than the model's prefix_length, which is null "
                f"(objective {config.objective!r}); set it to the length the model was trained with"
            )
        self.prefix = config.objective == "prefix"
        self.prefix_length = config.prefix_length
        self.short_prompts, self.compat_pad = short_prompts, compat_pad

    def expand(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The tokens that are read for each prompt, compatible padding left out."""
        if self.short_prompts != "repeat":
            return [list(prompt) for prompt in prompts]
        return [[*prompt, *prompt] if self.is_short(len(prompt)) else list(prompt) for prompt in prompts]

    def is_short(self, length: int) -> bool:
        """Whether a prompt of ``length`` tokens does not fill the prefix."""
        return self.prefix_length is not None and length < self.prefix_length

    def reads_again(self, length: int) -> bool:
        """Whether a text that has grown to ``length`` tokens is to be read anew."""
        return self.short_prompts == "reencode" and self.prefix_length is not None and length <= self.prefix_length

    def prepare(self, texts: Sequence[Sequence[int]]) -> Prompts:
        """Left-pads what :meth:`expand` returned."""
        pads = [0] * len(texts)
        if self.compat_pad is not None and self.prefix_length is not None:
            pads = [max(0, self.prefix_length - len(text)) for text in texts]
        lengths = [pad + len(text) for pad, text in zip(pads, texts, strict=True)]
        longest = max(lengths)
        tokens = torch.full((len(texts), longest), self.compat_pad or 0, dtype=torch.int64)
        for row, text in enumerate(texts):
            tokens[row, longest - len(text) :] = torch.as_tensor(text, dtype=torch.int64)
        prefixes = None
        if self.prefix:
            bound = longest if self.prefix_length is None else self.prefix_length
            prefixes = [min(length, bound) for length in lengths]
        mask = None
        if any(pads):
            column = torch.arange(longest)
            start = torch.tensor([longest - length for length in lengths])[:, None]
            mask = (column >= start) & (column < start + torch.tensor(pads)[:, None])
        return Prompts(tokens, lengths, prefixes, mask)
