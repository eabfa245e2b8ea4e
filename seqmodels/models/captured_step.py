"""``LanguageModel.step`` as one CUDA graph: a decode step is many small kernels, a replay one launch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from seqmodels.models.language_model import LanguageModel
from seqmodels.models.stack import ModelState


class CapturedStep:
    """A captured step for states of one shape.

    It owns the buffers that the graph reads and writes: the tokens, the state and the logits.
    :meth:`load` copies a prefilled state in; :meth:`__call__` copies tokens in and replays.
    """

    WARM_UP = 3  # runs before the capture, so that kernels are compiled and workspaces allocated

    def __init__(self, model: LanguageModel, state: ModelState, batch_size: int) -> None:
        self.device = model.embedding.weight.device
        with torch.cuda.device(self.device):
            self._capture(model, state, batch_size)

    def _capture(self, model: LanguageModel, state: ModelState, batch_size: int) -> None:
        self.state = state.clone()
        self.tokens = torch.zeros(batch_size, dtype=torch.int64, device=self.device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(self.WARM_UP):
                self.load(state)  # each from the same position: behind it there may be room for one token alone
                model.step(self.tokens, self.state)
        torch.cuda.current_stream().wait_stream(stream)
        # The warm-up has advanced the positions; every capture and replay must start from a valid state.
        self.load(state)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = model.step(self.tokens, self.state)

    def load(self, state: ModelState) -> None:
        """Copies ``state`` into the graph's own, without reallocating it."""
        for (_, ours), (_, theirs) in zip(self.state.tensors(), state.tensors(), strict=True):
            ours.copy_(theirs)

    def fits(self, state: ModelState) -> bool:
        """Whether ``state`` has the structure, shapes and dtypes that the graph was captured with."""
        return _signature(state) == _signature(self.state)

    def __call__(self, tokens: Tensor) -> Tensor:
        """(batch,) ids to (batch, vocab_size) logits, overwritten by the next call."""
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.logits


def _signature(state: ModelState) -> tuple:
    leaves, structure = pytree.tree_flatten(state)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]
