"""Generating tokens: prefill the prompts in parallel, then one step a token with a fixed-size state."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from seqmodels.models.captured_step import CapturedStep
from seqmodels.models.language_model import LanguageModel
from seqmodels.models.prefix_reading import PrefixReading, Prompts, ShortPrompts
from seqmodels.models.sampling import GREEDY, Sampling, draw, token_probabilities
from seqmodels.models.stack import ModelState

MIN_CAPTURED_LENGTH = 1024
PREFILL_CHUNK = 8192  # tokens of a prompt at a time: bounds the activations of a long prompt


class Decoder:
    """Decodes batches of prompts with one model.

    On CUDA the step is captured in a graph once for each batch size and replayed (again when full
    attention needs a longer cache, whose length is therefore rounded up to a power of two); the
    graphs live as long as this object, so keep it for many calls.

    Args:
        model: put in evaluation mode while it generates.
        capture: use CUDA graphs; by default where the model is on CUDA.
        prefill_chunk: tokens of the prompts that go through the model at a time; a prefix goes in whole.
        short_prompts, compat_pad: how a prefix model reads prompts that are shorter than its prefix
            (:class:`~seqmodels.models.prefix_reading.PrefixReading`).
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        capture: bool | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        short_prompts: ShortPrompts = "pad",
        compat_pad: int | None = None,
    ) -> None:
        device = model.embedding.weight.device
        if capture and device.type != "cuda":
            raise ValueError(f"capture=True needs the model on CUDA; it is on {device}")
        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk is {prefill_chunk}; expected at least 1")
        self.model = model
        self.reading = PrefixReading(model.config, short_prompts, compat_pad)
        self.device = device
        self.capture = device.type == "cuda" if capture is None else capture
        self.prefill_chunk = prefill_chunk
        self._captured: dict[int, CapturedStep] = {}

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], *, max_length: int) -> tuple[Tensor, ModelState]:
        """(batch, vocab_size) logits after each prompt, and the state there.

        Prompts of unequal length are left-padded; padding reaches neither outputs nor state.

        Args:
            prompts: token ids, at least one each.
            max_length: tokens that the state must hold, prompt (as often as it is read) and continuation.
        """
        _check_prompts(prompts)
        return self._read(self.reading.prepare(self.reading.expand(prompts)), max_length)

    def _read(self, prompts: Prompts, max_length: int) -> tuple[Tensor, ModelState]:
        grid = prompts.tokens.to(self.device)
        end = prompts.first_piece(self.prefill_chunk)
        layout = prompts.layout(end, self.device)
        state = self.model.init_state(len(grid), max_length=max_length)
        hidden, state, _ = self.model.encode(grid[:, :end], state, layout=layout, return_state=True)
        while end < grid.shape[1]:
            piece = grid[:, end : end + self.prefill_chunk]
            hidden, state, _ = self.model.encode(piece, state, return_state=True)
            end += piece.shape[1]
        assert state is not None  # return_state was set
        return self.model.logits(hidden[:, -1]), state

    @torch.no_grad()
    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop_ids: Collection[int] = (),
        finished: list[bool] | None = None,
    ) -> Iterator[list[int | None]]:
        """Yields the new token of every row, step by step; None for rows that have ended.

        Row ``i`` draws from its own generator, seeded with ``seed + i``: the same seed gives the same
        tokens, alone or in a batch, on a CPU or a GPU, as far as the logits agree.

        Args:
            prompts: token ids, at least one each.
            max_new_tokens: tokens after each prompt.
            sampling: greedy by default.
            stop_ids: a row ends after producing one of these.
            finished: a list with an entry for each row, to which the caller may write True between
                tokens to end a row (stop strings do).
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; expected at least 1")
        _check_prompts(prompts)
        finished = [False] * len(prompts) if finished is None else finished
        texts = self.reading.expand(prompts)
        prepared = self.reading.prepare(texts)
        capacity = self._capacity(prepared.tokens.shape[1] + max_new_tokens)
        with _evaluation(self.model):
            logits, state = self._read(prepared, capacity)
        captured = None
        seen = self._seen(prompts) if sampling.repetition_penalty != 1.0 else None
        uniform = _draws(len(prompts), max_new_tokens, seed).to(self.device)
        for index in range(max_new_tokens):
            tokens = draw(token_probabilities(logits, sampling, seen), uniform[index])
            values = torch.where(logits.isfinite().all(1), tokens, -1).tolist()
            # The host waits for the tokens anyway: that a number was not finite arrives with them.
            broken = [row for row, token in enumerate(values) if token < 0]
            if broken:
                raise ValueError(
                    f"the logits of prompt {broken[0]} are NaN or infinite at new token {index}: the weights are "
                    "damaged, or the dtype is too narrow for this model (try float32)"
                )
            yield [None if done else token for token, done in zip(values, finished, strict=True)]
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)
            for row, token in enumerate(values):
                finished[row] = finished[row] or token in stop_ids
            if all(finished) or index + 1 == max_new_tokens:
                return
            for text, token in zip(texts, values, strict=True):
                text.append(token)
            if self.reading.reads_again(min(map(len, texts))):
                with _evaluation(self.model):
                    logits, state = self._read(self.reading.prepare(texts), capacity)
                continue
            if self.capture:
                captured = captured or self._captured_step(state, len(prompts))
                logits = captured(tokens)
            else:
                with _evaluation(self.model):
                    logits = self.model.step(tokens, state)

    def generate(self, prompts: Sequence[Sequence[int]], **options: object) -> list[list[int]]:
        """The new tokens of each row (the stopping one included); arguments of :meth:`stream`."""
        result: list[list[int]] = [[] for _ in prompts]
        for tokens in self.stream(prompts, **options):  # type: ignore[arg-type]
            for row, token in enumerate(tokens):
                if token is not None:
                    result[row].append(token)
        return result

    def _capacity(self, length: int) -> int:
        """Tokens the state must hold; few different numbers where each costs a capture."""
        return max(MIN_CAPTURED_LENGTH, 1 << (length - 1).bit_length()) if self.capture else length

    def _captured_step(self, state: ModelState, batch_size: int) -> CapturedStep:
        captured = self._captured.get(batch_size)
        if captured is not None and captured.fits(state):
            captured.load(state)
            return captured
        self._captured.pop(batch_size, None)  # frees its buffers before the new ones are made
        with _evaluation(self.model):
            self._captured[batch_size] = CapturedStep(self.model, state, batch_size)
        return self._captured[batch_size]

    def _seen(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        seen = torch.zeros(len(prompts), self.model.config.vocab_size, dtype=torch.bool)
        for row, prompt in enumerate(prompts):
            seen[row, torch.as_tensor(prompt, dtype=torch.int64)] = True
        return seen.to(self.device)


def generate(model: LanguageModel, prompts: Sequence[Sequence[int]], **options: object) -> list[list[int]]:
    """The new tokens after each prompt; arguments of :meth:`Decoder.stream`."""
    return Decoder(model).generate(prompts, **options)


def _draws(batch_size: int, steps: int, seed: int) -> Tensor:
    """(steps, batch) float32 in [0, 1), column ``i`` from a generator of its own."""
    columns = []
    for row in range(batch_size):
        generator = torch.Generator().manual_seed(seed + row)
        columns.append(torch.rand(steps, generator=generator))
    return torch.stack(columns, 1)


def _check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    if len(prompts) == 0:
        raise ValueError("there are no prompts; give at least one")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {row} is empty; give at least one token, for example the tokenizer's separator")


@contextlib.contextmanager
def _evaluation(model: LanguageModel) -> Iterator[None]:
    """Evaluation mode inside, what it was before outside (a generator may pause in between)."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
