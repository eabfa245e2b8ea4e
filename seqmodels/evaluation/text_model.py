"""The protocol that every text evaluation asks of a model, and what opens one by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch

Pair = tuple[Sequence[int], Sequence[int]]  # context and continuation, token ids
Item = TypeVar("Item")
BATCHES = 4  # batches between two writes: what a killed run loses, and the texts that those of equal length are among


class TokenScores(NamedTuple):
    """Of a continuation's tokens: ``log_probs`` (tokens,) float64 in nats; ``greedy`` (tokens,) bool, whether each
    is the most likely token."""

    log_probs: np.ndarray
    greedy: np.ndarray

    @property
    def total(self) -> float:
        return float(self.log_probs.sum())


class TextModel(Protocol):
    """A causal language model with its tokenizer.

    Attributes:
        name: for tables.
        identity: changes when weights or tokenizer do; results of another identity are refused.
        front: ids that the tokenizer puts before every text by itself.
        prefix_token: id that stands before a text with no context; None where the tokenizer has none.
        max_length: longest context in tokens, None where nothing bounds it.
        batch_size: prompts that are read side by side.
    """

    name: str
    identity: str
    front: list[int]
    prefix_token: int | None
    max_length: int | None
    batch_size: int

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str] = (), window: int | None = None
    ) -> list[str]:
        """Greedy continuations, each before its first stop string.

        Args:
            window: of a prompt and its answer; the prompt's last ``window - max_new_tokens`` tokens are read.
        """
        ...

    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[TokenScores]:
        """log p of every token of the continuations, each behind its context (at least one token)."""
        ...


def open_text_model(
    name: str, *, device: str = "auto", dtype: str | None = None, batch_size: int = 8, tokenizer: str | None = None
) -> TextModel:
    """A model by name.

    Args:
        name: a run folder, a checkpoint or a saved model of ours (it has a ``config.yaml``), or ``hf:NAME``: a
            Hugging Face causal language model, by hub name or folder.
        device: ``auto`` takes CUDA when there.
        dtype: of the weights; as stored when absent.
        batch_size: prompts at a time; changes results by rounding alone.
        tokenizer: instead of the model's own.

    Raises:
        ValueError: a name that is neither.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    check_model_name(name)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    options = {"device": device, "dtype": dtype, "batch_size": batch_size, "tokenizer": tokenizer}
    if name.startswith("hf:"):
        from seqmodels.evaluation.hugging_face_model import HuggingFaceTextModel

        return HuggingFaceTextModel(name.removeprefix("hf:"), **options)
    from seqmodels.evaluation.run_model import RunTextModel

    return RunTextModel(name, **options)


def check_model_name(name: str) -> None:
    """ValueError for what is no folder of ours and does not say that it is a Hugging Face model; nothing is read."""
    folder = Path(name)
    if name.startswith("hf:") or (folder / "config.yaml").exists():
        return
    if (folder / "config.json").exists():
        raise ValueError(f"{name} is a Hugging Face model's folder; write hf:{name}")
    what = "holds no config.yaml" if folder.is_dir() else "is no folder"
    raise ValueError(
        f"{name} {what}; expected a run folder, a checkpoint or a saved model, or hf:NAME for a Hugging Face model"
    )


def results_folder(name: str, out: Path | None, kind: str) -> Path:
    """``out``, or the folder ``kind`` in a model's own; ValueError for a Hugging Face model, which has none."""
    if out is not None:
        return out
    if name.startswith("hf:"):
        raise ValueError(f"give --out FOLDER: {name} has no run folder of ours to write into")
    return Path(name) / kind


def fingerprint(*parts: str | Path) -> str:
    """Digest of texts and of files' contents (names left out: a copied folder is the same model)."""
    hasher = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as file:
                while piece := file.read(1 << 24):
                    hasher.update(piece)
        else:
            hasher.update(part.encode())
        hasher.update(b"\0")
    return hasher.hexdigest()


def by_length(lengths: Sequence[int], batch_size: int, *, equal: bool = False) -> Iterable[list[int]]:
    """Indices in batches of similar (or ``equal``) lengths, longest first: the largest batch fits, or none does."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) == batch_size or (equal and lengths[batch[0]] != lengths[index])):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def groups(items: Sequence[Item], model: TextModel) -> Iterator[Sequence[Item]]:
    """Items in their order, as many at a time as a killed run may lose."""
    size = BATCHES * model.batch_size
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]


def prompt_room(window: int | None, max_new_tokens: int, max_length: int | None = None) -> int | None:
    """Tokens of a prompt that are read: what the answer leaves of the window, or of a shorter model."""
    bounds = [bound for bound in (window, max_length) if bound is not None]
    if not bounds:
        return None
    if min(bounds) <= max_new_tokens:
        raise ValueError(
            f"window={min(bounds)} leaves no token of the prompt beside max_new_tokens={max_new_tokens}; expected a "
            "larger window or fewer new tokens (the window is never beyond a Hugging Face model's own length)"
        )
    return min(bounds) - max_new_tokens


def shortened(model: TextModel, prompts: Iterable[str], window: int | None, max_new_tokens: int) -> int:
    """How many prompts lose their beginning to the window, or to the model's own length."""
    room = prompt_room(window, max_new_tokens, model.max_length)
    return 0 if room is None else sum(len(model.front) + len(model.encode(prompt)) > room for prompt in prompts)


def check_pairs(pairs: Sequence[Pair]) -> None:
    """ValueError for a context or continuation without a token."""
    for index, (context, continuation) in enumerate(pairs):
        if not len(context) or not len(continuation):
            raise ValueError(
                f"pair {index} has {len(context)} context and {len(continuation)} continuation tokens; expected at "
                "least one of each (the model's prefix_token stands for an empty context)"
            )


def scores_of(logits: torch.Tensor, targets: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """log softmax(logits)[target] and whether the target is the most likely, ties to the lowest id.

    Args:
        logits: (tokens, vocab_size), read in float32 or float64.
        targets: (tokens,).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    chosen = logits.gather(1, targets[:, None])[:, 0]
    log_probs = chosen - logits.logsumexp(1)
    return log_probs.double().cpu().numpy(), (logits.argmax(1) == targets).cpu().numpy()
