"""What is differentiated."""

from __future__ import annotations

from torch import Tensor, nn

from seqmodels.layout import Layout
from seqmodels.models import LanguageModel


class Objective(nn.Module):
    """The model's loss as a module's ``forward``, which DDP, FSDP2 and compile wrap."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, targets: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """What to differentiate, and the mean cross-entropy in nats for each token."""
        output = self.model.loss(tokens, targets, layout=layout)
        return output.loss, output.cross_entropy / output.num_targets.clamp(min=1)
