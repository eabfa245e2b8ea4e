"""Generating text: tokenizer, stop strings, and pieces of text as they come."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from seqmodels.models.generation import Decoder
from seqmodels.models.language_model import LanguageModel
from seqmodels.models.prefix_reading import PrefixReading, ShortPrompts
from seqmodels.models.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from seqmodels.tasks.tokenizer import Tokenizer

LONGEST_CHARACTER = 4  # bytes, and so at most as many tokens, of a UTF-8 character


class TextStream:
    """Tokens in, text out as soon as it is final.

    Text is held back while it may be the beginning of a character or of a stop string; what
    follows a stop string is dropped.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop = tuple(stop)
        self.stopped = False
        self._tokens: list[int] = []
        self._context = 0  # decoding restarts here, so that a tokenizer sees the tokens before new ones
        self._decoded = 0  # tokens before this one are text already
        self._held = ""

    def push(self, token: int) -> str:
        """Text that has become final."""
        if self.stopped:
            return ""
        self._tokens.append(token)
        return self._release(self._decode(final=False), final=False)

    def finish(self) -> str:
        """The text that was still held back."""
        return "" if self.stopped else self._release(self._decode(final=True), final=True)

    def _decode(self, final: bool) -> str:
        before = self.tokenizer.decode(self._tokens[self._context : self._decoded])
        end = len(self._tokens)
        text = self.tokenizer.decode(self._tokens[self._context :])
        if not final and text.endswith("\N{REPLACEMENT CHARACTER}"):
            # The last tokens may be an incomplete character; what is before them will never be one.
            end -= LONGEST_CHARACTER - 1
            if end <= self._decoded:
                return ""
            text = self.tokenizer.decode(self._tokens[self._context : end])
        else:  # a boundary between characters: decoding may restart here
            self._context = self._decoded
        self._decoded = end
        return text[len(before) :]

    def _release(self, text: str, final: bool) -> str:
        self._held += text
        found = [index for index in (self._held.find(stop) for stop in self.stop) if index >= 0]
        if found:
            self.stopped = True
            return self._held[: min(found)]
        keep = 0 if final else max((_overlap(self._held, stop) for stop in self.stop), default=0)
        released = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return released


class TextGenerator:
    """Text continuations from a model and its tokenizer.

    Each prompt is preceded by the tokenizer's separator, as documents are in training; producing the
    separator ends a text.

    Args:
        model: a language model of the tokenizer's vocabulary.
        tokenizer: see :mod:`seqmodels.tasks.tokenizer`.
        capture, short_prompts: as in :class:`Decoder`. ``"repeat"`` repeats the text behind a new line, not
            the separator before it.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        capture: bool | None = None,
        short_prompts: ShortPrompts = "pad",
    ) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model vocab_size={model.config.vocab_size}; "
                "use the tokenizer the model was trained with"
            )
        self.reading = PrefixReading(model.config, short_prompts)
        self.decoder = Decoder(model, capture=capture, short_prompts="pad" if self._repeats else short_prompts)
        self.tokenizer = tokenizer

    def stream(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop: Sequence[str] = (),
        max_prompt_tokens: int | None = None,
    ) -> Iterator[list[str]]:
        """Yields the new text of every prompt, step by step (empty where nothing has become final).

        Args:
            prompts: non-empty texts.
            max_new_tokens: bound on the tokens of each continuation.
            sampling: greedy by default.
            seed: the same seed gives the same text.
            stop: a text ends before the first of these strings.
            max_prompt_tokens: of a longer prompt the last tokens are read, behind the separator, which counts.
        """
        if max_prompt_tokens is not None and max_prompt_tokens < 2:
            raise ValueError(f"max_prompt_tokens is {max_prompt_tokens}; expected the separator and at least 1 token")
        for row, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {row} is empty; give at least one character")
        if any(not text for text in stop):
            raise ValueError("a stop string is empty; it would stop every text at once")
        separator = self.tokenizer.separator
        ids = [self._ids(prompt, max_prompt_tokens) for prompt in prompts]
        streams = [TextStream(self.tokenizer, stop) for _ in prompts]
        finished = [False] * len(prompts)
        options = {"max_new_tokens": max_new_tokens, "sampling": sampling, "seed": seed}
        for tokens in self.decoder.stream(ids, stop_ids=(separator,), finished=finished, **options):
            pieces = [
                "" if token is None or token == separator else stream.push(token)
                for token, stream in zip(tokens, streams, strict=True)
            ]
            for row, stream in enumerate(streams):
                finished[row] = finished[row] or stream.stopped
            yield pieces
        yield [stream.finish() for stream in streams]

    @property
    def _repeats(self) -> bool:
        return self.reading.short_prompts == "repeat"

    def _ids(self, prompt: str, bound: int | None) -> list[int]:
        text = self.tokenizer.encode(prompt.encode()).tolist()
        if self._repeats and self.reading.is_short(1 + len(text)):
            text = self.tokenizer.encode(f"{prompt}\n{prompt}".encode()).tolist()
        if bound is not None:
            text = text[max(0, len(text) - (bound - 1)) :]
        return [self.tokenizer.separator, *text]

    def generate(self, prompts: Sequence[str], **options: object) -> list[str]:
        """The continuation of each prompt; arguments of :meth:`stream`."""
        result = [""] * len(prompts)
        for pieces in self.stream(prompts, **options):  # type: ignore[arg-type]
            result = [text + piece for text, piece in zip(result, pieces, strict=True)]
        return result


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` without being all of it."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
