"""Sequence classification: input map, a stack of residual blocks, pooling, and a head."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqmodels.layout import Layout
from seqmodels.models.config import ClassifierConfig
from seqmodels.models.initialization import construction, initialize_embedding
from seqmodels.models.loss import check_ids
from seqmodels.models.stack import Stack


class ClassifierOutput(NamedTuple):
    """(batch, num_classes) logits, and the stack's auxiliary losses and metrics by name."""

    logits: Tensor
    aux: dict[str, Tensor]


class SequenceClassifier(nn.Module):
    """logits = W pool(stack(input map of x)) + b; with two sequences, an MLP over [a, b, a - b, a * b].

    Bidirectional layers and batch norm are welcome. Padding (outside the layout's documents) is in no
    pool and in no batch statistic.

    Args:
        config: see :class:`seqmodels.models.ClassifierConfig`.
        device: where the weights are made.
        dtype: of the weights.

    Raises:
        ValueError: for a prefix layer (there is no prefix in classification), and for what layers refuse.
    """

    def __init__(
        self,
        config: ClassifierConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        width = config.d_model
        with construction(device, dtype):
            if config.vocab_size is not None:
                self.input = nn.Embedding(config.vocab_size, width)
                if not self.input.weight.is_meta:
                    initialize_embedding(self.input.weight, config.initialization)
            elif config.input_size is not None:
                self.input = nn.Linear(config.input_size, width)
            self.backbone = Stack(config)
            if config.sequences == 1:
                self.head = nn.Linear(width, config.num_classes)
            else:
                self.head = nn.Sequential(nn.Linear(4 * width, width), nn.GELU(), nn.Linear(width, config.num_classes))
        for spec, layer, site in self.backbone.named_layers():
            if layer.causality == "prefix":
                raise ValueError(
                    f"{type(self).__name__}: block {site} ({spec.name}) is a prefix layer, but there is no prefix; "
                    "use a causal or a bidirectional layer"
                )

    def forward(self, inputs: Tensor, *, layout: Layout | None = None) -> ClassifierOutput:
        """Logits of each sequence, or pair of sequences.

        Args:
            inputs: (batch, length) ids or (batch, length, input_size) values; with ``sequences: 2``
                (batch, 2, length) or (batch, 2, length, input_size).
            layout: where the sequences lie, one document a row, of the grid (batch, length), or
                (2 batch, length) with pairs in neighbouring rows: ``Layout.packed([[n0], [n1], ...])``
                for padding on the right, ``Layout.left_padded`` on the left. No padding when omitted.
        """
        pooled, aux = self._encode(self._rows(inputs), layout)
        if self.config.sequences == 2:
            a, b = pooled.unflatten(0, (-1, 2)).unbind(1)
            pooled = torch.cat([a, b, a - b, a * b], -1)
        return ClassifierOutput(self.head(pooled), aux)

    def loss(self, inputs: Tensor, labels: Tensor, *, layout: Layout | None = None) -> tuple[Tensor, ClassifierOutput]:
        """Mean cross-entropy in nats plus auxiliary losses, and the output it is made from.

        Args:
            inputs, layout: as in :meth:`forward`.
            labels: (batch,) int64 classes.
        """
        if labels.shape != inputs.shape[:1]:
            raise ValueError(f"labels has shape {tuple(labels.shape)}; expected ({inputs.shape[0]},)")
        check_ids(labels, self.config.num_classes, "labels", kind="class", bound="num_classes")
        output = self(inputs, layout=layout)
        loss = F.cross_entropy(output.logits.float(), labels.long())
        for name, value in output.aux.items():
            if name.endswith("_loss"):
                loss = loss + value
        return loss, output

    def _rows(self, inputs: Tensor) -> Tensor:
        """(rows, length[, input_size]), pairs in neighbouring rows."""
        config = self.config
        tail = "" if config.vocab_size is not None else f", {config.input_size}"
        shape = f"(batch, {'2, ' if config.sequences == 2 else ''}length{tail})"
        wanted = 2 + (config.sequences == 2) + (config.vocab_size is None)
        wrong = inputs.dim() != wanted or 0 in inputs.shape
        wrong |= config.sequences == 2 and not wrong and inputs.shape[1] != 2
        wrong |= config.vocab_size is None and not wrong and inputs.shape[-1] != config.input_size
        if wrong:
            raise ValueError(f"{type(self).__name__}: inputs has shape {tuple(inputs.shape)}; expected {shape}")
        return inputs.flatten(0, 1) if config.sequences == 2 else inputs

    def _encode(self, rows: Tensor, layout: Layout | None) -> tuple[Tensor, dict[str, Tensor]]:
        if layout is not None:
            _check_layout(layout, rows, type(self).__name__)
        if self.config.vocab_size is not None:
            check_ids(rows, self.config.vocab_size, "inputs")
            h = F.embedding(rows, self.input.weight)
        else:
            h = self.input(rows.to(self.input.weight.dtype))
        hidden, _, aux = self.backbone(h, layout=layout)
        return self._pool(hidden, layout), aux

    def _pool(self, hidden: Tensor, layout: Layout | None) -> Tensor:
        """(rows, length, d_model) to (rows, d_model)."""
        pooling = self.config.pooling
        if layout is None:
            return hidden.mean(1) if pooling == "mean" else hidden[:, -1 if pooling == "last" else 0]
        if pooling == "mean":
            total = hidden.masked_fill(~layout.valid[..., None], 0.0).sum(1)
            return total / layout.lengths[:, None].to(total.dtype)
        index = layout.last_token() if pooling == "last" else layout.starts
        return hidden.flatten(0, 1).index_select(0, index)


def _check_layout(layout: Layout, rows: Tensor, owner: str) -> None:
    if layout.document.shape != rows.shape[:2] or layout.num_documents != rows.shape[0]:
        raise ValueError(
            f"{owner}: the layout has {layout.num_documents} documents in a grid of {tuple(layout.document.shape)}; "
            f"the inputs are {rows.shape[0]} rows of {rows.shape[1]}, and each row is one sequence"
        )
    if layout.starts.device.type == "cpu" and not torch.compiler.is_compiling():
        row = layout.starts // layout.length
        if not torch.equal(row, torch.arange(rows.shape[0])):
            raise ValueError(f"{owner}: documents lie in rows {row.tolist()}; expected exactly one in each row")
