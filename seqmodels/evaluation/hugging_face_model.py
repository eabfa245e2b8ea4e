"""Hugging Face causal language models as a :class:`~seqmodels.evaluation.text_model.TextModel`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seqmodels.evaluation.codec import HuggingFaceCodec, loading, sample_tokens
from seqmodels.evaluation.text_model import (
    Pair,
    TokenScores,
    by_length,
    check_pairs,
    fingerprint,
    prompt_room,
    scores_of,
)
from seqmodels.models.initialization import dtype_named
from seqmodels.tasks.recall_scoring import cut_at


class HuggingFaceTextModel(HuggingFaceCodec):
    """``AutoModelForCausalLM`` with its tokenizer.

    Only prompts of equal length share a batch: padding would enter the state of recurrent models, which do not all
    mask it. Prompts get the special tokens that the tokenizer puts before a text by itself (none where it has no
    bos); they are read in front of the cut prompt. Arguments as in :func:`open_text_model`.
    """

    def __init__(
        self,
        path: str,
        *,
        device: str = "cpu",
        dtype: str | None = None,
        batch_size: int = 8,
        tokenizer: str | None = None,
    ) -> None:
        super().__init__(tokenizer or path)
        from transformers import AutoModelForCausalLM

        options = {} if dtype is None else {"dtype": dtype_named(dtype)}
        with loading(f"the causal language model {path!r}"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(path, **options)
        self.model: Any = loaded.to(device).eval()
        self.device, self.batch_size = torch.device(device), batch_size
        self.name = f"hf:{path}"
        weights = sorted(Path(path).glob("*.safetensors")) + sorted(Path(path).glob("*.bin"))
        commit = str(getattr(self.model.config, "_commit_hash", None) or "")
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        self.prefix_token: int | None = bos if bos is not None else eos
        # A single token shows what stands in front of a text.
        plain, special = self.encode("a"), self.tokenizer.encode("a")
        self.front: list[int] = (
            special[: len(special) - len(plain)] if special[len(special) - len(plain) :] == plain else []
        )
        named = str(tokenizer or path) if commit else ""  # of a folder the content counts: a copy is the same model
        self.identity = fingerprint(
            *weights, commit, named, str([self.front, sample_tokens(self)]), str(self.model.dtype)
        )
        length = getattr(self.model.config, "max_position_embeddings", None)
        self.max_length: int | None = length if isinstance(length, int) and length > 0 else None

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str] = (), window: int | None = None
    ) -> list[str]:
        from transformers import GenerationConfig

        room = prompt_room(window, max_new_tokens, self.max_length)
        ids = [self._prompt(prompt, room) for prompt in prompts]
        eos = self.model.generation_config.eos_token_id
        eos = self.tokenizer.eos_token_id if eos is None else eos
        ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
        # The model's own generation settings (sampling, penalties) are set aside.
        config = GenerationConfig(
            do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=ends[0] if ends else 0
        )
        found = [""] * len(prompts)
        for rows in by_length([len(prompt) for prompt in ids], self.batch_size, equal=True):
            grid = torch.tensor([ids[row] for row in rows], device=self.device)
            output = self.model.generate(
                input_ids=grid,
                attention_mask=torch.ones_like(grid),
                generation_config=config,
                stopping_criteria=[self._stopped(grid.shape[1], stop)] if stop else None,
            )
            for row, tokens in zip(rows, output[:, grid.shape[1] :].tolist(), strict=True):
                end = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
                found[row] = cut_at(self.decode(tokens[:end]), stop)
        return found

    @torch.no_grad()
    def log_likelihoods(self, pairs: Sequence[Pair]) -> list[TokenScores]:
        check_pairs(pairs)
        sizes = [len(context) + len(rest) - 1 for context, rest in pairs]
        for index, size in enumerate(sizes):
            if self.max_length is not None and size > self.max_length:
                raise ValueError(
                    f"pair {index} has {size} tokens before its last; {self.name} reads {self.max_length} at most"
                )
        found: list[TokenScores | None] = [None] * len(pairs)
        for rows in by_length(sizes, self.batch_size):
            # Padding is on the right, where a causal model cannot see it.
            grid = torch.zeros(len(rows), max(sizes[row] for row in rows), dtype=torch.int64)
            for line, row in enumerate(rows):
                grid[line, : sizes[row]] = torch.as_tensor([*pairs[row][0], *pairs[row][1]][:-1])
            logits: Tensor = self.model(input_ids=grid.to(self.device), use_cache=False).logits
            for line, row in enumerate(rows):
                first = len(pairs[row][0]) - 1
                targets = torch.as_tensor(list(pairs[row][1]), device=self.device)
                found[row] = TokenScores(*scores_of(logits[line, first : sizes[row]], targets))
        return [scores for scores in found if scores is not None]

    def _prompt(self, text: str, room: int | None) -> list[int]:
        ids = self.encode(text)
        if room is not None:
            ids = ids[max(0, len(ids) - max(1, room - len(self.front))) :]
        ids = [*self.front, *ids]
        if not ids:
            raise ValueError(f"a prompt has no token: {text!r}")
        return ids

    def _stopped(self, begin: int, stop: Sequence[str]) -> Any:
        """Rows whose new text holds a stop string need no more tokens."""

        def ended(input_ids: Tensor, scores: object, **_: object) -> Tensor:
            texts = [self.decode(row) for row in input_ids[:, begin:].tolist()]
            return torch.tensor([cut_at(text, stop) != text for text in texts], device=input_ids.device)

        return ended
