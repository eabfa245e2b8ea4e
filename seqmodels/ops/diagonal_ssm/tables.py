"""The small matrices of a chunk of Q tokens, from a diagonal SSM's constants, in float64 whatever the phases.

    inward[s] = b e^{(Q-1-s) z}       what token s of a chunk leaves in the state behind it
    outward[t] = conj(c e^{(t+1) z})  what token t reads of the state in front of the chunk, (Re, -Im): a real sum
    taps[l] = Re sum_n c b e^{l z}    what token t reads of token t - l; ``skip`` is in the first
    decay + rest = e^{Qz}             in two parts, each a float32 number

``strict``: a token does not see itself. Its taps are one token later, the first is zero, and it reads the state one
power earlier. ``early``: states are one decay ahead, e^z x in place of x, so that inward ones have one power more and
outward ones one less; what adjoint states need, which come to a document's end without a decay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MODES = 16  # of a group
SIZE = 16  # tokens of a chunk


class Tables(NamedTuple):
    """Real and imaginary parts apart, modes in groups of 16 with zeros behind the last: (heads, groups, Q, 16), the
    outward ones (heads, groups, 16, Q), taps (heads, groups, Q), of a group's own modes; decays (heads, groups, 16)."""

    in_real: Tensor
    in_imaginary: Tensor
    out_real: Tensor
    out_imaginary: Tensor
    taps: Tensor
    decay_real: Tensor
    decay_imaginary: Tensor
    rest_real: Tensor
    rest_imaginary: Tensor
    power_real: Tensor
    power_imaginary: Tensor


def grouped(pairs: Tensor) -> Tensor:
    """(heads, modes, 2) as (heads, groups, 16) complex128, zeros behind the last mode."""
    padded = F.pad(pairs.double(), (0, 0, 0, -pairs.shape[1] % MODES))
    return torch.view_as_complex(padded.unflatten(1, (-1, MODES)).contiguous())


def powers_of(z: Tensor) -> Tensor:
    """e^{lz} for l from 0 to Q: (heads, groups, Q + 1, 16) complex; 1 for modes that are none."""
    times = torch.arange(SIZE + 1, device=z.device)
    return torch.exp(grouped(z)[:, :, None] * times[:, None])


def tables_of(z: Tensor, b: Tensor, c: Tensor, skip: Tensor | None, *, strict: bool, early: bool) -> Tables:
    """From z, b, c (heads, modes, 2) and skip (heads,)."""
    power, b_HGN, c_HGN = powers_of(z), grouped(b), grouped(c)
    taps = torch.einsum("hgn,hgln->hgl", c_HGN * b_HGN, power[:, :, :SIZE]).real
    if strict:
        taps = F.pad(taps[..., :-1], (1, 0))
    elif skip is not None:
        taps[:, 0, 0] += skip.double()
    inward = b_HGN[:, :, None] * (power[:, :, 1:] if early else power[:, :, :SIZE]).flip(2)
    seen = power[:, :, :SIZE] if strict or early else power[:, :, 1:]
    outward = (c_HGN[:, :, None] * seen).transpose(2, 3)
    values = (
        inward.real, inward.imag, outward.real, -outward.imag, taps, *in_two_parts(power[:, :, SIZE]),
        power[:, :, :SIZE].real, power[:, :, :SIZE].imag,
    )  # fmt: skip
    return Tables(*(value.float().contiguous() for value in values))


def in_two_parts(numbers: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(real, imaginary) of complex128 numbers in float32, and what these lack."""
    real, imaginary = numbers.real.float(), numbers.imag.float()
    return real, imaginary, numbers.real - real.double(), numbers.imag - imaginary.double()


def conjugate(pairs: Tensor) -> Tensor:
    return torch.stack((pairs[..., 0], -pairs[..., 1]), -1)


def grouped_pairs(states: Tensor) -> Tensor:
    """(documents, heads, modes, 2) as (documents, heads, groups, 2, 16), zeros behind the last mode."""
    padded = F.pad(states, (0, 0, 0, -states.shape[2] % MODES))
    return padded.unflatten(2, (-1, MODES)).transpose(-1, -2).contiguous()


def ungrouped_pairs(states: Tensor, modes: int) -> Tensor:
    return states.transpose(-1, -2).flatten(2, 3)[:, :, :modes].contiguous()
