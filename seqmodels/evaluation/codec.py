"""A model's tokenizer alone: what cuts documents as the model will read them, without its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seqmodels.models.loading import tokenizer_name
from seqmodels.tasks.real_text import Codec
from seqmodels.tasks.tokenizer import Tokenizer, load_tokenizer

_SAMPLE = "The quick brown fox, née Ünïcode, jumped 1,250 times over\n\tlazy_dogs(); -- naïve 北京 🦊 don't"


def sample_tokens(codec: Codec) -> list[int]:
    """Differs between tokenizers that split or number a few lines of text differently."""
    return codec.encode(_SAMPLE)


class RunCodec:
    """Text and token ids of our own models."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text.encode("utf-8", "replace")).tolist()

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens))


class HuggingFaceCodec:
    """``AutoTokenizer`` without the special tokens that it puts around a text."""

    def __init__(self, path: str) -> None:
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise ImportError(f"hf:{path} needs the transformers package: pip install 'seqmodels[hf]'") from error
        with loading(f"the tokenizer {path!r}"):
            self.tokenizer: Any = AutoTokenizer.from_pretrained(path)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def open_codec(name: str, tokenizer: str | None = None) -> Codec:
    """The codec of the model that :func:`~seqmodels.evaluation.text_model.open_text_model` opens by these arguments.

    Args:
        name: a run folder, a checkpoint or a saved model of ours; else, with or without ``hf:``, a Hugging Face
            model's folder or name (``--model hf`` of lm-eval leaves ``hf:`` out).
        tokenizer: instead of the model's own.

    Raises:
        ValueError: no tokenizer of that name.
    """
    if (Path(name) / "config.yaml").is_file():
        return RunCodec(load_tokenizer(tokenizer or tokenizer_name(name)))
    return HuggingFaceCodec(tokenizer or name.removeprefix("hf:"))


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Hugging Face's errors of a name that is nothing, or of a hub out of reach, as one line that says what to do."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"cannot load {what} ({type(error).__name__}: {reason}); expected a folder, or a name on the Hugging Face "
            "hub that is reachable or was read before"
        ) from error
