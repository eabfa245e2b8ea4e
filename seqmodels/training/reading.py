"""How a run's steps read the text: rows of which length, and whether they go on where the step before ended.

Every step reads ``batch_size x data.sequence_length`` tokens, whatever its rows are, so that a share of
the steps is a share of the tokens. When all steps read rows of ``data.sequence_length`` and carry nothing, rows
are those of :class:`~seqmodels.tasks.text.PackedText`: each epoch cut into rows, the rows shuffled. Otherwise
the endless stream of documents (each epoch in an order of its own) is dealt out to the stages in order, as many
tokens to each as its steps read: no token is left out or read twice between stages. Inside its stretch, a stage that
carries nothing reads rows in shuffled order; one that carries has ``rows`` lanes of equal length side by side, and
step t reads the t-th row of each lane.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from seqmodels.configuration import ConfigError
from seqmodels.tasks.corpus import CorpusError
from seqmodels.tasks.shuffle import permutation
from seqmodels.tasks.text import PackedText, TextBatch

if TYPE_CHECKING:
    from seqmodels.training.config import TrainConfig

_STAGE_ROWS = 3  # stream of the shuffle, beside those of documents, rows and masks


class Span(NamedTuple):
    """Steps ``first`` to ``end - 1``, which read in one way.

    Attributes:
        sequence_length: tokens of a window.
        windows: of a row, one behind the other.
        rows: of a step, over all processes and micro-batches.
        carry: rows go on where those of the step before ended.
        where: place in the configuration, for errors.
    """

    first: int
    end: int
    sequence_length: int
    windows: int
    rows: int
    carry: bool
    where: str

    @property
    def row_length(self) -> int:
        return self.sequence_length * self.windows

    @property
    def linked(self) -> bool:
        """Whether a window may go on from a state."""
        return self.carry or self.windows > 1


def reading_plan(config: TrainConfig) -> list[Span]:
    """The spans of a run in order; one for all steps, or one for each stage of its curriculum.

    Raises:
        ConfigError: rows that do not fill a step, or that the objective cannot read in pieces.
    """
    if config.curriculum is None:
        given = [(0, config.steps, None, None, None, "the run")]
    else:
        first = config.curriculum.first_steps(config.steps)
        given = [
            (first[i], first[i + 1], stage.sequence_length, stage.backpropagation_windows, stage.carry_state,
             f"curriculum.stages.{i} ({stage.name})")
            for i, stage in enumerate(config.curriculum.stages)
        ]  # fmt: skip
    spans = [
        _span(
            config, begin, end, length or config.data.sequence_length,
            windows or config.backpropagation_windows, config.carry_state if carry is None else carry, where,
        )
        for begin, end, length, windows, carry, where in given
    ]  # fmt: skip
    if all(not span.linked and span.sequence_length == config.data.sequence_length for span in spans):
        return [spans[0]._replace(end=config.steps, where="the run")]
    return spans


def _span(config: TrainConfig, first: int, end: int, length: int, windows: int, carry: bool, where: str) -> Span:
    tokens = config.batch_size * config.data.sequence_length
    if tokens % (length * windows):
        raise ConfigError(
            f"{where}: rows of sequence_length={length} x backpropagation_windows={windows} tokens do not divide the "
            f"batch_size={config.batch_size} x data.sequence_length={config.data.sequence_length} = {tokens} tokens "
            "that every step reads; make the one a divisor of the other"
        )
    span = Span(first, end, length, windows, tokens // (length * windows), carry, where)
    prefix = config.model.prefix_length
    if config.model.objective == "prefix" and prefix is not None:
        if span.linked:
            key = "carry_state" if carry else "backpropagation_windows"
            raise ConfigError(
                f"{where}: {key} is for causal models; with model.objective=prefix a layer reads the first "
                f"{prefix} tokens of a row at once, so that a row cannot go on from a state. Leave it out"
            )
        if prefix >= length:
            raise ConfigError(
                f"{where}: model.prefix_length={prefix} leaves no next token to predict in rows of "
                f"sequence_length={length}; lower the one or raise the other"
            )
    return span


class TextReader:
    """Rows of the training text by step: a pure function of the configuration, the text and the step.

    Raises:
        CorpusError: a text with fewer tokens than a row.
    """

    def __init__(self, spans: list[Span], data: PackedText) -> None:
        self.spans, self.data = spans, data
        self.plain = len(spans) == 1 and not spans[0].linked
        self._order: tuple[int, np.ndarray] | None = None
        longest = max(span.row_length for span in spans)
        if longest > data.total_tokens:
            raise CorpusError(
                f"the corpus has {data.total_tokens} tokens, less than one row of {longest}; add text, or lower "
                "sequence_length or backpropagation_windows"
            )

    def span(self, step: int) -> Span:
        """The span that ``step`` belongs to."""
        return next(span for span in self.spans if step < span.end)

    def goes_on(self, step: int) -> bool:
        """Whether the rows of ``step`` begin where those of the step before ended."""
        span = self.span(step)
        return span.carry and step > span.first

    def number(self, step: int) -> int:
        """Rows read before ``step``."""
        return sum(max(0, min(step, span.end) - span.first) * span.rows for span in self.spans)

    def batch(self, step: int, first: int, count: int) -> TextBatch:
        """Rows ``first`` to ``first + count - 1`` of ``step``'s."""
        if self.plain:
            return self.data.batch(self.number(step) + first, count)
        span = self.span(step)
        rows = [self._position(span, step, row) for row in range(first, first + count)]
        return self.data.stream.read(rows, span.row_length)

    def document_capacity(self, step: int, rows: int) -> int:
        """The most documents that ``rows`` rows of one window each can touch in the span of ``step``."""
        if self.plain:
            return self.data.document_capacity(rows)
        return self.data.stream.document_capacity(rows, self.span(step).sequence_length)

    def _position(self, span: Span, step: int, row: int) -> int:
        """Where a row begins in the stream."""
        begin = span.first * span.rows * span.row_length  # all steps read the same number of tokens
        steps, done = span.end - span.first, step - span.first
        if span.carry:
            return begin + (row * steps + done) * span.row_length
        if self._order is None or self._order[0] != span.first:
            seed = self.data.seed
            self._order = (span.first, permutation(seed, span.first, _STAGE_ROWS, count=steps * span.rows))
        return begin + int(self._order[1][done * span.rows + row]) * span.row_length
