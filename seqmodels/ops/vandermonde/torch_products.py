"""Vandermonde products as products of two small factors, in plain PyTorch.

With l = a m + b the power splits, e^{l z} = e^{a m z} e^{b z}, so that for one head

    kernel[a m + b] = Re sum_n (w[n] e^{a m z[n]}) e^{b z[n]}         a matrix product over (n, Re/Im)
    sum_l g[l] e^{l z[n]} = sum_a e^{a m z[n]} sum_b g[a m + b] e^{b z[n]}

Factors hold A + m powers instead of A m of them. They are formed in complex128 by doubling
(e^{(k + j) z} = e^{k z} e^{j z}), whose error after L steps is L roundings of float64, and only then
rounded to the working precision: the phase needs no reduction. Heads are taken in blocks, which
bounds the factors' memory and keeps them in the cache.

R rows, H heads of a block, N states, A blocks of m times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_BLOCK = {"cpu": 2**17}  # powers of a block of heads
_BLOCK_ELSEWHERE = 2**24  # launches cost more than memory


def kernel(z: Tensor, weight: Tensor, length: int, scale: float) -> Tensor:
    """scale Re sum_n weight e^{l z}: (rows, heads, length) from weight (rows, heads, states, 2)."""
    rows, heads = weight.shape[:2]
    result = weight.new_empty((rows, heads, length))
    numbers = torch.view_as_complex(weight.contiguous())
    for block, outer_HAN, inner_HMN in _factors(z, rows, length, numbers.dtype):
        inner = _pairs(inner_HMN)
        left_HRAN = numbers[:, block].transpose(0, 1)[:, :, None] * outer_HAN[:, None]
        product = torch.matmul(_pairs(left_HRAN.conj_physical()).flatten(1, 2), inner.transpose(1, 2))
        product = product.view(inner.shape[0], rows, -1)[..., :length].transpose(0, 1)
        torch.mul(product, scale, out=result[:, block])
    return result


def moments(z: Tensor, g: Tensor, *, first: bool = True) -> tuple[Tensor, Tensor]:
    """sum_l g e^{l z} and, with ``first``, sum_l l g e^{l z}: (rows, heads, states, 2) from g (rows, heads, length)."""
    rows, heads, length = g.shape
    dtype = torch.complex128 if g.dtype == torch.float64 else torch.complex64
    results = [torch.empty((rows, heads, z.shape[1]), dtype=dtype, device=g.device) for _ in range(1 + first)]
    for block, outer_HAN, inner_HMN in _factors(z, rows, length, dtype):
        count, size = outer_HAN.shape[1], inner_HMN.shape[1]
        padded = torch.nn.functional.pad(g[:, block], (0, count * size - length))
        left = padded.transpose(0, 1).reshape(inner_HMN.shape[0], rows * count, size)
        inner = _pairs(inner_HMN)
        if first:
            inner = torch.cat((inner, inner * torch.arange(size, device=g.device, dtype=g.dtype)[:, None]), -1)
        parts = torch.matmul(left, inner).view(inner.shape[0], rows, count, 1 + first, -1, 2)
        numbers = torch.view_as_complex(parts)
        results[0][:, block] = torch.einsum("han,hran->rhn", outer_HAN, numbers[:, :, :, 0])
        if first:
            begins_A = torch.arange(0, count * size, size, device=g.device, dtype=g.dtype)
            results[1][:, block] = torch.einsum("han,hran->rhn", outer_HAN, numbers[:, :, :, 1])
            results[1][:, block] += torch.einsum("han,hran->rhn", outer_HAN * begins_A[:, None], numbers[:, :, :, 0])
    return torch.view_as_real(results[0]), torch.view_as_real(results[1]) if first else g.new_empty(0)


def _factors(z: Tensor, rows: int, length: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of heads with e^{a m z} (heads, A, states) and e^{b z} (heads, m, states), in complex ``dtype``."""
    heads, states, _ = z.shape
    # Both matrices have the same size at m = sqrt(rows * length).
    size = min(2 ** round(math.log2(math.sqrt(rows * length))), 2 ** math.ceil(math.log2(length)))
    count = -(-length // size)
    budget = _BLOCK.get(z.device.type, _BLOCK_ELSEWHERE)
    step = max(1, budget // (states * (size + rows * count)))
    exponent = torch.view_as_complex(z.double().contiguous())
    for begin in range(0, heads, step):
        block = slice(begin, min(begin + step, heads))
        inner = _powers(exponent[block], size)
        outer = _powers(exponent[block] * size, count)
        yield block, outer.to(dtype), inner.to(dtype)


def _powers(exponent: Tensor, count: int) -> Tensor:
    """e^{k exponent} for k < count: (heads, count, states) complex128, by doubling."""
    result = torch.empty((exponent.shape[0], count, exponent.shape[1]), dtype=exponent.dtype, device=exponent.device)
    result[:, 0] = 1
    have = 1
    while have < count:
        more = min(have, count - have)
        factor = torch.exp(exponent * have)[:, None]
        torch.mul(result[:, :more], factor, out=result[:, have : have + more])
        have += more
    return result


def _pairs(numbers: Tensor) -> Tensor:
    """(..., N) complex as (..., 2 N) real."""
    return torch.view_as_real(numbers).flatten(-2)
