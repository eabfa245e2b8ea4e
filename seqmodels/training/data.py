"""The text a training configuration names, tokenised and split."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from seqmodels.configuration import ConfigError
from seqmodels.tasks.corpus import open_corpus
from seqmodels.tasks.text import PackedText, split_documents
from seqmodels.tasks.token_cache import TokenCache, open_token_cache
from seqmodels.tasks.tokenizer import Tokenizer, load_tokenizer
from seqmodels.training.config import DataConfig


class TextData(NamedTuple):
    """Training rows, validation rows (None without validation), and the held-out documents behind them."""

    train: PackedText
    validation: PackedText | None
    held_out: tuple[TokenCache, np.ndarray]
    tokenizer: Tokenizer

    @property
    def digest(self) -> str:
        """Identifies the corpora; a checkpoint goes on with the same ones only."""
        return f"{self.train.cache.digest}/{self.held_out[0].digest}"


def load_text(config: DataConfig, *, seed: int, vocab_size: int) -> TextData:
    """Reads, tokenises (once, into the cache) and splits.

    Raises:
        CorpusError: missing, empty, or too small.
        ConfigError: a tokenizer with more ids than the model's ``vocab_size``.
    """
    tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is less than the {tokenizer.vocab_size} ids of tokenizer "
            f"{tokenizer.name!r}; set model.vocab_size={tokenizer.vocab_size}"
        )
    cache = _cache(config.source, config, tokenizer)
    if config.validation is None:
        train, held_out = split_documents(cache, config.validation_fraction, seed)
        other = cache
    else:
        other = _cache(config.validation, config, tokenizer)
        train, held_out = np.arange(len(cache.names)), np.arange(len(other.names))
    rows = PackedText(cache, train, config.sequence_length, seed=seed)
    validation = None
    if len(held_out):
        validation = PackedText(other, held_out, config.sequence_length, seed=seed)
    return TextData(rows, validation, (other, held_out), tokenizer)


def _cache(source: str, config: DataConfig, tokenizer: Tokenizer) -> TokenCache:
    corpus = open_corpus(source, suffixes=config.suffixes, text_column=config.text_column, split=config.split)
    return open_token_cache(corpus, tokenizer, cache_folder(config))


def cache_folder(config: DataConfig) -> Path:
    """``data.cache``, or the user's cache folder."""
    if config.cache is not None:
        return Path(config.cache)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "seqmodels" / "tokens"
