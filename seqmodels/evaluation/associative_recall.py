"""Perplexity of a model on associative-recall hits of a corpus."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from seqmodels.evaluation.text_model import Pair, TextModel, fingerprint
from seqmodels.tasks.associative_recall_hits import DEFINITIONS, HitLoss, Slice, repeat_distances, slice_order
from seqmodels.tasks.bigrams import BigramCounter, pair_keys
from seqmodels.tasks.corpus import CorpusError, Document

_SAMPLE = "The quick brown fox, née Ünïcode, jumped 1,250 times over\n\tlazy_dogs(); -- naïve 北京 🦊 don't"
GROUP = 64  # contexts between two lines of progress


class HitScore(NamedTuple):
    """Slices by definition; ``digest`` of the tokens that were scored, ``count_error`` of the training counts."""

    slices: dict[str, dict[str, Slice]]
    contexts: int
    digest: str
    count_error: int

    def as_json(self) -> dict[str, Any]:
        return {
            "contexts": self.contexts,
            "digest": self.digest,
            "count_error": self.count_error,
            "slices": {
                definition: {
                    name: {"tokens": part.tokens, "nats": part.nats, "perplexity": _finite(part.perplexity)}
                    for name, part in ((name, slices[name]) for name in slice_order(slices))
                }
                for definition, slices in self.slices.items()
            },
        }


def token_stream(model: TextModel, documents: Iterable[Document]) -> Iterator[np.ndarray]:
    """Each document's tokens, the model's prefix token before them where it has one."""
    front = [] if model.prefix_token is None else [model.prefix_token]
    for document in documents:
        yield np.array([*front, *model.encode(document.content.decode("utf-8", "replace"))], np.int64)


def tokenizer_mark(model: TextModel) -> str:
    """Differs between tokenizers that split or number a few lines of text differently."""
    return fingerprint(str([model.prefix_token, *model.encode(_SAMPLE)]))


def count_bigrams(
    model: TextModel,
    documents: Iterable[Document],
    capacity: int,
    *,
    corpus: str = "",
    progress: Callable[[int], None] | None = None,
) -> BigramCounter:
    """Training counts with the model's own tokenizer, marked as of it and of ``corpus``.

    ``progress`` is told the pairs counted.
    """
    counter = BigramCounter(capacity, origin={"tokenizer": tokenizer_mark(model), "corpus": corpus})
    for tokens in token_stream(model, documents):
        counter.add(tokens)
        if progress is not None:
            progress(counter.pairs)
    return counter


def evaluate_hits(
    model: TextModel,
    documents: Iterable[Document],
    counter: BigramCounter,
    *,
    window: int = 2048,
    contexts: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> HitScore:
    """perplexity = exp(-mean log p(x_i | x_<i)) over all tokens, AR hits and the rest, by both definitions.

    Documents are cut into contexts of at most ``window`` tokens, each read alone, as training rows are. A prefix
    model reads them causally, from the second token on.

    Args:
        contexts: only the first so many; all when absent.

    Raises:
        ValueError: a window that holds no pair, or is beyond the model; counts of another tokenizer.
        CorpusError: no context of two tokens.
    """
    if window < 4:
        raise ValueError(f"window is {window}; expected at least 4 tokens: pairs repeat from the fourth on")
    if model.max_length is not None and window > model.max_length:
        raise ValueError(f"window is {window}; {model.name} reads {model.max_length} tokens")
    counter.check_origin({"tokenizer": tokenizer_mark(model)})
    losses = {name: HitLoss(name) for name in DEFINITIONS}
    digest, count = hashlib.blake2b(digest_size=8), 0
    for group in _groups(token_stream(model, documents), window, contexts):
        pairs: list[Pair] = [(piece[:1].tolist(), piece[1:].tolist()) for piece in group]
        for piece, scores in zip(group, model.log_likelihoods(pairs), strict=True):
            digest.update(piece.tobytes())
            distances, counts = repeat_distances(piece), counter.counts(pair_keys(piece))
            for loss in losses.values():
                loss.add(scores.log_probs, distances, counts, window)
        count += len(group)
        if progress is not None:
            progress(count)
    if not count:
        raise CorpusError("the corpus has no document of two tokens; there is nothing to score")
    digest.update(f"{window}/{counter.pairs}/{counter.error}".encode())
    return HitScore({name: loss.slices for name, loss in losses.items()}, count, digest.hexdigest(), counter.error)


def _finite(value: float | None) -> float | None:
    """JSON has no infinity."""
    return value if value is not None and math.isfinite(value) else None


def _groups(stream: Iterable[np.ndarray], window: int, limit: int | None) -> Iterator[list[np.ndarray]]:
    group: list[np.ndarray] = []
    given = 0
    for tokens in stream:
        for begin in range(0, len(tokens), window):
            piece = tokens[begin : begin + window]
            if len(piece) < 2:
                continue
            if given == limit:
                break
            group.append(piece)
            given += 1
            if len(group) == GROUP:
                yield group
                group = []
        if given == limit:
            break
    if group:
        yield group
