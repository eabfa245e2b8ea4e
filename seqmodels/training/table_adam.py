"""Adam on the rows of a table that a step has read."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 17  # elements updated at a time on the CPU: a chunk's five arrays stay in its cache


class TableAdam(torch.optim.SparseAdam):
    """The steps of ``torch.optim.SparseAdam``, by rows.

    .. code-block:: text

        of the rows r in the gradient g:    m_r = b1 m_r + (1 - b1) g_r,    v_r = b2 v_r + (1 - b2) g_r^2
                                            p_r -= lr sqrt(1 - b2^t) / (1 - b1^t)  m_r / (sqrt(v_r) + epsilon)

    with t the number of steps. Moments and weights of other rows stay as they are. Rows are gathered, updated and put
    back in place; PyTorch's own step goes through sparse tensors and masks.

    Raises:
        RuntimeError: a dense gradient.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        if not gradient.is_sparse:
            raise RuntimeError("TableAdam got a dense gradient; parameters with dense gradients belong to AdamW")
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        rate = group["lr"] * math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        gradient = gradient.coalesce()
        rows, values = gradient.indices()[0], gradient.values()
        size = max(1, _CHUNK // max(1, values[:1].numel())) if values.device.type == "cpu" else max(1, len(rows))
        for index, new in zip(rows.split(size), values.split(size), strict=True):
            mean = state["exp_avg"].index_select(0, index).lerp_(new, 1 - beta1)
            square = state["exp_avg_sq"].index_select(0, index).mul_(beta2).addcmul_(new, new, value=1 - beta2)
            state["exp_avg"].index_copy_(0, index, mean)
            state["exp_avg_sq"].index_copy_(0, index, square)
            mean.div_(square.sqrt_().add_(group["eps"]))
            weights = parameter.index_select(0, index).add_(mean, alpha=-rate)
            parameter.index_copy_(0, index, weights)
