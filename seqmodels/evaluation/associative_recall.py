"""Perplexity of a model on associative-recall hits of a corpus."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seqmodels.evaluation.codec import sample_tokens
from seqmodels.evaluation.text_model import Pair, TextModel, fingerprint
from seqmodels.tasks.associative_recall_hits import DEFINITIONS, HitLoss, Slice, repeat_distances, slice_order
from seqmodels.tasks.bigrams import BigramCounter, pair_keys
from seqmodels.tasks.corpus import CorpusError, Document

GROUP = 64  # contexts between two lines of progress
PART = 1 << 22  # bytes of a document that are encoded at a time


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


class HitResult(NamedTuple):
    """What a file of ``seqmodels ar-hits`` says of another model."""

    model: str
    digest: str
    slices: dict[str, dict[str, Slice]]


def read_result(path: Path) -> HitResult:
    """A file of ``seqmodels ar-hits``; ValueError for any other."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        slices = {
            definition: {
                name: Slice(part["tokens"], part["nats"]) for name, part in found["slices"][definition].items()
            }
            for definition in DEFINITIONS
        }
        return HitResult(found["model"], found["digest"], slices)
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; expected a result of seqmodels ar-hits") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no result of seqmodels ar-hits ({type(error).__name__}: {error})") from error


def token_parts(model: TextModel, document: Document) -> Iterator[np.ndarray]:
    """A document's tokens in order, the model's prefix token before them where it has one.

    Token ids of a long text take many times its bytes, so it is encoded in parts of at most :data:`PART` bytes, cut
    behind line ends where there are any. A tokenizer that looks beyond a line may split otherwise there.
    """
    front = [] if model.prefix_token is None else [model.prefix_token]
    for text in _texts(document.content):
        yield np.array([*front, *model.encode(text.decode("utf-8", "replace"))], np.int64)
        front = []


def _texts(content: bytes) -> Iterator[bytes]:
    begin = 0
    while begin < len(content):
        end = min(len(content), begin + PART)
        if end < len(content):
            line = content.rfind(b"\n", begin, end) + 1
            # Without a line end at least not inside a character, of which UTF-8 continues at most three bytes.
            starts = (place for place in range(end, max(begin, end - 4), -1) if content[place] & 0xC0 != 0x80)
            end = line or next(starts, end)
        yield content[begin:end]
        begin = end


def tokenizer_mark(model: TextModel) -> str:
    """Differs between tokenizers that split or number a few lines of text differently."""
    return fingerprint(str([model.prefix_token, *sample_tokens(model)]))


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
    for document in documents:
        last = np.zeros(0, np.int64)
        for part in token_parts(model, document):
            tokens = np.concatenate([last, part])
            counter.add(tokens)
            last = tokens[-1:]
            if progress is not None:
                progress(counter.pairs)
    return counter


def check_window(model: TextModel, window: int) -> None:
    """ValueError for a window that holds no repeated pair, or more than the model reads."""
    if window < 4:
        raise ValueError(f"window is {window}; expected at least 4 tokens: pairs repeat from the fourth on")
    if model.max_length is not None and window > model.max_length:
        raise ValueError(
            f"window is {window}; {model.name} reads {model.max_length} tokens: give a window of at most that, for the "
            "models that it is compared with too"
        )


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
    check_window(model, window)
    counter.check_origin({"tokenizer": tokenizer_mark(model)})
    losses = {name: HitLoss(name) for name in DEFINITIONS}
    digest, count = hashlib.blake2b(digest_size=8), 0
    for group in _groups(_pieces(model, documents, window), contexts):
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


def _pieces(model: TextModel, documents: Iterable[Document], window: int) -> Iterator[np.ndarray]:
    """Contexts: each document from its beginning, ``window`` tokens at a time; a single token is none."""
    for document in documents:
        rest = np.zeros(0, np.int64)
        for part in token_parts(model, document):
            tokens = np.concatenate([rest, part])
            whole = len(tokens) // window * window
            yield from tokens[:whole].reshape(-1, window)
            rest = tokens[whole:]
        if len(rest) >= 2:
            yield rest


def _groups(pieces: Iterable[np.ndarray], limit: int | None) -> Iterator[list[np.ndarray]]:
    pieces = itertools.islice(pieces, limit)
    while group := list(itertools.islice(pieces, GROUP)):
        yield group
