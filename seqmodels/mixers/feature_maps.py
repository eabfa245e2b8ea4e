"""Feature maps of linear attention: phi(q) . phi(k) stands in for exp(q . k).

A map is a module that takes (batch, length, heads, width) queries or keys to
(batch, length, heads, ``output_dim``); the same module serves one token, (batch, heads, width).
``FEATURE_MAPS`` holds them by name; ``nonnegative`` says that phi(q) . phi(k) >= 0 always, so that
attention weights can be normalised by their sum.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import elu

from seqmodels.mixers.base import Registry, check_positive


class FeatureMap(nn.Module):
    """Base of feature maps. Learned maps make their parameters from ``num_heads`` and ``width``."""

    nonnegative: ClassVar[bool] = True

    def __init__(self, num_heads: int, width: int) -> None:
        super().__init__()
        check_positive(type(self).__name__, num_heads=num_heads, width=width)
        self.num_heads, self.width = num_heads, width

    @property
    def output_dim(self) -> int:
        return self.width


class Identity(FeatureMap):
    """phi(x) = x: plain linear attention, RetNet, Mamba-2. Weights of either sign."""

    nonnegative = False

    def forward(self, x: Tensor) -> Tensor:
        return x


class EluPlusOne(FeatureMap):
    """phi(x) = elu(x) + 1 (Katharopoulos et al. 2020, section 3.2)."""

    def forward(self, x: Tensor) -> Tensor:
        return elu(x) + 1


class Relu(FeatureMap):
    """phi(x) = max(x, 0)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


class Taylor(FeatureMap):
    """phi(x) = [1, x / f^{1/4}, x_i^2 / sqrt(2 f), x_i x_j / sqrt(f) for i < j], with f the width.

    Then phi(q) . phi(k) = 1 + s + s^2 / 2 with s = q . k / sqrt(f), the second-order expansion of
    exp(s), in 1 + f + f (f + 1) / 2 features: each product of two coordinates stands once
    (Based, arXiv:2402.18668, section 4.1).
    """

    @property
    def output_dim(self) -> int:
        return 1 + self.width + self.width * (self.width + 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        # Made anew, not kept in buffers: nothing to lose in a cast, a deepcopy or to_empty.
        row, column = torch.triu_indices(self.width, self.width, device=x.device)
        scale = torch.where(row == column, 1 / math.sqrt(2 * self.width), 1 / math.sqrt(self.width)).to(x.dtype)
        pairs = x[..., row] * x[..., column] * scale
        return torch.cat([torch.ones_like(x[..., :1]), x * self.width**-0.25, pairs], dim=-1)


FEATURE_MAPS = Registry(
    "feature map",
    {
        "identity": "seqmodels.mixers.feature_maps:Identity",
        "elu": "seqmodels.mixers.feature_maps:EluPlusOne",
        "relu": "seqmodels.mixers.feature_maps:Relu",
        "taylor": "seqmodels.mixers.feature_maps:Taylor",
    },
)
