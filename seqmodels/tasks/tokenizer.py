"""Text to token ids. Bytes by default; any Hugging Face tokenizer by path or name."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """What the loaders need.

    Attributes:
        name: identifies the vocabulary in caches and checkpoints.
        vocab_size: ids are 0 to ``vocab_size - 1``.
        separator: the id that starts every document and ends the one before it.
    """

    name: str
    vocab_size: int
    separator: int

    def encode(self, content: bytes) -> np.ndarray: ...
    def decode(self, tokens: list[int]) -> str: ...


class ByteTokenizer:
    """The 256 bytes themselves. NUL, which text does not contain, separates documents."""

    name = "bytes"
    vocab_size = 256
    separator = 0

    def encode(self, content: bytes) -> np.ndarray:
        return np.frombuffer(content, dtype=np.uint8)

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


class HuggingFaceTokenizer:
    """A ``transformers`` tokenizer; its bos (else eos, else sep: BERT) token separates documents."""

    def __init__(self, path: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ImportError(f"tokenizer {path!r} needs the transformers package: pip install transformers") from error
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        special = (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id, self._tokenizer.sep_token_id)
        separator = next((token for token in special if token is not None), None)
        if separator is None:
            raise ValueError(
                f"tokenizer {path!r} has neither a bos nor an eos token, nor a sep token; one must separate documents"
            )
        self.name = path
        self.vocab_size = len(self._tokenizer)
        self.separator = separator

    def encode(self, content: bytes) -> np.ndarray:
        text = content.decode("utf-8", errors="replace")
        return np.array(self._tokenizer.encode(text, add_special_tokens=False), dtype=np.uint32)

    def decode(self, tokens: list[int]) -> str:
        # Text as it was: some tokenizers would take the space before a comma away.
        return self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def load_tokenizer(name: str) -> Tokenizer:
    """``"bytes"``, or the path or hub name of a Hugging Face tokenizer."""
    return ByteTokenizer() if name == "bytes" else HuggingFaceTokenizer(name)
