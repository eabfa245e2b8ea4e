"""The language model: embedding, a stack of residual blocks, and a head."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from seqmodels.layout import Layout
from seqmodels.mixers.base import check_positive
from seqmodels.models.config import ModelConfig
from seqmodels.models.initialization import construction, initialize_embedding
from seqmodels.models.loss import check_ids, inside_prefix, next_token_targets
from seqmodels.models.stack import ModelState, Stack, StackOutput, check_causal
from seqmodels.ops.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy
from seqmodels.ops.token_linear import token_linear


class ModelOutput(NamedTuple):
    """What ``LanguageModel.forward`` returns.

    Attributes:
        logits: (batch, length, vocab_size).
        state: after the last token, when ``return_state`` was set; a row a document.
        aux: auxiliary losses (summed over layers) and metrics by name.
    """

    logits: Tensor
    state: ModelState | None
    aux: dict[str, Tensor]


class LossOutput(NamedTuple):
    """What ``LanguageModel.loss`` returns.

    Attributes:
        loss: what to differentiate: the mean cross-entropy in nats plus the auxiliary losses.
        cross_entropy: the sum over scored tokens, in nats; divide by ``num_targets`` for the mean.
        num_targets: scored tokens, an int64 tensor.
        state: after the last token, when ``return_state`` was set.
        aux: auxiliary losses and metrics by name.
    """

    loss: Tensor
    cross_entropy: Tensor
    num_targets: Tensor
    state: ModelState | None
    aux: dict[str, Tensor]


class LanguageModel(nn.Module):
    """logits = W_head norm(stack(W_embedding[tokens])), causal, with a carried state.

    ``forward`` over a sequence, over its pieces with the state carried, token by token with
    ``step``, and over packed documents give the same logits, states and gradients.

    With ``meta_tokens`` every document is [meta_tokens; W_embedding[tokens]] to the stack. The learned rows go
    through it once a call, and all documents begin from the state behind them, which carries their gradient.
    A call with a state goes on from it and does not begin anew.

    Args:
        config: see :class:`seqmodels.models.ModelConfig`.
        device: where the weights are made; ``"meta"`` makes none (accounting).
        dtype: of the weights.

    Raises:
        ValueError: for a bidirectional layer, batch norm, or a prefix layer without the prefix
            objective, and for what the layers refuse, each with its block.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        with construction(device, dtype):
            self.embedding = nn.Embedding(config.vocab_size, config.d_model)
            self.backbone = Stack(config)
            self.head = None if config.tie_head else nn.Linear(config.d_model, config.vocab_size, bias=False)
            shape = (config.meta_tokens, config.d_model)
            self.meta_tokens = nn.Parameter(torch.empty(shape)) if config.meta_tokens else None
        check_causal(self.backbone, type(self).__name__, config.objective)
        if config.meta_tokens:
            self.backbone.pin(config.meta_tokens)
        if not self.embedding.weight.is_meta:
            initialize_embedding(self.embedding.weight, config.initialization)
            if self.head is not None:
                initialize_embedding(self.head.weight, config.initialization)
            if self.meta_tokens is not None:
                initialize_embedding(self.meta_tokens, config.initialization)

    @property
    def head_weight(self) -> Tensor:
        """(vocab_size, d_model); the embedding itself when the head is tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def encode(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        *,
        layout: Layout | None = None,
        return_state: bool = False,
    ) -> StackOutput:
        """Hidden vectors (batch, length, d_model) before the head; ``forward`` without its logits."""
        self._check_tokens(tokens, layout)
        if state is None and self.meta_tokens is not None:
            documents = tokens.shape[0] if layout is None else layout.num_documents
            length = tokens.shape[1] if return_state else 0
            # A state that is returned keeps whole windows, as it has them without meta tokens: decoding goes on.
            state = self._after_meta_tokens(documents, length, shrink=not return_state)
        return self.backbone(
            F.embedding(tokens, self.embedding.weight), state, layout=layout, return_state=return_state
        )

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        *,
        layout: Layout | None = None,
        return_state: bool = False,
    ) -> ModelOutput:
        """Logits of the next token at every position.

        Args:
            tokens: (batch, length) integer ids.
            state: from :meth:`init_state` or a previous call; a row for each document.
            layout: packed documents, left padding, prefix lengths.
            return_state: also return the state after the last token.
        """
        hidden, after, aux = self.encode(tokens, state, layout=layout, return_state=return_state)
        return ModelOutput(self.logits(hidden), after, aux)

    def logits(self, hidden: Tensor) -> Tensor:
        """The head alone: (..., d_model) to (..., vocab_size)."""
        return F.linear(hidden, self.head_weight)

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        state: ModelState | None = None,
        layout: Layout | None = None,
        return_state: bool = False,
        chunk_size: int | None = None,
    ) -> LossOutput:
        """Mean cross-entropy over the scored tokens, plus the layers' auxiliary losses.

        Logits exist for ``chunk_size`` tokens at a time (64 MiB of them when omitted).

        Args:
            tokens: (batch, length) integer ids.
            targets: (batch, length), the token to predict at each position, -100 where none is. By
                default the next token of the same document (:func:`next_token_targets`).
            state: carried over from the piece before (detach it for truncated back-propagation).
            layout: documents. The prefix objective needs its prefix lengths.

        Raises:
            ValueError: with the prefix objective, when no prefix lengths are given or a target lies
                inside a prefix, where prefix layers have already read it.
        """
        if targets is None:
            self._check_tokens(tokens, layout)
            targets = next_token_targets(tokens, layout)
        elif targets.shape != tokens.shape:
            raise ValueError(f"targets is {tuple(targets.shape)}; expected the shape of tokens, {tuple(tokens.shape)}")
        else:
            check_ids(targets, self.config.vocab_size, "targets", ignore_index=IGNORE_INDEX)
        if self.config.objective == "prefix":
            _check_prefix_targets(targets, layout)
        hidden, after, aux = self.encode(tokens, state, layout=layout, return_state=return_state)
        total = linear_cross_entropy(
            hidden.flatten(0, 1), self.head_weight, targets.flatten().long(), chunk_size=chunk_size
        )
        num_targets = (targets >= 0).sum()
        loss = total / num_targets.clamp(min=1)
        for name, value in aux.items():
            if name.endswith("_loss"):
                loss = loss + value
        return LossOutput(loss, total.detach(), num_targets, after, aux)

    @torch.no_grad()
    def step(self, tokens_t: Tensor, state: ModelState) -> Tensor:
        """One token for each row: (batch,) ids to (batch, vocab_size) logits.

        ``state`` is updated in place and never reallocated; nothing is read on the host, so that a
        CUDA graph can hold a step.
        """
        if tokens_t.dim() != 1:
            raise ValueError(f"step takes tokens of shape (batch,); got {tuple(tokens_t.shape)}")
        check_ids(tokens_t, self.config.vocab_size, "tokens_t")
        hidden = self.backbone.step(F.embedding(tokens_t, self.embedding.weight), state)
        return token_linear(hidden, self.head_weight)

    def init_state(
        self,
        batch_size: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ModelState:
        """The state before the first token; ``max_length`` bounds the context of full attention.

        With meta tokens that is the state behind them. Their gradient passes through it in training mode alone,
        so that a state to decode with holds no graph.
        """
        check_positive(type(self).__name__, batch_size=batch_size)
        if max_length is not None and max_length < 0:
            raise ValueError(f"max_length is {max_length}; expected a number of tokens")
        room = None if max_length is None else max_length + self.config.meta_tokens
        made = partial(self.backbone.init_state, max_length=room, dtype=dtype)
        if self.meta_tokens is None or self.meta_tokens.is_meta or torch.device(device or "cpu").type == "meta":
            return made(batch_size, device=device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training):
            state = self._after_meta_tokens(batch_size, max_length)
            if device is None and dtype is None:
                return state
            like = made(1, device="meta")
            return tree_map(lambda value, as_in: None if as_in is None else value.to(device, as_in.dtype), state, like)

    def _after_meta_tokens(self, documents: int, max_length: int | None, *, shrink: bool = True) -> ModelState:
        """The state behind the meta tokens for each document, with room for ``max_length`` tokens more."""
        assert self.meta_tokens is not None
        state = self.backbone(self.meta_tokens[None], return_state=True).state
        room = None if max_length is None else max_length + self.config.meta_tokens
        state = self.backbone.with_capacity(state, room, shrink=shrink)
        return state.map(lambda tensor: tensor.expand(documents, *tensor.shape[1:]).contiguous())

    def state_bytes(self, context_length: int, *, batch_size: int = 1, dtype: torch.dtype | None = None) -> int:
        """Exact bytes of the state for a context of ``context_length`` tokens."""
        return self.init_state(batch_size, max_length=context_length, device="meta", dtype=dtype).nbytes

    def flops(self, length: int) -> int:
        """Multiply and add operations of a forward over one sequence, meta tokens and head included."""
        return (
            self.backbone.flops(self.config.meta_tokens + length)
            + 2 * length * self.config.d_model * self.config.vocab_size
        )

    def num_parameters(self) -> int:
        """Distinct parameters: shared weights and a tied head count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def _check_tokens(self, tokens: Tensor, layout: Layout | None) -> None:
        if tokens.dim() != 2 or tokens.shape[0] == 0 or tokens.shape[1] == 0:
            raise ValueError(f"tokens has shape {tuple(tokens.shape)}; expected (batch, length), neither empty")
        if layout is not None and layout.document.shape != tokens.shape:
            raise ValueError(
                f"layout is for a grid of {tuple(layout.document.shape)}; tokens has shape {tuple(tokens.shape)}"
            )
        check_ids(tokens, self.config.vocab_size, "tokens")


def _check_prefix_targets(targets: Tensor, layout: Layout | None) -> None:
    if layout is None or layout.prefix_lengths is None:
        raise ValueError(
            "objective 'prefix' needs a layout with prefix_lengths: "
            "for example Layout.full(batch, length, prefix_lengths=[length // 2] * batch)"
        )
    leaking = inside_prefix(layout) & (targets >= 0)
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        torch.ops.aten._assert_async.msg(~leaking.any(), "a next-token target lies inside a prefix")
    elif bool(leaking.any()):
        row, column = leaking.nonzero()[0].tolist()
        raise ValueError(
            f"targets[{row}, {column}] lies inside its document's prefix, which prefix layers read in both directions, "
            "so its loss would leak; set it to -100 there (next_token_targets does)"
        )
