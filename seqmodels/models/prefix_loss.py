"""The JRT-RNN's training objective: next tokens after the prefix, masked tokens inside it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.models.language_model import LanguageModel
from seqmodels.models.loss import next_token_targets
from seqmodels.ops.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy


class PrefixLossOutput(NamedTuple):
    """What :func:`prefix_loss` returns.

    Attributes:
        loss: what to differentiate: the weighted sum of both means plus the auxiliary losses.
        next_token: mean cross-entropy of the next tokens after the prefix, in nats.
        masked: mean cross-entropy of the masked tokens of the prefix, in nats; 0 when none is masked.
        aux: auxiliary losses and metrics by name.
    """

    loss: Tensor
    next_token: Tensor
    masked: Tensor
    aux: dict[str, Tensor]


def prefix_loss(
    model: LanguageModel,
    tokens: Tensor,
    masked: Tensor,
    *,
    mask_id: int,
    targets: Tensor | None = None,
    layout: Layout | None = None,
    next_token_weight: float = 1.0,
    masked_weight: float = 0.25,
) -> PrefixLossOutput:
    r"""One forward of rows t_0 .. t_{N-1} whose first M tokens are the prefix, and its two losses:

    .. code-block:: text

        x_i   = mask_id where i < M is masked, t_i elsewhere
        loss  = w_1 mean_{i >= M} CE(logits_i, t_{i+1}) + w_2 mean_{masked i} CE(logits_i, t_i)

    A masked token is predicted at its own position, from both sides; t_M is no target, since the token
    before it has read t_M's whole prefix but stands inside it (JRT, arXiv:2407.05483, section 4.2). A mean
    over no token is 0.

    Packed documents each have a prefix of their own: those of their tokens that stand in the first M
    columns. A row that is one document is the paper's sample.

    Args:
        tokens: (batch, length) ids, unmasked.
        masked: (batch, M) bool, 1 <= M < length.
        mask_id: id that takes the place of a masked token.
        targets: (batch, length), the next token at every position (-100 where none is); by default the
            next token of the same document. Those of the first M columns are not scored.
        layout: documents; one a row when omitted. Prefix lengths in it are replaced.
        next_token_weight, masked_weight: w_1 and w_2. The paper divides by their sum, its code does not.

    Raises:
        ValueError: a model of another objective, or shapes that do not fit.
    """
    if model.config.objective != "prefix":
        raise ValueError(f"prefix_loss: the model's objective is {model.config.objective!r}; set objective: prefix")
    if masked.dim() != 2 or masked.shape[0] != tokens.shape[0] or not 1 <= masked.shape[1] < tokens.shape[1]:
        raise ValueError(
            f"prefix_loss: masked is {tuple(masked.shape)} beside tokens {tuple(tokens.shape)}; expected "
            f"(batch, M) with 1 <= M < length, so that a next token is left to predict"
        )
    prefix = masked.shape[1]
    if layout is None:
        layout = Layout.full(*tokens.shape, device=tokens.device)
    layout = layout.with_prefix(prefix_columns(layout, prefix))
    targets = next_token_targets(tokens, layout) if targets is None else targets
    masked = masked & layout.valid[:, :prefix]
    inputs = torch.cat([tokens[:, :prefix].masked_fill(masked, mask_id), tokens[:, prefix:]], 1)
    hidden, _, aux = model.encode(inputs, layout=layout)
    next_token = _mean(model, hidden[:, prefix:], targets[:, prefix:])
    restored = _mean(model, hidden[:, :prefix], tokens[:, :prefix].masked_fill(~masked, IGNORE_INDEX))
    loss = next_token_weight * next_token + masked_weight * restored
    for name, value in aux.items():
        if name.endswith("_loss"):
            loss = loss + value
    return PrefixLossOutput(loss, next_token.detach(), restored.detach(), aux)


def prefix_columns(layout: Layout, columns: int) -> Tensor:
    """(documents,) int64: tokens of each document in the first ``columns`` columns of its row."""
    return torch.minimum((columns - layout.starts % layout.length).clamp(min=0), layout.lengths)


def _mean(model: LanguageModel, hidden: Tensor, targets: Tensor) -> Tensor:
    total = linear_cross_entropy(hidden.flatten(0, 1), model.head_weight, targets.flatten().long())
    return total / (targets >= 0).sum().clamp(min=1)
