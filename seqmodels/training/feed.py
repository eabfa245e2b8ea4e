"""What a process reads in a step: its micro-batches, and the states that its rows go on from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from seqmodels.configuration import ConfigError
from seqmodels.models.stack import ModelState
from seqmodels.tasks.text import PackedText, TextBatch
from seqmodels.training.config import TrainConfig
from seqmodels.training.data import TextData
from seqmodels.training.distributed import Processes
from seqmodels.training.prefix import PrefixMasking
from seqmodels.training.reading import Span, TextReader, reading_plan
from seqmodels.training.windows import cut_windows


class Feed:
    """Micro-batches of training and validation text, as arguments of the objective.

    Attributes:
        longest: tokens of the longest document that goes on from a state; None when none does.

    Raises:
        ConfigError: rows that the processes and micro-batches cannot share; see :func:`reading_plan` for others.
    """

    def __init__(self, config: TrainConfig, data: TextData, here: Processes) -> None:
        self.config, self.data, self.here = config, data, here
        self.spans = reading_plan(config)
        self._rows = {span: micro_batch_rows(config, span, here.world_size) for span in self.spans}
        self.reader = TextReader(self.spans, data.train)
        self.masking = None
        if config.model.objective == "prefix":
            self.masking = PrefixMasking(config.prefix, config.model, data.tokenizer, config.seed)
        self.longest = None
        linked = [span for span in self.spans if span.linked]
        if linked:
            documents = int(data.train.stream.lengths.max())
            carries = any(span.carry for span in linked)
            self.longest = documents if carries else min(documents, max(span.row_length for span in linked))
        self.step = 0
        self._states: list[ModelState | None] = [None] * config.accumulation

    def begin(self, step: int) -> None:
        """To be called before each step."""
        self.step = step
        if not self.reader.goes_on(step):
            self._states = [None] * self.config.accumulation

    @property
    def recomputes(self) -> bool:
        """Whether windows of the step are computed again in its backward."""
        return self.reader.span(self.step).windows > 1

    def batches(self) -> list[TextBatch]:
        """This process's micro-batches of the step."""
        rows = self._rows[self.reader.span(self.step)]
        found = []
        for index in range(self.config.accumulation):
            first = self._first_row(index, rows)
            batch = self.reader.batch(self.step, first, rows)
            if self.masking is not None:
                batch = self.masking.masked(batch, self.reader.number(self.step) + first, validation=False)
            found.append(batch)
        return found

    def arguments(self, batch: TextBatch, index: int) -> tuple[Any, ...]:
        """Of the objective, on the device, for micro-batch ``index``."""
        span = self.reader.span(self.step)
        # One capacity for all batches, so that a compiled objective is compiled once for each span.
        capacity = self.reader.document_capacity(self.step, len(batch.lengths)) if self.config.compile else None
        if not span.linked:
            return self._placed(batch, batch.layout(capacity))
        windows = cut_windows(batch, span.windows, state=self._states[index], capacity=capacity)
        return self._placed(batch, windows)

    def keep(self, states: list[ModelState | None]) -> None:
        """The states after the step, a micro-batch each."""
        if self.reader.span(self.step).carry:
            self._states = states

    def validation(self, data: PackedText) -> Iterator[tuple[int, tuple[Any, ...]]]:
        """A fixed sample of held-out rows of ``data.sequence_length``, as (rows, arguments); no state is carried."""
        rows = self.validation_rows(data)
        size = self.config.batch_size // (self.here.world_size * self.config.accumulation)
        for begin in range(0, rows, max(1, size)):
            count, first = min(max(1, size), rows - begin), self.here.rank * rows + begin
            batch = data.batch(first, count)
            if self.masking is not None:
                batch = self.masking.masked(batch, first, validation=True)
            capacity = data.document_capacity(max(1, size)) if self.config.compile else None
            yield count, self._placed(batch, batch.layout(capacity))

    def validation_rows(self, data: PackedText) -> int:
        """Rows of a validation on this process."""
        return max(1, min(self.config.validation_rows, data.rows_per_epoch) // self.here.world_size)

    def carried_share(self, batches: list[TextBatch]) -> float:
        """The share of the step's rows on this process that go on inside a document, from a state."""
        inside = [begun for batch in batches for begun in batch.inside]
        return sum(inside) / len(inside) if self.reader.goes_on(self.step) else 0.0

    def state_tensors(self) -> dict[str, Tensor]:
        """The states to go on from after the step, by number of their first row and field."""
        tensors = {}
        for index, state in enumerate(self._states):
            if state is not None:
                first = self._first_row(index, state.batch_size)
                tensors |= {f"{first:08d}.{name}": tensor for name, tensor in state.tensors()}
        return tensors

    def load_states(self, tensors: dict[str, Tensor], template: ModelState | None) -> None:
        """Inverse of :meth:`state_tensors`, whose results of all processes ``tensors`` holds.

        The number of processes and of micro-batches may have changed: rows are found by their number. Of ``template``
        the structure is used alone.
        """
        if not tensors or template is None:
            return
        fields: dict[str, list[Tensor]] = {}
        for name in sorted(tensors):  # by first row
            fields.setdefault(name.partition(".")[2], []).append(tensors[name])
        whole = {name: torch.cat(parts) for name, parts in fields.items()}
        names = iter([name for name, _ in template.tensors()])
        rows = next(iter(whole.values())).shape[0] // (self.here.world_size * self.config.accumulation)
        state = pytree.tree_map_only(Tensor, lambda _: whole[next(names)], template)
        for index in range(self.config.accumulation):
            first = self._first_row(index, rows)
            # Copies: a slice would keep the rows of all processes alive.
            part = state.map(lambda tensor, first=first: tensor[first : first + rows].clone())
            self._states[index] = part.to(device=self.here.device)

    def _first_row(self, index: int, rows: int) -> int:
        return (index * self.here.world_size + self.here.rank) * rows

    def _placed(self, batch: TextBatch, layout: Any) -> tuple[Any, ...]:
        device = self.here.device
        masked = None if batch.masked is None else batch.masked.to(device)
        return batch.tokens.to(device), batch.targets.to(device), layout.to(device), masked


def micro_batch_rows(config: TrainConfig, span: Span, world_size: int) -> int:
    """Rows of a micro-batch on one process.

    Raises:
        ConfigError: the step's rows are not divisible.
    """
    parts = world_size * config.accumulation
    if span.rows % parts == 0:
        return span.rows // parts
    if span.rows == config.batch_size:
        raise ConfigError(
            f"batch_size={config.batch_size} is not divisible by {world_size} processes x accumulation="
            f"{config.accumulation}; the nearest that is: {max(1, round(config.batch_size / parts)) * parts}"
        )
    raise ConfigError(
        f"{span.where}: a step has {span.rows} rows of {span.row_length} tokens (batch_size={config.batch_size} x "
        f"data.sequence_length={config.data.sequence_length} / {span.row_length}), which is not divisible by "
        f"{world_size} processes x accumulation={config.accumulation}; raise batch_size, or lower accumulation"
    )
