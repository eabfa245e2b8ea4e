"""One decode step of linear attention in plain PyTorch; the state is updated in place."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pad


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    past_weight: Tensor | None,
    diagonal_weight: Tensor | None,
    state: Tensor,
    normalize: bool,
    epsilon: float,
) -> Tensor:
    batch_size, ranks, heads, _ = v.shape
    state_BNP = state.flatten(0, 1)  # B stands for batch x heads

    def by_head(x_BRGN: Tensor) -> Tensor:
        """(batch, R, G, N) to (batch x heads, R, N)."""
        x = x_BRGN.to(state.dtype)
        x = x.repeat_interleave(heads // x.shape[2], dim=2)
        return x.transpose(1, 2).reshape(batch_size * heads, ranks, -1)

    q_BRN, k_BRN, v_BRP = by_head(q), by_head(k), by_head(v)
    if normalize:
        v_BRP = pad(v_BRP, (0, 1), value=1.0)
    if log_decay is not None:
        state_BNP.mul_(log_decay.exp().view(-1, 1, 1))
    own = q_BRN @ k_BRN.transpose(1, 2)
    if diagonal_weight is not None:
        own = own * diagonal_weight.reshape(-1, 1, 1)
    y = q_BRN @ state_BNP + own @ v_BRP
    written = v_BRP if past_weight is None else v_BRP * past_weight.reshape(-1, 1, 1)
    state_BNP.baddbmm_(k_BRN.transpose(1, 2), written)
    if normalize:
        y = y[..., :-1] / (y[..., -1:] + epsilon)
    return y.view(batch_size, heads, ranks, -1).transpose(1, 2).contiguous().to(v.dtype)
