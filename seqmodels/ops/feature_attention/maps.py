"""The feature maps that :func:`feature_attention` knows, in plain PyTorch.

Every map takes u = x W with W per query head, or u = x without it. With f the width of u:

================  ========================================================  ==================
name              phi(u)                                                    features
================  ========================================================  ==================
hedgehog_exp      [e^u, e^-u]                                               2 f
hedgehog_split    [softmax(u), softmax(-u)], each over f                    2 f
hedgehog_joint    softmax([u, -u]) over 2 f                                 2 f
taylor            [1, u / f^{1/4}, u_a u_b c_ab / sqrt(f) for a <= b]       1 + f + f (f + 1) / 2
elu               elu(u) + 1                                                f
relu, t2r         max(u, 0); t2r says that there is a W                     f
identity          u                                                         f
================  ========================================================  ==================

c_ab is 1, and 1 / sqrt(2) for a = b, so that phi(q) . phi(k) = 1 + s + s^2 / 2 with
s = q . k / sqrt(f); pairs stand row by row: (0, 0), (0, 1), ..., (1, 1), (1, 2), ...
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

FEATURE_MAPS = ("hedgehog_exp", "hedgehog_split", "hedgehog_joint", "taylor", "elu", "relu", "t2r", "identity")
NO_KEY = -1e30  # hedgehog_exp's running maximum before the first key: finite, so that differences are
# Maps with phi(q) . phi(k) >= 0 always, so that weights can be divided by their sum.
NONNEGATIVE = frozenset(FEATURE_MAPS) - {"identity"}


def feature_width(feature_map: str, width: int) -> int:
    """Number of features of a map whose u has ``width`` entries."""
    if feature_map.startswith("hedgehog"):
        return 2 * width
    return 1 + width + width * (width + 1) // 2 if feature_map == "taylor" else width


def project(x: Tensor, weight: Tensor | None) -> Tensor:
    """u: (..., groups, D) to (..., heads, f) with a weight (heads, D, f); x itself without one."""
    if weight is None:
        return x
    groups = x.shape[-2]
    by_group = weight.view(groups, weight.shape[0] // groups, *weight.shape[1:])
    return torch.einsum("...gd,ghdf->...ghf", x, by_group).flatten(-3, -2)


def features(u: Tensor, feature_map: str) -> Tensor:
    """phi(u) along the last dimension; all maps but hedgehog_exp, whose features need a scale."""
    width = u.shape[-1]
    if feature_map == "hedgehog_split":
        return torch.cat([u.softmax(-1), (-u).softmax(-1)], dim=-1)
    if feature_map == "hedgehog_joint":
        return torch.cat([u, -u], dim=-1).softmax(-1)
    if feature_map == "taylor":
        row, column = torch.triu_indices(width, width, device=u.device)
        scale = (row == column).to(u.dtype).mul_(math.sqrt(0.5) - 1).add_(1).div_(math.sqrt(width))
        return torch.cat([torch.ones_like(u[..., :1]), u * width**-0.25, u[..., row] * u[..., column] * scale], dim=-1)
    if feature_map == "elu":
        return F.elu(u) + 1
    return u if feature_map == "identity" else u.relu()
