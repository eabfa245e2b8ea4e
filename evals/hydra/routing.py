"""Routing control: temperature and balance weight against how evenly experts are used.

Rows are made of stretches of 32 tokens, each of one of four domains. A domain is a permutation p of the tokens:
the next token is p(token) with probability 0.9, else any.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from evals.hydra.training import Say, generator, train
from seqmodels.channel import ChunkMoE
from seqmodels.models import HydraConfig, LanguageModel
from seqmodels.models.block import Block

VOCABULARY, DOMAINS, STRETCH, LENGTH, CHUNK, EXPERTS = 64, 4, 32, 256, 16, 4
VALIDATION_ROWS = 64


def measure(seed: int, options: dict[str, Any], say: Say) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    experts = {
        "num_experts": EXPERTS, "experts_per_token": 1, "d_hidden": 64, "chunk_size": CHUNK,
        "temperature": options["temperature"], "balance_weight": options["balance_weight"],
    }  # fmt: skip
    config = HydraConfig(
        vocab_size=VOCABULARY, d_model=32, num_blocks=4, mixer="hydra_diag", attention=None, experts=experts,
        workspace=None, memory=None,
    )  # fmt: skip
    model = LanguageModel(config.model_config())
    train(model, lambda step: rows(generator(seed, step), options["batch_size"]), options, say)
    tokens, targets = rows(generator(seed, -1), VALIDATION_ROWS)
    with torch.no_grad():
        output = model.loss(tokens, targets)
    found = [{"metric": "loss", "value": float(output.cross_entropy / output.num_targets), "unit": "nats"}]
    for site, share in usage(model, tokens).items():
        about = {"block": site, "share": share.tolist()}
        entropy = float(torch.special.entr(share).sum())
        found.append({"metric": "assignment_entropy", "value": entropy, "unit": "nats", "part": site, "about": about})
        found.append({"metric": "usage_std", "value": float(share.std(correction=0)), "unit": "", "part": site})
    assert entropy <= math.log(EXPERTS) + 1e-5
    return found


@torch.no_grad()
def usage(model: LanguageModel, tokens: Tensor) -> dict[str, Tensor]:
    """By block, the share of all decisions that each expert got; read from the decode state, a chunk at a time."""
    counts: dict[str, Tensor] = {}
    state = model.init_state(len(tokens), max_length=tokens.shape[1])
    for at in range(0, tokens.shape[1], CHUNK):
        carried = model(tokens[:, at : at + CHUNK], state, return_state=True).state
        assert carried is not None
        state = carried
        for site, (index, block_state) in enumerate(zip(model.backbone.order, state.layers, strict=True)):
            for layer, part in zip(cast(Block, model.backbone.blocks[index]).layers(), block_state.paths, strict=True):
                if isinstance(layer, ChunkMoE):
                    count = torch.bincount(part.expert.flatten(), minlength=EXPERTS)
                    counts[f"block{site}"] = counts.get(f"block{site}", 0) + count
    return {site: count / count.sum() for site, count in counts.items()}


def rows(source: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """(count, LENGTH) tokens and their successors."""
    tables = torch.stack([torch.randperm(VOCABULARY, generator=generator(7, domain)) for domain in range(DOMAINS)])
    domain = torch.randint(DOMAINS, (count, LENGTH // STRETCH + 1), generator=source).repeat_interleave(STRETCH, 1)
    noise = torch.randint(VOCABULARY, (count, LENGTH + 1), generator=source)
    keeps = torch.rand(count, LENGTH + 1, generator=source) < 0.9
    tokens = noise.clone()
    for t in range(1, LENGTH + 1):
        tokens[:, t] = torch.where(keeps[:, t], tables[domain[:, t], tokens[:, t - 1]], noise[:, t])
    return tokens[:, :-1], tokens[:, 1:]
