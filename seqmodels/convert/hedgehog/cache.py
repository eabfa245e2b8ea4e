"""Decode state of converted models as a transformers cache: constant memory, whatever the length."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from seqmodels.convert.files import ConversionError
from seqmodels.state import State

_NAME = "hedgehog_layer"  # attribute of the key tensor that leads from a module to its cache layer


class HedgehogCacheLayer(CacheLayerMixin):
    """One layer's state: sums of phi(k) v^T and phi(k), and for the hybrid the window's keys and values.

    transformers' attention modules give a layer the new keys and values and pass what it returns to the
    attention function. A linear layer needs the queries too, so :meth:`update` returns the tensors
    it was given, marked with this layer, and the attention function does the work.

    Attributes:
        state: None before the first token.
        seen: tokens so far, padding included; it drives positions.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None
        self.seen = 0
        self._waiting = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._waiting:
            raise RuntimeError(
                "keys were given to a HedgehogCache and never reached the converted attention; the model's "
                "attention implementation was changed after conversion (set_attn_implementation), or the model is "
                "not a converted one"
            )
        self._waiting = True
        self.seen += key_states.shape[-2]
        key_states = key_states.view_as(key_states)  # not the caller's tensor: the mark must not outlive the call
        setattr(key_states, _NAME, self)
        return key_states, value_states

    def store(self, state: State) -> None:
        """Takes the state after the tokens of the last :meth:`update`."""
        self.state = state
        self._waiting = False
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to allocate: the first tokens make the state."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    @property
    def nbytes(self) -> int:
        return 0 if self.state is None else self.state.nbytes

    def offload(self) -> None:
        if self.state is not None:
            self.device = next(self.state.tensors())[1].device
            self.state = self.state.to("cpu")

    def prefetch(self) -> None:
        if self.state is not None:
            self.state = self.state.to(self.device)

    def reset(self) -> None:
        self.state, self.seen, self._waiting = None, 0, False
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            device = next(self.state.tensors())[1].device
            if indices.dtype == torch.bool:
                indices = indices.nonzero().flatten()
            self.state = self.state.select(indices.to(device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = torch.arange(self.state.batch_size)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            self._refuse_rollback()

    def activate_past_recording(self) -> None:
        self._refuse_rollback()

    def _refuse_rollback(self) -> NoReturn:
        raise NotImplementedError(
            "a linear attention state cannot be taken back: what it has added it no longer knows one by one. "
            "Assisted and speculative generation and prompt lookup need a rollback; generate without them, or keep a "
            "copy.deepcopy of the cache to go back to"
        )


class HedgehogCache(Cache):
    """A cache for a converted model: ``past_key_values`` of its forward, reordered by beam search.

    Args:
        num_layers: of the model (``model.config.num_hidden_layers``).
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[HedgehogCacheLayer() for _ in range(num_layers)])

    @property
    def nbytes(self) -> int:
        """Bytes of all states together."""
        return sum(layer.nbytes for layer in self.layers)  # type: ignore[union-attr]


def layer_of(key: Tensor) -> HedgehogCacheLayer | None:
    """The cache layer that ``key`` went through on its way to the attention function."""
    return getattr(key, _NAME, None)


def check_cache(cache: Any, num_layers: int) -> None:
    """Refuses caches that hold keys and values, and those of another model."""
    if not isinstance(cache, HedgehogCache):
        raise TypeError(
            f"past_key_values is a {type(cache).__name__}; a converted model keeps sums, not keys and values. Leave it "
            "out, or give seqmodels.convert.hedgehog.HedgehogCache(model.config.num_hidden_layers)"
        )
    if len(cache.layers) != num_layers:
        raise ConversionError(f"past_key_values has {len(cache.layers)} layers; this model has {num_layers}")
