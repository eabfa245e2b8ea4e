"""The small model of the recall protocols: embedding, layers, head; positions for the layers that need them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmodels.layout import Layout
from seqmodels.mixers.base import Mixer
from seqmodels.models.config import StackConfig
from seqmodels.models.normalization import Identity
from seqmodels.models.stack import Stack

EMBEDDING_STD = 0.02


class LastReadout(nn.Module):
    """What position p held, from the last hidden vector h alone: W_2 gelu(W_1 (h + s(p))), s sinusoidal (MAD)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)

    def forward(self, last: Tensor, positions: Tensor) -> Tensor:
        """(batch, d_model) and (batch, labels) to (batch, labels, d_model)."""
        rate = torch.exp(torch.arange(0, last.shape[-1], 2, device=last.device) * (-math.log(1e4) / last.shape[-1]))
        angle = positions[..., None] * rate
        position = torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)[..., : last.shape[-1]]
        return self.second(F.gelu(self.first(last[:, None] + position.to(last.dtype))))


class RecallModel(nn.Module):
    """logits = W norm(stack(dropout(W[tokens] + P))), with one matrix W for embedding and head.

    The norm, like the head, is computed where a position is read and nowhere else (:meth:`read`).

    Args:
        config: the blocks; ``config.dropout`` is the embedding's too.
        vocab_size: token ids.
        max_length: rows of the learned positions P; None for none.
        last: read every position from the last hidden vector (:class:`LastReadout`), not from its own.

    Where a layer reads a prefix in both directions, all tokens but the last are the prefix (``reads_prefix``).
    """

    def __init__(
        self, config: StackConfig, vocab_size: int, max_length: int | None = None, *, last: bool = False
    ) -> None:
        super().__init__()
        self.last = LastReadout(config.d_model) if last else None
        self.embedding = nn.Embedding(vocab_size, config.d_model)
        self.positions = None if max_length is None else nn.Parameter(torch.empty(max_length, config.d_model))
        self.stack = Stack(config)
        self.norm = self.stack.norm
        self.stack.norm = Identity()
        self.reads_prefix = any(layer.causality == "prefix" for layer in self.layers())
        self.dropout = config.dropout
        for weight in (self.embedding.weight, self.positions):
            if weight is not None and not weight.is_meta:
                nn.init.normal_(weight, std=EMBEDDING_STD)

    def forward(self, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(batch, length) ids to hidden vectors (batch, length, d_model) before the norm, and the layers' losses
        and metrics."""
        h = F.embedding(tokens, self.embedding.weight)
        if self.positions is not None:
            h = h + self.positions[: tokens.shape[1]]
        layout = None
        if self.reads_prefix:
            batch, length = tokens.shape
            layout = Layout.full(batch, length, prefix_lengths=[length - 1] * batch, device=tokens.device)
        output = self.stack(F.dropout(h, self.dropout, self.training) if self.dropout else h, layout=layout)
        return output.hidden, output.aux

    def read(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Norms of the hidden vectors at ``positions`` (batch, labels): (batch, labels, d_model); the head sees no
        others."""
        if self.last is not None:
            return self.last(self.norm(hidden[:, -1]), positions)
        return self.norm(hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1])))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d_model) to (..., vocab_size)."""
        return F.linear(hidden, self.embedding.weight)

    def layers(self) -> list[Mixer]:
        """Every layer at every site."""
        return [layer for _, layer, _ in self.stack.named_layers()]

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
