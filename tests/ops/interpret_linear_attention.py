"""The Triton kernels of linear attention under the interpreter, in float32, against the definition."""

from __future__ import annotations

import pytest
import torch

import seqmodels
from seqmodels import Layout
from seqmodels.ops.kernels import KernelSpec
from seqmodels.ops.linear_attention import linear_attention, linear_attention_step, triton_scan

CASES = {
    "plain": dict(log_decay=False, past=False, diagonal=False),
    "decay": dict(log_decay=True, past=False, diagonal=False),
    "weights": dict(log_decay=True, past=True, diagonal=True),
    "rank": dict(log_decay=True, past=True, diagonal=True, ranks=4, length=37),
    "rank three": dict(log_decay=True, past=True, diagonal=True, ranks=3, length=45),
    "groups": dict(log_decay=True, past=False, diagonal=True, query_groups=2, key_groups=1, heads=4, batch=1),
    "normalize": dict(log_decay=True, past=True, diagonal=True, normalize=True),
    "normalize plain": dict(log_decay=False, past=False, diagonal=False, normalize=True),
    "segments": dict(log_decay=True, past=True, diagonal=True, length=140, batch=1, heads=1),
    "long": dict(log_decay=True, past=True, diagonal=True, length=280, batch=1, heads=1),
    "segments normalize": dict(log_decay=True, past=True, diagonal=True, length=130, batch=1, heads=1, normalize=True),
    "documents": dict(log_decay=True, past=True, diagonal=True, packed=[[1, 65, 3], [64, 40]], length=110),
    "long documents": dict(log_decay=True, past=True, diagonal=True, packed=[[90, 1, 80]], length=175, heads=1),
    "normalize documents": dict(
        log_decay=True, past=False, diagonal=False, packed=[[5, 70], [9]], length=80, normalize=True
    ),
    "one token": dict(log_decay=True, past=True, diagonal=True, length=1),
    "odd widths": dict(log_decay=True, past=True, diagonal=False, key_dim=20, value_dim=72, length=67),
}


def _tensors(
    log_decay, past, diagonal, *, ranks=1, length=70, batch=2, heads=2, query_groups=None, key_groups=None,
    key_dim=16, value_dim=24, normalize=False, packed=None,
):  # fmt: skip
    generator = torch.Generator().manual_seed(length + ranks)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batch = len(packed) if packed else batch
    layout = Layout.packed(packed, length, capacity=6) if packed else None
    documents = layout.num_documents if layout else batch
    q = draw(batch, length, ranks, query_groups or heads, key_dim)
    k = draw(batch, length, ranks, key_groups or heads, key_dim)
    if normalize:
        q, k = q.abs(), k.abs()
    tensors = {
        # v is a part of a wider projection, as layers pass it.
        "q": q, "k": k, "v": draw(batch, length, ranks, heads, 3 * value_dim)[..., value_dim : 2 * value_dim],
        "log_decay": -draw(batch, length, heads).abs() * 0.1 if log_decay else None,
        "past_weight": draw(batch, length, heads).abs() if past else None,
        "diagonal_weight": draw(batch, length, heads).abs() if diagonal else None,
        # A transposed view, as Mamba-3 passes it: kernels must not take it for contiguous.
        "initial_state": 0.3 * draw(documents, heads, value_dim + normalize, key_dim).abs().transpose(-1, -2),
    }  # fmt: skip
    return tensors, layout, normalize


def _run(tensors, layout, normalize, dtype, backend):
    leaves = {name: None if tensor is None else tensor.to(dtype).requires_grad_() for name, tensor in tensors.items()}
    q, k, v, *_ = leaves.values()
    with seqmodels.backend(backend):
        y, state = linear_attention(
            q, k, v, leaves["log_decay"], past_weight=leaves["past_weight"], layout=layout, normalize=normalize,
            diagonal_weight=leaves["diagonal_weight"], initial_state=leaves["initial_state"],
        )  # fmt: skip
        generator = torch.Generator().manual_seed(7)
        grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype) for x in (y, state)]
        used = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        found = torch.autograd.grad((y, state), list(used.values()), grads)
    return {"y": y.detach(), "state": state.detach()} | dict(zip(used, found, strict=True))


