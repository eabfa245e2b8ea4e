"""Our own runs as a :class:`~seqmodels.evaluation.text_model.TextModel`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from seqmodels.evaluation.codec import RunCodec, sample_tokens
from seqmodels.evaluation.text_model import (
    Pair,
    TokenScores,
    by_length,
    check_pairs,
    fingerprint,
    prompt_room,
    scores_of,
)
from seqmodels.layout import Layout
from seqmodels.models.initialization import dtype_named
from seqmodels.models.loading import load_model
from seqmodels.models.text_generation import TextGenerator
from seqmodels.tasks.tokenizer import load_tokenizer

PIECE = 2048  # columns that go through the model at a time; the state goes on
LOGITS = 1 << 24  # entries of logits at a time


class RunTextModel(RunCodec):
    """A run folder, a checkpoint or a saved model.

    Prompts are read by :class:`TextGenerator`: the separator before each text, left padding that reaches neither
    outputs nor states, one prefill and a step a token. Continuations are scored with the state carried from piece to
    piece, so no length is cut; a prefix model reads the context (its first ``prefix_length`` tokens) in both
    directions. Arguments as in :func:`open_text_model`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        batch_size: int = 8,
        tokenizer: str | None = None,
    ) -> None:
        loaded = load_model(path, device=device, dtype=None if dtype is None else dtype_named(dtype))
        self.model = loaded.model
        super().__init__(load_tokenizer(tokenizer or loaded.tokenizer))
        self.generator = TextGenerator(self.model, self.tokenizer)
        self.batch_size = batch_size
        self.name = str(path)
        self.identity = fingerprint(
            loaded.weights, self.tokenizer.name, str(sample_tokens(self)), str(next(self.model.parameters()).dtype)
        )
        self.front = [self.tokenizer.separator]
        self.prefix_token: int | None = self.tokenizer.separator
        self.max_length: int | None = None

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str] = (), window: int | None = None
    ) -> list[str]:
        room = prompt_room(window, max_new_tokens)
        found = [""] * len(prompts)
        for rows in by_length([len(prompt) for prompt in prompts], self.batch_size):
            texts = self.generator.generate(
                [prompts[row] for row in rows], max_new_tokens=max_new_tokens, stop=tuple(stop), max_prompt_tokens=room
            )
            for row, text in zip(rows, texts, strict=True):
                found[row] = text
        return found

    @torch.no_grad()
    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[TokenScores]:
        check_pairs(pairs)
        found: list[TokenScores | None] = [None] * len(pairs)
        self.model.eval()
        for rows in by_length([len(context) + len(rest) for context, rest in pairs], self.batch_size):
            for row, scores in zip(rows, self._score([pairs[row] for row in rows]), strict=True):
                found[row] = scores
        return [scores for scores in found if scores is not None]

    def _score(self, pairs: Sequence[Pair]) -> list[TokenScores]:
        """One batch, padded on the right: what a causal model reads after a text's end changes nothing before it."""
        device = self.model.embedding.weight.device
        first = [len(context) - 1 for context, _ in pairs]  # column whose logits predict the first scored token
        sizes = [len(context) + len(rest) - 1 for context, rest in pairs]
        longest = max(sizes)
        tokens = torch.zeros(len(pairs), longest, dtype=torch.int64)
        targets = torch.zeros_like(tokens)
        scored = torch.zeros_like(tokens, dtype=torch.bool)
        for row, (context, rest) in enumerate(pairs):
            text = torch.as_tensor([*context, *rest], dtype=torch.int64)
            tokens[row, : sizes[row]], targets[row, : sizes[row]] = text[:-1], text[1:]
            scored[row, first[row] : sizes[row]] = True
        layout, end = None, min(PIECE, longest)
        if self.model.config.objective == "prefix":
            bound = self.model.config.prefix_length or longest
            prefixes = [min(len(context), bound) for context, _ in pairs]
            end = min(longest, max(end, *prefixes))  # a prefix goes in whole
            layout = Layout.full(len(pairs), end, prefix_lengths=prefixes, device=device)
        state = self.model.init_state(len(pairs), max_length=longest)
        log_probs, greedy = np.zeros((len(pairs), longest)), np.zeros((len(pairs), longest), dtype=bool)
        begin = 0
        while begin < longest:
            piece = tokens[:, begin:end].to(device)
            hidden, state, _ = self.model.encode(piece, state, layout=layout, return_state=True)
            wanted = scored[:, begin:end]
            chosen, goal = hidden[wanted.to(device)], targets[:, begin:end][wanted].to(device)
            parts = [
                scores_of(self.model.logits(vectors), ids)
                for vectors, ids in zip(chosen.split(self._chunk), goal.split(self._chunk), strict=True)
            ]
            log_probs[:, begin:end][wanted.numpy()] = np.concatenate([part[0] for part in parts])
            greedy[:, begin:end][wanted.numpy()] = np.concatenate([part[1] for part in parts])
            begin, end, layout = end, min(longest, end + PIECE), None
        return [
            TokenScores(log_probs[row, first[row] : sizes[row]], greedy[row, first[row] : sizes[row]])
            for row in range(len(pairs))
        ]

    @property
    def _chunk(self) -> int:
        return max(1, LOGITS // self.model.config.vocab_size)
