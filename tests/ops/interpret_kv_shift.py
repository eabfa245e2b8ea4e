"""KV shift on the Triton kernels of the short convolution, under the interpreter (TRITON_INTERPRET=1), in float32."""

from __future__ import annotations

import pytest
import torch

import seqmodels
from seqmodels.layout import Layout
from seqmodels.ops.kv_shift import kv_shift, kv_shift_step

# Sums of at most 4 float32 products of size about 1; the weights' gradient sums 2 * 19 * 5 of them.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def inputs(width: int, documents: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    shapes = ((2, 19, 3, 5), (3, width), (documents, width - 1, 3, 5))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("layout", [None, Layout.packed([[7, 2, 9], [19]], 19, capacity=5)], ids=["rows", "packed"])
@pytest.mark.parametrize("width", [2, 4])
def test_shift_and_its_gradients(width, layout):
    tensors = inputs(width, 2 if layout is None else 5)
    found = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        x, mix, before = leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]
        with seqmodels.backend(backend):
            y, state = kv_shift(x, mix, initial_state=before, layout=layout)
            grads = torch.autograd.grad(y.square().sum() + state.sum(), leaves)
        found.append([y, state, *grads])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours.double(), expected, **CLOSE)


def test_step():
    x, mix, before = (tensor.detach() for tensor in inputs(2, 2))
    state, expected_state = before.clone(), before.clone()
    with seqmodels.backend("triton"):
        y = kv_shift_step(x[:, 0], mix, state)
    with seqmodels.backend("reference"):
        expected = kv_shift_step(x[:, 0], mix, expected_state)
    torch.testing.assert_close(y, expected, **CLOSE)
    assert torch.equal(state, expected_state)
