"""The adapter to EleutherAI's lm-evaluation-harness: ``--model seqmodels``.

``python -m seqmodels.evaluation.harness run --model seqmodels --model_args pretrained=RUN --tasks real_text_fda``
is ``lm-eval`` with the model registered and the tasks of ``harness_tasks`` included; from Python, importing this
module registers it. Every other argument is lm-eval's own.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from seqmodels.evaluation.text_model import Pair, open_text_model, shortened

try:
    import lm_eval.models  # noqa: F401 (lm-eval registers its own models only while there is no other)
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise ImportError("--model seqmodels needs the lm-eval package: pip install 'seqmodels[eval]'") from error

logger = logging.getLogger(__name__)
TASKS = Path(__file__).parent / "harness_tasks"
MAX_GEN_TOKS = 256  # lm-eval's own default
GROUP = 16  # batches between two steps of the progress bar
# Generation settings that change nothing while the most likely token is taken.
_WITHOUT_SAMPLING = ("temperature", "top_p", "top_k")


@register_model("seqmodels")
class SeqmodelsLM(LM):
    """A trained run (or ``hf:NAME``) for lm-eval.

    Generation is greedy: the prompts of a batch, of whatever lengths, are read in one prefill, then a step a token.
    Prompts keep their last ``max_length - max_gen_toks`` tokens. Log-likelihoods read whole texts with the state
    carried, so nothing is cut there (Hugging Face models: to their own context).

    Args (``--model_args``):
        pretrained: a run folder, a checkpoint, a saved model, or ``hf:NAME``.
        max_length: tokens of prompt and answer.
        dtype: of the weights; as stored when absent.
        tokenizer: instead of the run's own.
        batch_size, device: from lm-eval's options.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        max_length: int = 2048,
        dtype: str | None = None,
        tokenizer: str | None = None,
        batch_size: int | str = 1,
        device: str = "auto",
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or max_batch_size is not None:
            raise ValueError(
                f"batch_size is {batch_size!r} and max_batch_size {max_batch_size!r}; expected a number and nothing: "
                "batch sizes are not searched for"
            )
        self.batch_size = int(batch_size)
        self.window = int(max_length)
        self.model = open_text_model(
            str(pretrained), device=device, dtype=dtype, tokenizer=tokenizer, batch_size=self.batch_size
        )

    @property
    def tokenizer_name(self) -> str:
        return self.model.identity

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        groups: dict[tuple[tuple[str, ...], int], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[_generation(request.arguments[1])].append(index)
        found = [""] * len(requests)
        with tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm) as bar:
            for (stop, tokens), rows in groups.items():
                self._warn_of_shortened([requests[row].arguments[0] for row in rows], tokens)
                rows.sort(key=lambda row: -len(requests[row].arguments[0]))
                for part in self._parts(rows):
                    texts = self.model.generate(
                        [requests[row].arguments[0] for row in part],
                        max_new_tokens=tokens,
                        stop=stop,
                        window=self.window,
                    )
                    for row, text in zip(part, texts, strict=True):
                        found[row] = text
                        self.cache_hook.add_partial("generate_until", requests[row].arguments, text)
                    bar.update(len(part))
        return found

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [self._pair(*request.arguments) for request in requests]
        rows = sorted(range(len(pairs)), key=lambda row: -sum(map(len, pairs[row])))
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for part in self._parts(rows):
                for row, scores in zip(part, self.model.log_likelihoods([pairs[row] for row in part]), strict=True):
                    found[row] = scores.total, bool(scores.greedy.all())
                    self.cache_hook.add_partial("loglikelihood", requests[row].arguments, found[row])
                bar.update(len(part))
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        found = []
        for request in tqdm(requests, desc="loglikelihood_rolling", disable=disable_tqdm):
            tokens = self.model.encode(request.arguments[0])
            total = sum(scores.total for scores in self.model.log_likelihoods(self._windows(tokens))) if tokens else 0.0
            self.cache_hook.add_partial("loglikelihood_rolling", request.arguments, total)
            found.append(total)
        return found

    def _warn_of_shortened(self, prompts: Sequence[str], tokens: int) -> None:
        count = shortened(self.model, prompts, self.window, tokens)
        if count:
            logger.warning(
                "%d of %d prompts lose their beginning: max_length=%d less %d new tokens; --model_args max_length=... "
                "reads more",
                *(count, len(prompts), self.window, tokens),
            )

    def _windows(self, tokens: list[int]) -> list[Pair]:
        """One window where the state carries the past; else of the model's length, every token predicted once."""
        if self.model.max_length is None:
            return [([self._prefix()], tokens)]
        windows = get_rolling_token_windows(tokens, self._prefix(), self.model.max_length, 1)
        return [make_disjoint_window(window) for window in windows]

    def _pair(self, context: str, continuation: str) -> Pair:
        """Tokens of both; white space at the context's end belongs to the continuation's first token."""
        stripped = context.rstrip()
        text = context + continuation
        inside = len(self.model.encode(stripped)) if stripped else 0
        tokens = self.model.encode(text)
        before, rest = [*self.model.front, *tokens[:inside]], tokens[inside:]
        before = before or [self._prefix()]
        if self.model.max_length is not None:
            # Of a continuation that is too long one token of context is left; the model refuses it by its length.
            before = before[min(len(before) - 1, max(0, len(before) + len(rest) - 1 - self.model.max_length)) :]
        return before, rest

    def _prefix(self) -> int:
        if self.model.prefix_token is None:
            raise ValueError(
                f"{self.model.name}: a text without context needs a token before it, and the tokenizer has neither bos "
                "nor eos"
            )
        return self.model.prefix_token

    def _parts(self, rows: Sequence[int]) -> list[list[int]]:
        size = GROUP * self.batch_size
        return [list(rows[begin : begin + size]) for begin in range(0, len(rows), size)]


def _generation(settings: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """Stop strings and number of tokens; ValueError for what is not greedy generation."""
    settings = dict(settings)
    until = settings.pop("until", [])
    until = [until] if isinstance(until, str) else list(until or [])
    tokens = settings.pop("max_gen_toks", MAX_GEN_TOKS)
    sampling, beams = settings.pop("do_sample", False), settings.pop("num_beams", 1)
    unknown = [name for name in settings if name not in _WITHOUT_SAMPLING]
    if sampling or beams != 1 or unknown:
        raise ValueError(
            f"generation settings do_sample={sampling}, num_beams={beams}, {', '.join(unknown) or 'no others'}: the "
            "seqmodels adapter takes the most likely token, with until and max_gen_toks"
        )
    return tuple(text for text in until if text), int(tokens)


def main() -> None:
    """lm-eval's command line, with this package's tasks, on the CPU where there is no GPU."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv[1:] = arguments(sys.argv[1:])
    cli_evaluate()


def arguments(given: Sequence[str]) -> list[str]:
    """lm-eval's arguments with defaults of this package where the user gave none."""
    found = list(given)
    if not found or {"-h", "--help"} & set(found):
        return found
    options = {word.partition("=")[0] for word in found}
    if "--include_path" not in options:
        found += ["--include_path", str(TASKS)]
    if found[0] not in ("ls", "validate") and "--device" not in options and not torch.cuda.is_available():
        found += ["--device", "cpu"]  # lm-eval takes cuda:0 by itself
    return found


if __name__ == "__main__":
    main()
