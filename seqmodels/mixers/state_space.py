"""What the state-space layers share: parameters that say how they are trained, checks, and refusals."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from seqmodels.configuration import nearest
from seqmodels.init import DiagonalSystem, Settings, perturbed_legs
from seqmodels.init.hippo import DIAGONAL_INITS, diagonal_system
from seqmodels.init.settings import default_settings
from seqmodels.layout import Layout
from seqmodels.mixers.base import Mixer, ParameterHint
from seqmodels.mixers.discretization import REAL_PARTS, SMALLEST, STEPS
from seqmodels.mixers.evaluation_cache import EvaluationCache

LEARNING_RATE = 1e-3  # of the state matrices and steps, unless the global one is smaller
INITS = (*DIAGONAL_INITS, "ptd")


class StateSpaceMixer(Mixer):
    """Base of the diagonal layers: training hints by parameter name, direction, and the evaluation cache."""

    #: Parameters that learn at LEARNING_RATE at most and never decay.
    slow_parameters: tuple[str, ...] = ("log_dt", "A_real", "A_imag", "B")

    def __init__(
        self,
        d_model: int,
        *,
        bidirectional: bool,
        rate: float,
        learning_rates: Mapping[str, float | None] | None,
        weight_decays: Mapping[str, float | None] | None,
    ) -> None:
        super().__init__(d_model)
        self.bidirectional = bidirectional
        if bidirectional:
            self.causality = "bidirectional"  # type: ignore[misc]
        self.rate = rate
        self._hint_overrides = (dict(learning_rates or {}), dict(weight_decays or {}))
        self._cache = EvaluationCache()

    @property
    def rate(self) -> float:
        """Factor on every step: 2 for inputs sampled half as often as in training."""
        return self._rate

    @rate.setter
    def rate(self, value: float) -> None:
        if not value > 0:
            raise ValueError(f"{type(self).__name__}: rate is {value!r}; expected a positive number")
        self._rate = float(value)

    def _set_hints(self) -> None:
        """Once all parameters are registered: the hints of this instance."""
        rates, decays = self._hint_overrides
        known = [name for name in self._parameters]
        for label, given in (("learning_rates", rates), ("weight_decays", decays)):
            for name, value in given.items():
                if name not in known:
                    raise ValueError(
                        f"{type(self).__name__}: {label} names {name!r}.{nearest(name, known)} "
                        f"Parameters: {', '.join(known)}"
                    )
                if value is not None and not value >= 0:
                    raise ValueError(
                        f"{type(self).__name__}: {label}[{name!r}] is {value!r}; expected a number >= 0, or null for "
                        "the global setting"
                    )
        hints = {}
        for name in known:
            slow = name in self.slow_parameters
            rate = rates.get(name, LEARNING_RATE if slow else None)
            decay = decays.get(name, 0.0 if slow else None)
            if rate is not None or decay is not None:
                hints[name] = ParameterHint(decay, rate)
        self.parameter_hints = hints  # type: ignore[misc]

    def train(self, mode: bool = True) -> StateSpaceMixer:
        self._cache.clear()
        return super().train(mode)

    def _check_call(self, x: Tensor, state: object, layout: Layout | None, return_state: bool) -> None:
        self.check_input(x, state, layout)
        if self.bidirectional and (state is not None or return_state):
            self._refuse_state("carry a state")
        if state is not None:
            self.check_state(state, x.shape[0] if layout is None else layout.num_documents)

    def _refuse_state(self, what: str) -> None:
        raise ValueError(
            f"{type(self).__name__}: a bidirectional layer cannot {what}, since outputs depend on later tokens; "
            "build it with bidirectional=False"
        )

    def state_bytes(self, context_length: int, *, batch_size: int = 1, dtype: torch.dtype | None = None) -> int:
        """Exact bytes of the state; 0 for a bidirectional layer, which has none."""
        return 0 if self.bidirectional else super().state_bytes(context_length, batch_size=batch_size, dtype=dtype)


def check_steps(owner: str, dt_min: float, dt_max: float, dt_activation: str, real_part: str) -> None:
    """Refuses an empty range of steps and unknown parameterisations."""
    if not 0 < dt_min < dt_max:
        raise ValueError(f"{owner}: dt_min={dt_min} and dt_max={dt_max}; expected 0 < dt_min < dt_max")
    for name, value, known in (("dt_activation", dt_activation, STEPS), ("real_part", real_part, REAL_PARTS)):
        if value not in known:
            raise ValueError(f"{owner}: unknown {name} {value!r}.{nearest(value, known)} Known: {', '.join(known)}")


def initial_system(
    owner: str, init: str, size: int, *, b_half: bool = False, b_clip: float | None = None, weight: float | None = None
) -> DiagonalSystem:
    """A and B by name: those of :func:`seqmodels.init.diagonal_system`, and "ptd" with all ``size`` modes.

    ``weight`` is PTD's (see :class:`seqmodels.init.Settings`).
    """
    if init not in INITS:
        raise ValueError(f"{owner}: unknown init {init!r}.{nearest(init, INITS)} Known: {', '.join(INITS)}")
    if init != "ptd":
        return diagonal_system(init, size, b_half=b_half, b_clip=b_clip)
    found = perturbed_legs(size, ptd_settings(size, weight))
    return DiagonalSystem(found.eigenvalues, found.input_vector(), False)


def ptd_settings(size: int, weight: float | None) -> Settings:
    settings = default_settings(size)
    return settings if weight is None else settings._replace(weight=weight)


def fill_eigenvalues(a_real: Tensor, a_imag: Tensor, eigenvalues: Tensor, real_part: str) -> None:
    """Copies eigenvalues into the parameters of their real and imaginary parts, Re A at most -SMALLEST."""
    size = (-eigenvalues.real).clamp_min(SMALLEST)
    a_real.copy_(REAL_PARTS[real_part][1](size).expand_as(a_real))
    a_imag.copy_(eigenvalues.imag.expand_as(a_imag))


def eigenvalues_of(a_real: Tensor, a_imag: Tensor, real_part: str) -> Tensor:
    """A (..., 2) in float64 from its parameters."""
    return torch.stack((-REAL_PARTS[real_part][0](a_real.double()), a_imag.double()), -1)
