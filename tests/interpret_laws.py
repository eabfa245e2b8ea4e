"""Laws 1, 2 and 5 on the Triton kernels, interpreted, in float32 (the interpreter's bfloat16 product is wrong)."""

from __future__ import annotations

import pytest
import torch
from test_laws import FIRST, _layer

import seqmodels
from seqmodels.testing import laws


@pytest.mark.parametrize(("name", "label"), FIRST)
def test_law_on_triton(name, label):
    layer = _layer(name, label)
    try:
        laws.backend_agreement(layer, backends=["triton"], dtypes=[torch.float32], autocast=None, length=19)
    except seqmodels.BackendUnavailable as reason:
        if not any(expected in str(reason) for expected in ("this op has only", "q is on 'cpu'")):
            raise  # a kernel that is there must run; FlexAttention is for GPUs
        pytest.skip(str(reason))
    with seqmodels.backend("triton"):
        laws.split(layer, dtype=torch.float32, length=9, batch_size=1)
        laws.packing(layer, dtype=torch.float32)
