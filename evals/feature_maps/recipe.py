"""The inputs that maps are measured on, and the distillation that trains them.

``tokens``: rows of random tokens out of 64, each a vector drawn once from N(0, I_64) and given noise of 0.1 wherever
it stands; per head a query projection 1.6 R / 8 (R normal, 64 x 32) and a key projection that is the query's
plus 0.3 R' / 8. Attention on it is sharp, because equal tokens find each other. ``noise``: q and k from
N(0, I_64), where nothing finds anything; no map comes near the softmax on it, trained or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from evals.feature_maps.measures import cross_entropy, map_weights, softmax_weights
from seqmodels.mixers.feature_maps import FeatureMap

HEADS, LENGTH, WIDTH, BATCH, STEPS, LEARNING_RATE = 4, 64, 32, 8, 300, 1e-2
_VOCABULARY = _D_MODEL = 64


class Pair(NamedTuple):
    query_map: FeatureMap
    key_map: FeatureMap

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        return map_weights(*self, q, k)


def tokens(seed: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """A source of batches: size to q, k (size, LENGTH, HEADS, WIDTH)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    vectors = normal(_VOCABULARY, _D_MODEL)
    query = 1.6 * normal(_D_MODEL, HEADS, WIDTH) / 8
    key = query + 0.3 * normal(_D_MODEL, HEADS, WIDTH) / 8

    def draw(size: int) -> tuple[Tensor, Tensor]:
        index = torch.randint(_VOCABULARY, (size, LENGTH), generator=generator)
        x = vectors[index] + 0.1 * normal(size, LENGTH, _D_MODEL)
        return torch.einsum("bld,dhf->blhf", x, query), torch.einsum("bld,dhf->blhf", x, key)

    return draw


def noise(seed: int, length: int = 128, width: int = 64) -> Callable[[int], tuple[Tensor, Tensor]]:
    """A source of batches of independent normal q and k (size, length, HEADS, width)."""
    generator = torch.Generator().manual_seed(seed)
    return lambda size: tuple(torch.randn((2, size, length, HEADS, width), generator=generator))  # type: ignore


def distil(pair: Pair, draw: Callable[[int], tuple[Tensor, Tensor]], steps: int = STEPS) -> list[float]:
    """Trains the maps on the softmax's weights (AdamW without weight decay); the loss of every step."""
    parameters = [p for one in pair for p in one.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        q, k = draw(BATCH)
        loss = cross_entropy(softmax_weights(q, k), pair.weights(q, k))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
