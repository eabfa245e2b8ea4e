"""S4-PTD (arXiv 2310.01698): S4D on the eigenvalues of a slightly perturbed LegS."""

from __future__ import annotations

from typing import Literal

import torch

from seqmodels.configuration import nearest
from seqmodels.init import DiagonalSystem, PerturbedLegS, perturbed_legs, random_perturbation
from seqmodels.mixers.discretization import Discretization, Positive, RealPart
from seqmodels.mixers.s4d import S4D
from seqmodels.mixers.state_space import ptd_settings


class S4PTD(S4D):
    r"""The S4D layer with all d_state complex modes of A_LegS + E = V diag(lambda) V^-1:

    .. code-block:: text

        lambda <- -|Re lambda| + i Im lambda,   B = V^-1 B_LegS,   C = C_0 V,  C_0 real N(0, 1), one a channel
        K[l] = Re sum_n (C_n B_n) (e^{z_n} - 1) / lambda_n e^{l z_n}

    LegS and this layer differ by ||E||, in the transfer function at every frequency, where S4D differs from
    LegS by a constant at some. Section 4 of Yu, Nigmetov, Morozov, Mahoney and Erichson.

    Args:
        d_state: N, the number of modes; sizes 2, 8, 16, 32, 64 and 128 ship with the package, others
            are solved for once (see :func:`seqmodels.init.perturbed_legs`).
        perturbation: "ptd" (optimised) or "random" (a Gaussian E: the ablation).
        perturbation_weight: of ||E|| / ||A|| against log kappa(V) in "ptd"; None: the shipped one.
        perturbation_size: ||E|| / ||A|| of "random", Frobenius.
        perturbation_seed: of "random".
        train_b: B is a parameter of its own. By default it is folded into C, as in the published experiments.

    The other arguments are those of :class:`~seqmodels.mixers.s4d.S4D`.

    Raises:
        ValueError: see S4D.
        PerturbationNotFound: a d_state and weight for which no start of the solver meets its target.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        perturbation: Literal["ptd", "random"] = "ptd",
        perturbation_weight: float | None = None,
        perturbation_size: float = 1e-4,
        perturbation_seed: int = 0,
        train_b: bool = False,
        discretization: Discretization = "zoh",
        softmax_length: int | None = None,
        real_part: RealPart = "exp",
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_activation: Positive = "exp",
        n_ssm: int = 1,
        channels: int = 1,
        bidirectional: bool = False,
        rate: float = 1.0,
        learning_rates: dict[str, float | None] | None = None,
        weight_decays: dict[str, float | None] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        known = ("ptd", "random")
        if perturbation not in known:
            raise ValueError(
                f"S4PTD: unknown perturbation {perturbation!r}.{nearest(perturbation, known)} Known: {', '.join(known)}"
            )
        self._perturbation = (perturbation, perturbation_weight, perturbation_size, perturbation_seed)
        self._b_is_parameter = train_b
        super().__init__(
            d_model,
            d_state=d_state,
            init="ptd",
            discretization=discretization,
            softmax_length=softmax_length,
            real_part=real_part,
            dt_min=dt_min,
            dt_max=dt_max,
            dt_activation=dt_activation,
            n_ssm=n_ssm,
            channels=channels,
            bidirectional=bidirectional,
            rate=rate,
            learning_rates=learning_rates,
            weight_decays=weight_decays,
            device=device,
            dtype=dtype,
        )

    def _perturbed(self) -> PerturbedLegS:
        kind, weight, size, seed = self._perturbation
        if kind == "random":
            return random_perturbation(self.d_state, size, seed=seed)
        return perturbed_legs(self.d_state, ptd_settings(self.d_state, weight))

    def _initial_system(self) -> DiagonalSystem:
        found = self._perturbed()
        stable = torch.complex(-found.eigenvalues.real.abs(), found.eigenvalues.imag)
        return DiagonalSystem(stable, found.input_vector(), False)

    def _trains_b(self) -> bool:
        return self._b_is_parameter

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As S4D, but for C = C_0 V (times B where that is folded in)."""
        super().reset_parameters()
        if self.C.is_meta:
            return
        found = self._perturbed()
        rows = torch.randn_like(self.C[..., 0]).to("cpu", torch.complex128)
        c = rows @ found.vectors
        self.C.copy_(torch.view_as_real(c if self.B is not None else c * found.input_vector()))