def _error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-300))


def _conditioning(tensors, wanted):
    """How much larger the terms of log_decay's gradient are than the gradient itself.

    The kernel sums dQ.Q - dK.K from each token to the end; each dot product is rounded relative to
    |dQ||Q| and |dK||K|, and independent roundings add in squares.
    """
    terms = sum(
        (wanted[name].flatten(2).norm(dim=-1) * tensors[name].flatten(2).norm(dim=-1)) ** 2 for name in ("q", "k")
    )
    suffix = terms.flip(1).cumsum(1).flip(1).sqrt()
    return float(suffix.norm() / wanted["log_decay"].norm())


# Each declaration of the kernel ships its own tiles and way to load; the interpreter runs all in float32.
SPECS = {
    "float32": (triton_scan.SCAN_FLOAT32, triton_scan.EXACT, list(CASES)),
    "tma": (triton_scan.SCAN, triton_scan.WIDE, ["rank three", "normalize", "documents", "odd widths", "long"]),
    "small": (triton_scan.SCAN_SMALL, triton_scan.SMALL, ["weights", "normalize documents"]),
}


@pytest.mark.parametrize(("spec", "case"), [(spec, case) for spec, (*_, cases) in SPECS.items() for case in cases])
def test_against_definition(spec, case, monkeypatch):
    declared, tile, _ = SPECS[spec]
    monkeypatch.setattr(triton_scan, "_spec", lambda device, dtype: declared)
    monkeypatch.setattr(KernelSpec, "tile", lambda self, device, variant, dtype: tile)
    tensors, layout, normalize = _tensors(**CASES[case])
    wanted = _run(tensors, layout, normalize, torch.float64, "reference")
    chunked = _run(tensors, layout, normalize, torch.float32, "torch")
    found = _run(tensors, layout, normalize, torch.float32, "triton")
    for name, value in wanted.items():
        # Twice the error that chunks in float32 have, and a few roundings of a float32 sum as a floor.
        floor = 4 * torch.finfo(torch.float32).eps
        if name == "log_decay":
            floor *= max(1.0, _conditioning(tensors, wanted))
        bound = 2 * _error(chunked[name], value) + floor
        assert _error(found[name], value) <= bound, name


def test_two_runs_are_bitwise_equal():
    tensors, layout, normalize = _tensors(**CASES["weights"])
    first, second = (_run(tensors, layout, normalize, torch.float32, "triton") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_segments_were_used():
    """The cases above reach the segmented path: one head of one long row is cut."""
    launches = []
    original = triton_scan._combine

    class Spy:
        def __getitem__(self, grid):
            launches.append(grid)
            return original[grid]

    triton_scan._combine = Spy()
    try:
        tensors, layout, normalize = _tensors(**CASES["segments"])
        _run(tensors, layout, normalize, torch.float32, "triton")
    finally:
        triton_scan._combine = original
    assert launches


@pytest.mark.parametrize(
    "case", ["plain", "weights", "rank three", "groups", "normalize", "normalize plain", "odd widths"]
)
def test_step_against_definition(case):
    tensors, _, normalize = _tensors(**CASES[case] | {"batch": 3, "length": 2})
    found = {}
    for backend, dtype in (("reference", torch.float64), ("torch", torch.float32), ("triton", torch.float32)):
        args = {name: None if x is None else x.to(dtype) for name, x in tensors.items()}
        state, outputs = args.pop("initial_state").contiguous(), []
        with seqmodels.backend(backend):
            for t in range(2):
                token = {name: None if x is None else x[:, t] for name, x in args.items()}
                outputs.append(linear_attention_step(**token, state=state, normalize=normalize))
        found[backend] = {"y": torch.stack(outputs), "state": state}
    for name, value in found["reference"].items():
        bound = 2 * _error(found["torch"][name], value) + 4 * torch.finfo(torch.float32).eps
        assert _error(found["triton"][name], value) <= bound, name
