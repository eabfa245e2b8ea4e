"""What is differentiated."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from seqmodels.layout import Layout
from seqmodels.models import LanguageModel
from seqmodels.models.prefix_loss import prefix_loss
from seqmodels.training.prefix import PrefixMasking


class Objective(nn.Module):
    """The model's loss as a module's ``forward``, which DDP, FSDP2 and compile wrap."""

    #: Names of what ``forward`` reports, the next-token loss first.
    parts: ClassVar[tuple[str, ...]] = ("loss",)

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: Tensor, targets: Tensor, layout: Layout, masked: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """What to differentiate, the mean cross-entropies (parts,) in nats for each token, and what the layers say
        of themselves: auxiliary losses (in the first) and metrics by name."""
        output = self.model.loss(tokens, targets, layout=layout)
        return output.loss, (output.cross_entropy / output.num_targets.clamp(min=1))[None], output.aux


class PrefixObjective(Objective):
    """Next tokens after the prefix and masked tokens inside it (:func:`~seqmodels.models.prefix_loss.prefix_loss`)."""

    parts = ("loss", "masked_loss")

    def __init__(self, model: LanguageModel, mask_id: int, next_token_weight: float, masked_weight: float) -> None:
        super().__init__(model)
        self.mask_id, self.next_token_weight, self.masked_weight = mask_id, next_token_weight, masked_weight

    def forward(
        self, tokens: Tensor, targets: Tensor, layout: Layout, masked: Tensor | None = None
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        assert masked is not None  # the loop draws it for this objective
        output = prefix_loss(
            self.model, tokens, masked,
            mask_id=self.mask_id, targets=targets, layout=layout,
            next_token_weight=self.next_token_weight, masked_weight=self.masked_weight,
        )  # fmt: skip
        return output.loss, torch.stack([output.next_token, output.masked]), output.aux


def make_objective(model: LanguageModel, masking: PrefixMasking | None) -> Objective:
    """Next-token prediction, or the joint objective where rows have a masked prefix."""
    if masking is None:
        return Objective(model)
    config = masking.config
    return PrefixObjective(model, masking.mask_id, config.next_token_weight, config.masked_weight)
