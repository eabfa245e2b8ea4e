"""A diagonal SSM as a scan over time, whole sequences and single steps."""

from seqmodels.ops.diagonal_ssm.op import diagonal_ssm, diagonal_ssm_step, pays_off

__all__ = ["diagonal_ssm", "diagonal_ssm_step", "pays_off"]
