"""Settings of the prefix objective, and the masks that it puts into rows."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from seqmodels.configuration import ConfigError
from seqmodels.models.config import ModelConfig
from seqmodels.tasks.masked_prefix import masked_positions
from seqmodels.tasks.text import TextBatch
from seqmodels.tasks.tokenizer import Tokenizer

_STREAM = 2  # of masked positions, beside those of documents and rows


class PrefixConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The joint objective of ``model.objective: prefix`` (JRT): the first ``model.prefix_length`` tokens of a
    row are read in both directions and partly masked; see :func:`seqmodels.models.prefix_loss.prefix_loss`.

    Attributes:
        mask_probability: of each token of the prefix, independently. Always the mask id, never another one.
        mask_id: stands for a masked token; the model's last id when absent. No token of the text may have it.
        next_token_weight, masked_weight: of the two mean cross-entropies.
    """

    mask_probability: Annotated[float, Meta(ge=0, lt=1)] = 0.15
    mask_id: Annotated[int, Meta(ge=0)] | None = None
    next_token_weight: Annotated[float, Meta(gt=0)] = 1.0
    masked_weight: Annotated[float, Meta(ge=0)] = 0.25


class PrefixMasking:
    """Masks of a run's rows: a row has the same ones whenever and wherever it is read.

    Raises:
        ConfigError: a mask id that the tokenizer uses.
    """

    def __init__(self, config: PrefixConfig | None, model: ModelConfig, tokenizer: Tokenizer, seed: int) -> None:
        assert model.prefix_length is not None  # check_prefix has seen to it
        self.config, self.seed = config or PrefixConfig(), seed
        self.length = model.prefix_length
        self.mask_id = _mask_id(self.config, model)
        if self.mask_id < tokenizer.vocab_size:
            raise ConfigError(
                f"the mask id {self.mask_id} is a token of tokenizer {tokenizer.name!r}, whose ids end at "
                f"{tokenizer.vocab_size - 1}; give the model one more id (model.vocab_size="
                f"{tokenizer.vocab_size + 1}) or set prefix.mask_id to an id that the text does not have"
            )

    def masked(self, batch: TextBatch, first: int, *, validation: bool) -> TextBatch:
        """``batch``, whose rows have the numbers ``first`` on, with the positions masked in them."""
        masked = masked_positions(
            first, batch.tokens.shape[0], self.length, self.config.mask_probability,
            seed=self.seed, stream=(_STREAM, int(validation)),
        )  # fmt: skip
        return batch._replace(masked=masked)


def check_prefix(config: PrefixConfig | None, model: ModelConfig, sequence_length: int) -> None:
    """Refuses settings without the objective, and an objective without room for both of its losses."""
    if model.objective != "prefix":
        if config is not None:
            raise ConfigError(
                f"'prefix' is for model.objective=prefix; the model's objective is {model.objective!r}. "
                "Leave it out, or set model.objective=prefix"
            )
        return
    if model.prefix_length is None:
        raise ConfigError(
            "model.objective=prefix needs model.prefix_length, the tokens of a row that are read in both directions; "
            f"for example model.prefix_length={max(1, sequence_length // 2)}, half of data.sequence_length"
        )
    if model.prefix_length >= sequence_length:
        raise ConfigError(
            f"model.prefix_length={model.prefix_length} leaves no next token to predict in rows of "
            f"data.sequence_length={sequence_length}; lower the one or raise the other"
        )
    if _mask_id(config or PrefixConfig(), model) >= model.vocab_size:
        raise ConfigError(
            f"prefix.mask_id={(config or PrefixConfig()).mask_id} is no id of the model; "
            f"model.vocab_size={model.vocab_size}"
        )


def _mask_id(config: PrefixConfig, model: ModelConfig) -> int:
    return model.vocab_size - 1 if config.mask_id is None else config.mask_id
