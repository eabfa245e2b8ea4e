"""Sums of exponentials over time: the convolution kernel of a diagonal SSM, and its states."""

from seqmodels.ops.vandermonde.op import vandermonde, vandermonde_adjoint
from seqmodels.ops.vandermonde.powers import powers
from seqmodels.ops.vandermonde.states import diagonal_final_state, diagonal_response

__all__ = ["diagonal_final_state", "diagonal_response", "powers", "vandermonde", "vandermonde_adjoint"]
