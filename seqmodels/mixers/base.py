"""The contract that every layer obeys, and the registry by name."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from seqmodels.layout import Layout
from seqmodels.state import State, check_state

Causality = Literal["causal", "prefix", "bidirectional"]


class MixerOutput(NamedTuple):
    """What ``forward`` returns.

    Attributes:
        y: (batch, length, d_model).
        state: the state after the last token, when ``return_state`` was set; one row per
            document for a packed layout.
        aux: scalar losses and metrics by name. Names that end in ``_loss`` are added to the
            training loss by the model.
    """

    y: Tensor
    state: Any = None
    aux: dict[str, Tensor] = {}  # noqa: RUF012 - the default is never written


class ParameterHint(NamedTuple):
    """What the optimiser should know about a parameter (None: the global setting)."""

    weight_decay: float | None = None
    learning_rate: float | None = None  # an upper bound: min(this, global)
    sparse_gradient: bool = False  # a sparse tensor of the rows read; no weight decay then


class Mixer(nn.Module):
    """A sequence layer: whole sequence = any split with carried state = token by token = packed.

    Subclasses call ``super().__init__(d_model)``, implement :meth:`forward`, :meth:`step` and
    :meth:`init_state`, and list optimiser hints by parameter name in :attr:`parameter_hints`.
    """

    causality: ClassVar[Causality] = "causal"
    #: False for a layer that convolves by FFT: each output holds rounding errors of later tokens too.
    exactly_causal: ClassVar[bool] = True
    parameter_hints: ClassVar[dict[str, ParameterHint]] = {}
    #: Parameters whose output is added to the residual stream: a model's depth-scaled initialisation shrinks them.
    residual_outputs: ClassVar[tuple[str, ...]] = ("out_proj.weight",)
    #: Weights of ``nn.Linear`` children that a model-wide initialisation must not overwrite (identity maps and the
    #: like).
    own_initialization: ClassVar[tuple[str, ...]] = ()

    def __init__(self, d_model: int) -> None:
        super().__init__()
        check_positive(type(self).__name__, d_model=d_model)
        self.d_model = d_model

    def forward(
        self, x: Tensor, state: Any = None, *, layout: Layout | None = None, return_state: bool = False
    ) -> MixerOutput:
        """Maps (batch, length, d_model) to the same shape, from ``state`` on (zero state when None).

        Pure: the state given is not mutated, the one returned shares no memory with the inputs
        and has the same capacity. Differentiable through both.
        """
        raise NotImplementedError

    def step(self, x_t: Tensor, state: Any) -> Tensor:
        """One token: (batch, d_model) to (batch, d_model). Updates ``state`` in place; inference only;
        reads nothing on the host, so that it can be captured in a CUDA graph."""
        raise NotImplementedError

    def check_room(self, state: Any) -> None:
        """Refuses a step for which a bounded state has no slot left, before anything is written.

        A model asks all its layers before the first of them steps, so that a refused token leaves
        the whole state as it was. Layers whose state is not bounded by a length keep this.
        """

    def after_optimizer_step(self) -> None:
        """Called by the training loop after each optimiser step, for what a layer adapts without a gradient."""

    def init_state(
        self,
        batch_size: int,
        *,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Any:
        """The state before the first token. ``max_length`` bounds the context for layers whose state
        grows with it. Device and dtype default to the parameters'."""
        raise NotImplementedError

    def with_capacity(self, state: Any, max_length: int | None, *, shrink: bool = True) -> Any:
        """The same state with the capacity that ``init_state(max_length=max_length)`` has, or with the one it has
        where that is larger and ``shrink`` is False: differentiable, nothing in place. The tokens seen must fit it.
        A layer whose state grows with the context implements this."""
        return state

    def pin(self, count: int) -> None:
        """Keeps ``count`` more of a document's first tokens in sight of all later ones. Called once by a model with
        meta tokens. A layer whose outputs depend on all of the past keeps this; one with a window implements it."""

    def state_bytes(self, context_length: int, *, batch_size: int = 1, dtype: torch.dtype | None = None) -> int:
        """Exact bytes of the state for a context of ``context_length`` tokens."""
        return self.init_state(batch_size, max_length=context_length, device="meta", dtype=dtype).nbytes

    def flops(self, length: int) -> int:
        """Multiply and add operations of a forward over one sequence of ``length`` tokens.

        The base counts the matrix products of ``nn.Linear`` children; layers add their op.
        """
        return 2 * length * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))

    def check_input(self, x: Tensor, state: Any = None, layout: Layout | None = None) -> None:
        """Refuses an input of another rank or width and a layout of another grid."""
        name = type(self).__name__
        if x.dim() != 3 or x.shape[-1] != self.d_model:
            raise ValueError(
                f"{name}: x has shape {tuple(x.shape)}; expected (batch, length, {self.d_model})."
                + (" For one token at a time call step(x_t, state)." if x.dim() == 2 else "")
            )
        if layout is not None and layout.document.shape != x.shape[:2]:
            raise ValueError(
                f"{name}: layout is for a grid of {tuple(layout.document.shape)}; x is {tuple(x.shape[:2])} "
                "(batch, length). Make the layout from this batch's lengths."
            )

    def check_state(self, state: Any, batch_size: int, *, max_length: int | None = None) -> None:
        """Refuses a state of another layer, batch size, capacity or dtype (see :func:`check_state`)."""
        dtype = (
            next((t.dtype for _, t in state.tensors() if t.is_floating_point()), None)
            if isinstance(state, State)
            else None
        )
        check_state(
            state, self.init_state(batch_size, max_length=max_length, device="meta", dtype=dtype), type(self).__name__
        )


