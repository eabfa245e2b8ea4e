"""Mamba-3: the trapezoidal complex-valued state-space recurrence, SISO and MIMO."""

from seqmodels.ops.mamba3.op import PAIRINGS, Mamba3State, mamba3
from seqmodels.ops.mamba3.projection import A_ACTIVATIONS, ROTATIONS, Projection
from seqmodels.ops.mamba3.step import mamba3_step

__all__ = ["A_ACTIVATIONS", "PAIRINGS", "ROTATIONS", "Mamba3State", "Projection", "mamba3", "mamba3_step"]
