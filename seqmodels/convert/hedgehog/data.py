"""Batches for conversion: rows of text, with the next token or the masked tokens as targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from seqmodels.configuration import ConfigError
from seqmodels.convert.hedgehog.families import family_of
from seqmodels.convert.hedgehog.settings import ConversionSettings
from seqmodels.tasks.text import PackedText
from seqmodels.training.data import TextData, load_text

IGNORED = -100  # target of a token that is not predicted
_MASKED, _TO_MASK_TOKEN, _TO_RANDOM = 0.15, 0.8, 0.1  # BERT's recipe (arXiv:1810.04805, section 3.1)


class Batch(NamedTuple):
    """Both (rows, length) int64; targets are :data:`IGNORED` where nothing is predicted."""

    tokens: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.tokens.to(device), self.targets.to(device))


class ConversionData:
    """Training and held-out rows. A batch is a function of the settings and its number.

    Raises:
        ConfigError: no tokenizer with the model, ids beyond its vocabulary, a context it has no
            positions for, or an encoder without a mask token. CorpusError: see ``seqmodels.tasks``.
    """

    def __init__(self, settings: ConversionSettings, config: PreTrainedConfig) -> None:
        self.settings = settings
        length, positions = settings.data.sequence_length, config.max_position_embeddings
        if length > positions:
            raise ConfigError(f"data.sequence_length={length} is more than the model's {positions} positions; lower it")
        data = settings.data
        if data.tokenizer == "model":
            if not has_tokenizer(settings.model):
                raise ConfigError(
                    f"{settings.model!r} has no tokenizer with it; name one with data.tokenizer=PATH, or "
                    "data.tokenizer=bytes for a model of bytes"
                )
            data = msgspec.structs.replace(data, tokenizer=settings.model)
        self.text: TextData = load_text(data, seed=settings.seed, vocab_size=config.vocab_size)
        if self.text.validation is None:
            raise ConfigError(
                "there is no held-out text to measure on; set data.validation_fraction above 0, or data.validation"
            )
        self.vocab_size = config.vocab_size
        self.mask_token: int | None = None
        if family_of(config).objective == "masked_tokens":
            self.mask_token = _mask_token(settings, config)

    def train(self, step: int) -> Batch:
        return self._batch(self.text.train, step * self.settings.batch_size, self.settings.batch_size, stream=1)

    def held_out(self) -> list[Batch]:
        """The same rows at every call, in batches."""
        rows = self.text.validation
        assert rows is not None
        count, size = min(self.settings.evaluation_rows, rows.rows_per_epoch), self.settings.batch_size
        return [self._batch(rows, first, min(size, count - first), stream=0) for first in range(0, count, size)]

    def _batch(self, rows: PackedText, first: int, count: int, *, stream: int) -> Batch:
        batch = rows.batch(first, count)
        if self.mask_token is None:
            return Batch(batch.tokens, batch.targets)
        generator = torch.Generator().manual_seed((self.settings.seed * 1_000_003 + first) * 2 + stream)
        draw, change = (torch.rand(batch.tokens.shape, generator=generator) for _ in range(2))
        chosen = draw < _MASKED
        random = torch.randint(self.vocab_size, batch.tokens.shape, generator=generator)
        tokens = torch.where(chosen & (change < _TO_MASK_TOKEN), self.mask_token, batch.tokens)
        tokens = torch.where(chosen & (change >= 1 - _TO_RANDOM), random, tokens)
        return Batch(tokens, torch.where(chosen, batch.tokens, IGNORED))


def has_tokenizer(model: str) -> bool:
    """Whether a tokenizer comes with the model: on the hub it is taken to."""
    folder = Path(model)
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "tokenizer.model")
    return not folder.is_dir() or any((folder / name).is_file() for name in names)


def model_tokenizer(settings: ConversionSettings) -> PreTrainedTokenizerBase | None:
    """The tokenizer that the converted folder should carry."""
    from transformers import AutoTokenizer

    name = settings.model if settings.data.tokenizer == "model" else settings.data.tokenizer
    if name == "bytes":
        return AutoTokenizer.from_pretrained(settings.model) if has_tokenizer(settings.model) else None
    return AutoTokenizer.from_pretrained(name)


def _mask_token(settings: ConversionSettings, config: Any) -> int:
    if settings.mask_token is not None:
        if settings.mask_token >= config.vocab_size:
            raise ConfigError(
                f"mask_token={settings.mask_token} is beyond the model's {config.vocab_size} ids; give a smaller one"
            )
        return settings.mask_token
    tokenizer = model_tokenizer(settings)
    token = None if tokenizer is None else tokenizer.mask_token_id
    if not isinstance(token, int):
        raise ConfigError(
            f"{settings.model!r} predicts masked tokens and its tokenizer has no mask token; give its id as mask_token"
        )
    return token
