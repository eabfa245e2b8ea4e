"""Closed-book facts: random pairs of tokens, each with a random answer, to be known by heart.

There is nothing to compute: what is right after training has been stored in the weights. A model with a product-key
memory is tested as trained and with the memory switched off; another one is trained without it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from evals.hydra.training import EVERY, Say, generator, train
from seqmodels.models import HydraConfig, LanguageModel
from seqmodels.models.block import Block
from seqmodels.models.hydra import MEMORY

NAMES, ANSWERS = 64, 32


def measure(seed: int, options: dict[str, Any], say: Say) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    memory = None
    if options["memory"]:
        memory = {"num_heads": 2, "top_k": 8, "query_dim": 32, "num_subkeys": 48, "value_dim": 32, "dropout": 0.0}
        memory["value_learning_rate"] = options["learning_rate"]
    config = HydraConfig(
        vocab_size=NAMES, d_model=32, num_blocks=2, mixer="hydra_diag", attention=None, workspace=None, memory=memory,
        experts={"num_experts": 2, "d_hidden": 32, "chunk_size": 2}, experts_every=2, memory_blocks=(1,),
    )  # fmt: skip
    model = LanguageModel(config.model_config())
    tokens, targets = facts(seed, options["facts"])

    def batch(step: int) -> tuple[Tensor, Tensor]:
        picked = torch.randint(len(tokens), (options["batch_size"],), generator=generator(seed, step))
        return tokens[picked], targets[picked]

    gates: list[dict[str, Any]] = []

    def watch(step: int, aux: dict[str, Tensor]) -> None:
        for key, value in aux.items():
            if step % (4 * EVERY) == 0 and key.endswith(".gate") and key.count(".") == 1:  # the memory's own
                about = {"step": step}
                gates.append(
                    {"metric": "gate", "value": float(value), "unit": "", "part": f"step {step}", "about": about}
                )

    train(model, batch, options, say, watch)
    about = {"facts": len(tokens), "chance": 1 / ANSWERS, "parameters": model.num_parameters()}
    found = [{"metric": "accuracy", "value": right(model, tokens, targets), "unit": "", "about": about}]
    if memory is not None:
        for index, spec in zip(model.backbone.order, model.backbone.specs, strict=True):
            if spec.paths[0].word == MEMORY:
                cast(Block, model.backbone.blocks[index]).inactive = True
        found.append({"metric": "accuracy_ablated", "value": right(model, tokens, targets), "unit": "", "about": about})
    return found + gates


@torch.no_grad()
def right(model: LanguageModel, tokens: Tensor, targets: Tensor) -> float:
    """Share of the facts that the model answers."""
    return float((model(tokens).logits[:, -1].argmax(-1) == targets[:, -1]).float().mean())


def facts(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """(count, 2) distinct pairs of tokens, and the answers as targets of the second."""
    source = generator(seed, 11)
    pairs = torch.randperm(NAMES * NAMES, generator=source)[:count]
    tokens = torch.stack([pairs // NAMES, pairs % NAMES], 1)
    targets = torch.full_like(tokens, -100)
    targets[:, 1] = torch.randint(ANSWERS, (count,), generator=source)
    return tokens, targets
