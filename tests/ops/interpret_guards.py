"""Triton kernels between guard pages, interpreted: reads and writes outside their tensors show without a GPU."""

from __future__ import annotations

import pytest
import torch

import seqmodels.ops.diagonal_ssm
import seqmodels.ops.feature_attention
import seqmodels.ops.linear_attention
import seqmodels.ops.linear_recurrence
import seqmodels.ops.mamba3
import seqmodels.ops.short_conv
import seqmodels.ops.sparse_attention
import seqmodels.ops.vandermonde  # noqa: F401  (registers the ops)
from seqmodels.ops import canary
from seqmodels.ops.examples import EXAMPLES, Draw
from seqmodels.ops.registration import OPERATORS
from seqmodels.testing.guarded import run_guarded

# Two problems of the ops whose interpretation takes minutes; the check on a GPU runs all of them.
FEW = {**dict.fromkeys(("feature_attention", "feature_state"), (2, 5)), "sparse_attention": (1, 3)}
NAMES = [name for name in sorted(EXAMPLES) if "triton" in OPERATORS[name].modules]


@pytest.mark.parametrize("length", [1, 19])
@pytest.mark.parametrize("name", NAMES)
def test_kernel_stays_inside_its_memory(name, length):
    operator = OPERATORS[name]
    taken = 0
    batch = 1 if name in FEW else 2
    for number, arguments in enumerate(EXAMPLES[name](Draw(torch.float32, "cpu", batch=batch, length=length))):
        if number not in FEW.get(name, (number,)):
            continue
        if operator._refusal("triton", "cpu", arguments) is not None:
            continue
        taken += 1
        plain = canary.results(operator, "triton", arguments)
        guarded = run_guarded(lambda *given, op=operator: canary.results(op, "triton", given), *arguments)
        exact = canary.results(operator, "reference", canary.in_dtype(arguments, torch.float64))
        for (what, value), (_, same) in zip(plain, guarded, strict=True):
            assert torch.equal(value, same), f"{what} depends on memory outside the tensors"
        errors = canary.compare(plain, exact)
        assert max(errors.values()) < canary.TOLERANCE[torch.float32], errors
    assert taken
