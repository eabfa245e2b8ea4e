"""Mamba-3: the trapezoidal complex-valued state-space recurrence, SISO and MIMO."""

from seqmodels.ops.mamba3.op import PAIRINGS, Mamba3State, mamba3

__all__ = ["PAIRINGS", "Mamba3State", "mamba3"]
