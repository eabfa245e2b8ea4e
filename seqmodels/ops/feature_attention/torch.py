"""Feature attention in plain PyTorch: features in memory, then the chunked form of linear attention.

hedgehog_exp is made stable with one maximum for each document and feature, m = max over keys of
log phi(k): phi(k) e^-m <= 1, and per query phi(q) e^{m - max} <= 1. The keys that a query sees may
all lie far below m, so this runs in float64, where e^-700 is still a number; float32 would lose
what lies 87 below. (The C++ kernel takes maxima of tiles and stays in float32.)
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.ops.documents import token_table
from seqmodels.ops.feature_attention.maps import NO_KEY, features, project
from seqmodels.ops.linear_attention import torch as chunked

_NEVER_ZERO = 1e-300  # a divisor that underflows in float64 gives 0, not NaN


def supports(q: Tensor, *rest: object) -> str | None:
    if q.device.type == "mps" and "hedgehog_exp" in rest:
        return "hedgehog_exp runs in float64 in plain PyTorch, which this device does not have; use hedgehog_split"
    return None


class Keys:
    """phi(k) of a grid of tokens, and the scale that hedgehog_exp's features are relative to."""

    def __init__(
        self,
        k: Tensor,
        weight: Tensor | None,
        initial_state: Tensor | None,
        initial_log_scale: Tensor | None,
        starts: Tensor | None,
        lengths: Tensor | None,
        feature_map: str,
        heads: int,
    ) -> None:
        B, L = k.shape[:2]
        self.exponential = feature_map == "hedgehog_exp"
        self.table = None if starts is None or lengths is None else token_table(starts, lengths, B, L)
        u = project(self.inside(k), weight)
        self.initial_state, self.log_scale = initial_state, u.new_empty(0)
        if not self.exponential:
            self.phi = features(u, feature_map)
            return
        u = u.repeat_interleave(heads // u.shape[2], dim=2)
        log_phi = torch.cat([u, -u], dim=-1)
        with torch.no_grad():
            documents = B if starts is None else starts.shape[0]
            before = log_phi.new_full((documents, *log_phi.shape[2:]), NO_KEY)
            if initial_log_scale is not None:
                before = initial_log_scale
            if self.table is None:
                self.log_scale = torch.maximum(before, log_phi.amax(1))
                self.at_token = self.log_scale[:, None]
            else:
                tokens = log_phi.masked_fill(~self.table.valid[..., None, None], NO_KEY).flatten(0, 1)
                index = self.table.document.flatten()[:, None, None].expand_as(tokens)
                self.log_scale = before.scatter_reduce(0, index, tokens, "amax")
                self.at_token = self.log_scale[self.table.document]
        self.phi = self.inside((log_phi.double() - self.at_token).exp())
        if initial_state is not None:
            self.initial_state = initial_state.double() * (before.double() - self.log_scale).exp()[..., None]

    def inside(self, x: Tensor) -> Tensor:
        """Zero outside documents, whatever stands there."""
        return x if self.table is None else x.masked_fill(~self.table.valid[..., None, None], 0)

    def query_features(self, u: Tensor, feature_map: str) -> Tensor:
        if not self.exponential:
            return features(u, feature_map)
        heads = self.log_scale.shape[1]
        u = u.repeat_interleave(heads // u.shape[2], dim=2)
        log_phi = torch.cat([u, -u], dim=-1).double() + self.at_token
        return (log_phi - log_phi.detach().amax(-1, keepdim=True)).exp()


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor | None,
    initial_log_scale: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    feature_map: str,
    normalize: bool,
    epsilon: float,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute = torch.float64 if v.dtype == torch.float64 else torch.float32
    keys = Keys(k.to(compute), key_weight, initial_state, initial_log_scale, starts, lengths, feature_map, v.shape[2])
    phi_q = keys.query_features(project(keys.inside(q.to(compute)), query_weight), feature_map)
    y, state, denominator = chunked.forward(
        phi_q.unsqueeze(2), keys.phi.unsqueeze(2), v.to(phi_q.dtype).unsqueeze(2), log_decay, None, None,
        keys.initial_state, starts, lengths, normalize, _NEVER_ZERO if keys.exponential else epsilon, chunk_size,
    )  # fmt: skip
    return (
        y.squeeze(2).to(v.dtype),
        state.to(compute),
        keys.log_scale,
        denominator.to(compute).view(v.shape[:-1] if normalize else 0),
    )
