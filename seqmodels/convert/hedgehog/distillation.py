"""Stage 1: every layer's feature maps against its own softmax attention, one layer in memory at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqmodels.convert.hedgehog.runtime import AttentionCall
from seqmodels.convert.hedgehog.softmax import softmax_weights

_FLOOR = 1e-12  # of a student's weight inside the logarithm
OUTPUT_SCALE = 1000.0


class Distillation:
    """Observer that trains: for each layer it computes the loss and its gradient at once, then lets go of both.

    The queries, keys and values of a layer depend on the frozen weights and, since softmax is passed
    on, on no other layer's maps. So each layer's loss is its own problem, and the gradient of their
    mean needs no more memory than one layer.

    With P the teacher's and A the student's weights, n queries that are not padding:

    .. code-block:: text

        cross_entropy   -1/(heads n) sum_{h,i} sum_j P_ij log max(A_ij, 1e-12)
        output          1000 mean (y_student - y_teacher)^2, before the output projection

    (Hedgehog, arXiv:2402.04347, section 4; LoLCATs, arXiv:2410.10254, section 3.)

    Attributes:
        losses: of the last forward, by layer.
    """

    def __init__(self, loss: str, num_layers: int) -> None:
        self.loss, self.num_layers = loss, num_layers
        self.losses: dict[int, Tensor] = {}

    def __call__(self, layer: int, core: Any, call: AttentionCall, teacher: Tensor) -> None:
        call = call._replace(q=call.q.detach(), k=call.k.detach(), v=call.v.detach())
        loss = self._output if self.loss == "output" else self._cross_entropy
        with torch.enable_grad():
            self.losses[layer] = loss(core, call, teacher.detach())

    def _output(self, core: Any, call: AttentionCall, teacher: Tensor) -> Tensor:
        y, _ = core(call.q, call.k, call.v, layout=call.layout())
        error = (y - teacher).to(torch.promote_types(y.dtype, torch.float32)).square()
        if call.key_mask is not None:
            error = error[call.key_mask]
        loss = OUTPUT_SCALE * error.mean()
        (loss / self.num_layers).backward()
        return loss.detach()

    def _cross_entropy(self, core: Any, call: AttentionCall, teacher: Tensor) -> Tensor:
        """One sequence at a time, each with its own backward: weights of one sequence are there at once."""
        batch, length, heads, _ = call.q.shape
        queries = batch * length if call.key_mask is None else int(call.key_mask.sum())
        total = torch.zeros((), device=call.q.device)
        for index in range(batch):
            one = call.row(index)
            with torch.no_grad():
                target = softmax_weights(one)
            student = core.attention_weights(one.q, one.k, one.layout())
            entropy = -(target * student.clamp_min(_FLOOR).log()).sum(dim=-1)
            if one.key_mask is not None:
                entropy = entropy.masked_fill(~one.key_mask[:, None], 0.0)
            loss = entropy.sum() / (heads * queries)
            (loss / self.num_layers).backward()
            total += loss.detach()
        return total
