"""Code length of whole documents under a language model whose state is carried from window to window."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.utils._pytree as pytree

from seqmodels.layout import Layout
from seqmodels.ops.linear_cross_entropy import IGNORE_INDEX
from seqmodels.tasks.token_cache import TokenCache

if TYPE_CHECKING:
    from seqmodels.models import LanguageModel


class TextScore(NamedTuple):
    """A language model's result on a set of documents.

    Attributes:
        nats: code length of all documents, their ends included; of what follows the prefixes, where there are some.
        tokens: predicted tokens.
        text_bytes: bytes of the predicted text; with prefixes, at the texts' mean number of bytes a token.
        seconds: wall time.
    """

    nats: float
    tokens: int
    text_bytes: int
    seconds: float

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.text_bytes

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens): per token, so comparable between equal tokenizers only."""
        return math.exp(self.nats / self.tokens)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@torch.no_grad()
def score_documents(
    model: LanguageModel,
    cache: TokenCache,
    documents: np.ndarray,
    *,
    window: int = 1024,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> TextScore:
    """-sum_t log p(x_t | x_<t) over every token of every document, from its first to its end.

    ``batch_size`` lanes each read one document, ``window`` tokens at a time, and hand their state
    on; a lane whose document has ended takes the next one with a fresh state. Context is therefore
    never cut, and memory does not depend on the documents' lengths (except for full attention).

    A prefix model reads the first ``prefix_length`` tokens of each document in both directions; they are context
    and not scored, so its numbers compare with those of models that were scored behind the same prefixes only.

    Args:
        documents: indices into ``cache``.
        progress: called with (tokens done, tokens in all) after each window.

    Raises:
        ValueError: a prefix model without prefix length, a window that does not hold its prefix, or no document
            that is longer.
    """
    prefix = _prefix_length(model, window)
    device = next(model.parameters()).device
    sizes = np.diff(cache.offsets)[documents]
    waiting = [int(documents[i]) for i in np.argsort(sizes, kind="stable")]  # longest taken first
    total = int(sizes.sum())
    longest = -(-int(sizes.max()) // window) * window  # a lane reads whole windows, padding included
    lanes: list[tuple[int, int]] = []  # (document, tokens read)
    state = None
    nats, done, scored = torch.zeros((), dtype=torch.float64, device=device), 0, 0
    model.eval()
    begin = time.perf_counter()
    while waiting or lanes:
        fresh = min(batch_size - len(lanes), len(waiting))
        if fresh:
            lanes += [(waiting.pop(), 0) for _ in range(fresh)]
            new = model.init_state(fresh, max_length=longest)
            state = new if state is None else pytree.tree_map(_joined, state, new)
        pieces = [cache.document(document)[read : read + window + 1].astype(np.int64) for document, read in lanes]
        length = max(len(piece) for piece in pieces) - 1
        tokens = torch.zeros(len(lanes), length, dtype=torch.int64)
        targets = torch.full_like(tokens, IGNORE_INDEX)
        for row, piece in enumerate(pieces):
            tokens[row, : len(piece) - 1] = torch.from_numpy(piece[:-1])
            targets[row, : len(piece) - 1] = torch.from_numpy(piece[1:])
        layout = None
        if prefix:
            pairs = zip(lanes, pieces, strict=True)
            prefixes = [min(prefix, len(piece) - 1) if read == 0 else 0 for (_, read), piece in pairs]
            layout = Layout.full(len(lanes), length, prefix_lengths=prefixes, device=device)
            for row, size in enumerate(prefixes):
                targets[row, :size] = IGNORE_INDEX
        output = model.loss(tokens.to(device), targets.to(device), state=state, layout=layout, return_state=True)
        nats += output.cross_entropy.double()
        scored += int((targets != IGNORE_INDEX).sum())
        done += sum(len(piece) - 1 for piece in pieces)
        # What is read past a document's end is padding: that lane's state is dropped here.
        lanes = [(document, read + window) for document, read in lanes]
        going = [row for row, (document, read) in enumerate(lanes) if read < len(cache.document(document)) - 1]
        lanes = [lanes[row] for row in going]
        assert output.state is not None  # asked for above
        state = output.state.select(torch.tensor(going, device=device)) if going else None
        if progress is not None:
            progress(done, total)
    if not scored:
        raise ValueError(f"no document is longer than the model's prefix_length={prefix}; there is nothing to score")
    text_bytes = int(cache.text_bytes[documents].sum())
    return TextScore(float(nats), scored, round(text_bytes * scored / total), time.perf_counter() - begin)


def _prefix_length(model: LanguageModel, window: int) -> int:
    """Tokens of each document that are read in both directions; 0 for a causal model."""
    if model.config.objective != "prefix":
        return 0
    prefix = model.config.prefix_length
    if prefix is None:
        raise ValueError("the model's objective is 'prefix' but its prefix_length is null; set it to score text")
    if prefix > window:
        raise ValueError(f"window={window} does not hold the model's prefix_length={prefix}; raise window")
    return prefix


def _joined(old: torch.Tensor | None, new: torch.Tensor | None) -> torch.Tensor | None:
    """Rows of both; a field may be None in a state."""
    return None if old is None or new is None else torch.cat([old, new])
