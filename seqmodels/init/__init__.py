"""State matrices that layers start from: HiPPO-LegS, its diagonal relatives, and its perturbations."""

from __future__ import annotations

from seqmodels.init.hippo import DIAGONAL_INITS, DiagonalSystem, diagonal_system, legs, legs_low_rank, legs_normal
from seqmodels.init.perturbation import PerturbedLegS, random_perturbation
from seqmodels.init.ptd import PerturbationNotFound, perturbed_legs, solve
from seqmodels.init.settings import Settings

__all__ = [
    "DIAGONAL_INITS",
    "DiagonalSystem",
    "PerturbationNotFound",
    "PerturbedLegS",
    "Settings",
    "diagonal_system",
    "legs",
    "legs_low_rank",
    "legs_normal",
    "perturbed_legs",
    "random_perturbation",
    "solve",
]
