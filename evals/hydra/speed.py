"""Throughput of Hydra against transformers of its width and depth: whole sequences, and a token at a time.

All models take turns in one process of one thread; times are its processor seconds, the least of the rounds. The
eager transformer holds the length x length matrix of scores, as the published baseline does, and pays the system's
seconds for that memory too; the fused one runs PyTorch's fused attention.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evals.hydra.training import Say
from seqmodels.layout import Layout
from seqmodels.mixers import MIXERS, Attention, MixerOutput, register_mixer
from seqmodels.models import HydraConfig, LanguageModel, ModelConfig

VOCABULARY, HEADS, BATCH = 256, 4, 1

if "hydra_eager_attention" not in MIXERS:

    @register_mixer("hydra_eager_attention")
    class EagerAttention(Attention):
        """softmax(q k^T / sqrt(head_dim) + causal mask) v by three operations, of one whole sequence."""

        def forward(
            self, x: Tensor, state: Any = None, *, layout: Layout | None = None, return_state: bool = False
        ) -> MixerOutput:
            if state is not None or layout is not None or return_state:
                return super().forward(x, state, layout=layout, return_state=return_state)
            qk, v = self.project(x)
            q, k = self.rotate(qk, torch.arange(x.shape[1], device=x.device).expand(x.shape[:2]))
            q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
            scores = q @ k.mT / math.sqrt(self.head_dim)
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            y = scores.masked_fill(later, -math.inf).softmax(-1) @ v
            return MixerOutput(self.out_proj(y.transpose(1, 2).flatten(-2)))


def models(options: dict[str, Any]) -> dict[str, LanguageModel]:
    """Contestants of one width and depth."""
    d, blocks = options["d_model"], options["blocks"]
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "d_model": d, "num_blocks": blocks,
        "experts": {"num_experts": 4, "d_hidden": d, "chunk_size": 32},
        "workspace": {"num_slots": 16, "rank": 32, "active": 8, "segment": 64},
        "memory": {"num_heads": 2, "top_k": 8, "query_dim": 64, "num_subkeys": 32, "value_dim": 64},
    }  # fmt: skip
    attention = {"num_heads": HEADS, "window": 128, "num_globals": 128, "block": 64}
    mamba = {"state_space": {"d_state": 64, "head_dim": 64}, "mixer": "mamba3"}
    hydra = {
        "hydra (mamba3)": {**sizes, **mamba, "attention": attention},
        "hydra (hydra_diag)": {**sizes, "mixer": "hydra_diag", "attention": attention},
        "hydra (mamba3) without attention": {**sizes, **mamba, "attention": None},
    }
    found = {name: HydraConfig(**values).model_config() for name, values in hydra.items()}
    for name, layer in (("transformer, eager", "hydra_eager_attention"), ("transformer, fused", "attention")):
        found[name] = ModelConfig(
            vocab_size=VOCABULARY, d_model=d, pattern=f"{blocks}x(mixer swiglu)",
            layers={"mixer": {"layer": layer, "num_heads": HEADS}},
        )  # fmt: skip
    torch.manual_seed(0)
    return {name: LanguageModel(config).eval() for name, config in found.items()}


@torch.no_grad()
def measure(seed: int, options: dict[str, Any], say: Say) -> list[dict[str, Any]]:
    length = options["length"]
    ids = torch.randint(VOCABULARY, (BATCH, length), generator=torch.Generator().manual_seed(seed))
    contestants = models(options)
    found = []
    forward = _least(contestants, lambda name, model: model.encode(ids), options["rounds"], say)
    states = {}
    for name, model in contestants.items():
        state = model.init_state(BATCH, max_length=length + (options["decode_rounds"] + 1) * options["tokens"])
        states[name] = model.encode(ids, state, return_state=True).state

    def decode(name: str, model: LanguageModel) -> None:
        for _ in range(options["tokens"]):
            model.step(ids[:, 0], states[name])

    steps = _least(contestants, decode, options["decode_rounds"], say)
    load = os.getloadavg()[0]
    for name, model in contestants.items():
        about = {"length": length, "model": name, "parameters": model.num_parameters(), "load": load}
        for metric, tokens, seconds in (
            ("forward_tokens_per_second", BATCH * length, forward[name]),
            ("decode_tokens_per_second", BATCH * options["tokens"], steps[name]),
        ):
            entry = {"metric": metric, "value": tokens / seconds, "unit": "tokens/s", "part": name, "about": about}
            found.append(entry)
        bytes_ = model.state_bytes(length)
        found.append({"metric": "state_bytes", "value": bytes_, "unit": "B", "part": name, "about": about})
    return found


def _least(
    contestants: dict[str, LanguageModel], work: Callable[[str, LanguageModel], object], rounds: int, say: Say
) -> dict[str, float]:
    """Processor seconds of the best round of each; one round before does not count."""
    best = dict.fromkeys(contestants, math.inf)
    for turn in range(rounds + 1):
        for name, model in contestants.items():
            began = time.process_time()
            work(name, model)
            if turn:
                best[name] = min(best[name], time.process_time() - began)
        say({"step": turn, "steps": rounds})
    return best