def check_positive(owner: str, **values: int) -> None:
    """Refuses zero and negative sizes by name."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{owner}: {name} is {value!r}; expected a positive integer")


def check_divides(owner: str, divisor_name: str, divisor: int, name: str, value: int) -> None:
    """Refuses a width that a number of heads or groups does not divide."""
    check_positive(owner, **{divisor_name: divisor, name: value})
    if value % divisor:
        near = [d for d in range(1, value + 1) if value % d == 0]
        near.sort(key=lambda d: (abs(d - divisor), d))
        raise ValueError(
            f"{owner}: {name}={value} is not divisible by {divisor_name}={divisor}; "
            f"{divisor_name} could be {', '.join(map(str, sorted(near[:4])))}"
        )


class Registry:
    """Names to classes, imported when asked for."""

    def __init__(self, kind: str, builtin: dict[str, str]) -> None:
        self.kind = kind
        self._paths = dict(builtin)
        self._classes: dict[str, type] = {}

    def names(self) -> list[str]:
        return sorted({*self._paths, *self._classes})

    def shipped(self) -> list[str]:
        """Names of the library's own layers, without those a user registered."""
        return sorted(self._paths)

    def __contains__(self, name: str) -> bool:
        return name in self._paths or name in self._classes

    def __getitem__(self, name: str) -> type:
        if name in self._classes:
            return self._classes[name]
        if name not in self._paths:
            near = difflib.get_close_matches(name, self.names(), n=3, cutoff=0.5)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"unknown {self.kind} {name!r}.{hint} Known: {', '.join(self.names())}")
        module, _, attribute = self._paths[name].partition(":")
        self._classes[name] = getattr(importlib.import_module(module), attribute)
        return self._classes[name]

    def register(self, name: str) -> Callable[[T], T]:
        """Class decorator that adds a user's own layer under ``name``."""

        def add(cls: T) -> T:
            if name in self and self._classes.get(name) is not cls:
                raise ValueError(f"{self.kind} {name!r} exists already; choose another name")
            self._classes[name] = cls  # type: ignore[assignment]
            return cls

        return add


T = TypeVar("T", bound=type)
