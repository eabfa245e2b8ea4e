"""Elementwise linear recurrence, real or complex, with constant or changing decays."""

from seqmodels.ops.linear_recurrence.op import linear_recurrence, linear_recurrence_step

__all__ = ["linear_recurrence", "linear_recurrence_step"]
