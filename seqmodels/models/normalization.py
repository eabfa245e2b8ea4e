"""Norms and dropout of the residual blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmodels.layout import Layout
from seqmodels.ops.rms_norm import rms_norm


class RMSNorm(nn.RMSNorm):
    """y = weight * x / sqrt(mean(x^2) + eps), over the last dimension, in x's dtype.

    The parameters are cast to x, so that a float32 residual stream is normalised in float32 beside
    bfloat16 parameters.
    """

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        assert self.eps is not None  # make_norm gives it
        return rms_norm(x, self.weight.to(x.dtype), self.eps)


class LayerNorm(nn.LayerNorm):
    """y = weight * (x - mean(x)) / sqrt(var(x) + eps) + bias, over the last dimension, in x's dtype."""

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class Identity(nn.Module):
    """No norm."""

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        return x


class BatchNorm(nn.Module):
    """Batch normalisation of (batch, length, channels) over batch and length; padding does not count.

    y = weight * (x - m) / sqrt(v + eps) + bias, with the batch's mean and variance in training and
    running averages in evaluation, as ``torch.nn.BatchNorm1d`` has them (the running variance is the
    unbiased one). It lets a token see later ones, so causal models refuse it.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float, momentum: float = 0.1) -> None:
        super().__init__()
        self.eps = eps
        self.momentum = momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        mean, variance = self.running_mean.to(x.dtype), self.running_var.to(x.dtype)
        if self.training:
            if layout is None:
                count = x.new_full((), x.shape[0] * x.shape[1])
                mean = x.mean((0, 1))
                variance = (x - mean).square().mean((0, 1))
            else:
                valid = layout.valid[..., None].to(x.dtype)
                count = valid.sum()
                mean = (x * valid).sum((0, 1)) / count
                variance = ((x - mean).square() * valid).sum((0, 1)) / count
            with torch.no_grad():
                unbiased = variance * (count / (count - 1).clamp(min=1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        scale = self.weight.to(x.dtype) * torch.rsqrt(variance + self.eps)
        return (x - mean) * scale + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, momentum={self.momentum}"


def make_norm(kind: str, d_model: int, epsilon: float) -> nn.Module:
    """The norm called ``kind`` in a model's configuration."""
    if kind == "rms":
        return RMSNorm(d_model, eps=epsilon)
    if kind == "layer":
        return LayerNorm(d_model, eps=epsilon)
    if kind == "batch":
        return BatchNorm(d_model, epsilon)
    return Identity()


class Dropout(nn.Module):
    """Dropout of (batch, length, channels); ``tied`` draws one mask for all positions of a row.

    S4's tied dropout: the mask has shape (batch, 1, channels).
    """

    def __init__(self, probability: float, tied: bool = False) -> None:
        super().__init__()
        self.probability = probability
        self.tied = tied

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0.0:
            return x
        if not self.tied:
            return F.dropout(x, self.probability)
        mask = F.dropout(x.new_ones(x.shape[0], 1, x.shape[2]), self.probability)
        return x * mask

    def extra_repr(self) -> str:
        return f"{self.probability}, tied={self.tied}"
