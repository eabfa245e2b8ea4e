"""What is differentiated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from seqmodels.configuration import ConfigError
from seqmodels.layout import Layout
from seqmodels.models import LanguageModel
from seqmodels.models.prefix_loss import prefix_loss
from seqmodels.models.stack import ModelState
from seqmodels.training.prefix import PrefixMasking
from seqmodels.training.windows import Windows, begin_window


class ObjectiveOutput(NamedTuple):
    """What an objective returns.

    Attributes:
        loss: what to differentiate.
        parts: (parts,), the mean cross-entropies in nats for each token.
        aux: what the layers say of themselves: auxiliary losses (in ``loss``) and metrics by name.
        state: of windows: a row for each row of the batch after its last token, detached.
    """

    loss: Tensor
    parts: Tensor
    aux: dict[str, Tensor]
    state: ModelState | None = None


class Objective(nn.Module):
    """The model's loss as a module's ``forward``, which DDP, FSDP2 and compile wrap.

    Over n windows it is the mean of their losses. A state goes from each window to the next with its gradient; all
    windows but the last are computed again in the backward, so that activations of one window at a time are kept.

    Args:
        model: a language model.
        longest: tokens of the longest document that windows cut, for states that grow with the context.
    """

    #: Names of what ``forward`` reports, the next-token loss first.
    parts: ClassVar[tuple[str, ...]] = ("loss",)

    def __init__(self, model: LanguageModel, longest: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.longest = longest

    def forward(
        self, tokens: Tensor, targets: Tensor, layout: Layout | Windows, masked: Tensor | None = None
    ) -> ObjectiveOutput:
        """The loss of (rows, length) tokens: of one window without a past, or of those of ``layout``."""
        if isinstance(layout, Windows):
            return self._over_windows(tokens, targets, layout)
        output = self.model.loss(tokens, targets, layout=layout)
        return ObjectiveOutput(output.loss, (output.cross_entropy / output.num_targets.clamp(min=1))[None], output.aux)

    def _over_windows(self, tokens: Tensor, targets: Tensor, windows: Windows) -> ObjectiveOutput:
        fresh = self.model.init_state(1, max_length=self.longest)
        fresh = fresh.map(lambda tensor: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
        count = len(windows.layouts)
        state, outputs = windows.state, []
        pieces = zip(tokens.chunk(count, 1), targets.chunk(count, 1), strict=True)
        for index, (inputs, wanted) in enumerate(pieces):
            arguments = (
                inputs, wanted, windows.layouts[index], windows.sources[index], windows.ends[index], state, fresh
            )  # fmt: skip
            if torch.is_grad_enabled() and index < count - 1:
                output = checkpoint(self._window, *arguments, use_reentrant=False)
            else:
                output = self._window(*arguments)
            assert isinstance(output, ObjectiveOutput)
            state = output.state
            outputs.append(output)
        assert state is not None
        return ObjectiveOutput(
            torch.stack([output.loss for output in outputs]).mean(0),
            torch.stack([output.parts for output in outputs]).mean(0),
            {name: torch.stack([output.aux[name] for output in outputs]).float().mean(0) for name in outputs[0].aux},
            state.detach(),
        )

    def _window(
        self,
        tokens: Tensor,
        targets: Tensor,
        layout: Layout,
        source: Tensor,
        end: Tensor,
        carried: ModelState | None,
        fresh: ModelState,
    ) -> ObjectiveOutput:
        before = begin_window(carried, fresh, source)
        output = self.model.loss(tokens, targets, layout=layout, state=before, return_state=True)
        assert output.state is not None
        parts = (output.cross_entropy / output.num_targets.clamp(min=1))[None]
        return ObjectiveOutput(output.loss, parts, output.aux, output.state.select(end))


class PrefixObjective(Objective):
    """Next tokens after the prefix and masked tokens inside it (:func:`~seqmodels.models.prefix_loss.prefix_loss`)."""

    parts = ("loss", "masked_loss")

    def __init__(self, model: LanguageModel, mask_id: int, next_token_weight: float, masked_weight: float) -> None:
        super().__init__(model)
        self.mask_id, self.next_token_weight, self.masked_weight = mask_id, next_token_weight, masked_weight

    def forward(
        self, tokens: Tensor, targets: Tensor, layout: Layout | Windows, masked: Tensor | None = None
    ) -> ObjectiveOutput:
        assert isinstance(layout, Layout)  # no rows of windows for this objective (reading_plan)
        assert masked is not None  # the loop draws it for this objective
        output = prefix_loss(
            self.model, tokens, masked,
            mask_id=self.mask_id, targets=targets, layout=layout,
            next_token_weight=self.next_token_weight, masked_weight=self.masked_weight,
        )  # fmt: skip
        return ObjectiveOutput(output.loss, torch.stack([output.next_token, output.masked]), output.aux)


def make_objective(model: LanguageModel, masking: PrefixMasking | None, longest: int | None = None) -> Objective:
    """Next-token prediction, or the joint objective where rows have a masked prefix."""
    if masking is None:
        return Objective(model, longest)
    config = masking.config
    return PrefixObjective(model, masking.mask_id, config.next_token_weight, config.masked_weight)


def state_template(model: LanguageModel) -> ModelState:
    """The structure of the model's state, after a check that it can go on from one.

    Raises:
        ConfigError: a layer without a state, or one that refuses it.
    """
    was_training = model.training
    asked = "carry_state and backpropagation_windows need layers that go on from a state"
    for spec, layer, site in model.backbone.named_layers():
        try:
            layer.init_state(1, max_length=1, device="meta")
        except NotImplementedError as error:
            raise ConfigError(f"{asked}; block {site} ({spec.name}) has no init_state") from error
    try:
        with torch.no_grad():
            token = torch.zeros(1, 1, dtype=torch.int64, device=model.embedding.weight.device)
            model.eval()  # before the first call: in training mode layers count the meta tokens they read
            template = model.init_state(1, max_length=1)
            model.encode(token, template, return_state=True)
            return template
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"{asked}: {error}") from error
    finally:
        model.train(was_training)


@contextlib.contextmanager
def buffers_kept(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Buffers as they were: what a forward counts in them must not be counted again when it is recomputed."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()] if wanted else []
    yield
    with torch.no_grad():
        for buffer, value in before:
            buffer.copy_(value)
