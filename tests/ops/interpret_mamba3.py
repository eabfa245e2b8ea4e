"""Mamba-3's Triton kernels under the interpreter, in float32, against the definition in float64."""

from __future__ import annotations

import pytest
import torch
from mamba3_inputs import cut, make_inputs, make_state

import seqmodels
from seqmodels import Layout
from seqmodels.ops.mamba3 import Projection, mamba3, mamba3_step

SMALL = dict(batch_size=1, length=35, heads=2, head_dim=8, d_state=16, groups=1, angles=4, dt_scale=0.5)
CASES = {
    "siso": (SMALL, {}),
    "half pairs, norm, groups": (SMALL | dict(pairing="half", norm=True, angles=8, groups=2, head_dim=6), {}),
    "mimo": (SMALL | dict(ranks=4, pairing="half", length=21), {}),
    "mimo of three, norm": (SMALL | dict(ranks=3, norm=True, d_state=10, angles=3), {}),
    "documents": (SMALL | dict(batch_size=2), dict(packed=[[1, 20, 3], [17]])),
    "mimo documents": (SMALL | dict(ranks=2, norm=True), dict(packed=[[2, 18, 9]])),
    "no angles": (SMALL | dict(angles=0, d_state=6), {}),
    "one token": (SMALL | dict(length=1), {}),
}


def _prepare(case):
    sizes, options = CASES[case]
    sizes = dict(sizes)
    call = {"pairing": sizes.pop("pairing")} if "pairing" in sizes else {}
    inputs = make_inputs(**sizes)
    if "packed" in options:
        call["layout"] = Layout.packed(options["packed"], sizes["length"], capacity=5)
    return inputs, make_state(inputs, 5 if "packed" in options else None), call


def _run(backend, inputs, state, dtype, call):
    """Outputs and gradients of a random functional of all of them, to all inputs and the state."""
    leaves = {name: value.to(dtype) for name, value in inputs.items()}
    for name in ("x", "z"):  # parts of a wider projection, as the layer passes them
        wide = torch.cat([leaves[name].flatten(2)] * 3, dim=-1)
        leaves[name] = wide.chunk(3, dim=-1)[1].view(leaves[name].shape)
    leaves = {name: value.requires_grad_() for name, value in leaves.items()}
    carried = state.map(lambda tensor: tensor.to(dtype).requires_grad_())
    with seqmodels.backend(backend):
        out, after = mamba3(**leaves, initial_state=carried, **call)
        found = {"out": out, **dict(after.canonical().tensors())}
        generator = torch.Generator().manual_seed(7)
        loss = sum(
            (value * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(dtype)).sum()
            for value in found.values()
        )
        leaves |= {f"initial_{name}": tensor for name, tensor in carried.tensors()}
        grads = torch.autograd.grad(loss, list(leaves.values()))
    return found | {f"grad_{name}": grad for name, grad in zip(leaves, grads, strict=True)}


def _error(found, wanted):
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm().clamp_min(1e-300))


@pytest.mark.parametrize("case", CASES)
def test_against_definition(case):
    inputs, state, call = _prepare(case)
    wanted = _run("reference", inputs, state, torch.float64, call)
    chunked = _run("torch", inputs, state, torch.float32, call)
    found = _run("triton", inputs, state, torch.float32, call)
    for name, value in wanted.items():
        if value.numel() == 0:
            continue
        # Twice what chunks in float32 lose, and a few roundings of a float32 sum as a floor.
        bound = 2 * _error(chunked[name], value) + 8 * torch.finfo(torch.float32).eps
        assert _error(found[name], value) <= bound, name


def test_padding_is_never_read():
    inputs, state, call = _prepare("documents")
    valid = call["layout"].document >= 0
    poisoned = {
        name: value.masked_fill(~valid.view(*valid.shape, *[1] * (value.dim() - 2)), float("nan"))
        if value.shape[:2] == valid.shape
        else value
        for name, value in inputs.items()
    }
    clean = _run("triton", inputs, state, torch.float32, call)
    found = _run("triton", poisoned, state, torch.float32, call)
    for name, value in clean.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("at", [1, 16])
def test_any_cut_leaves_a_decode_state(at):
    inputs, state, call = _prepare("mimo")
    inputs = {name: value.float() for name, value in inputs.items()}
    state = state.map(lambda tensor: tensor.float())
    with seqmodels.backend("triton"):
        whole, end = mamba3(**inputs, initial_state=state, **call)
        head, middle = mamba3(**cut(inputs, 0, at), initial_state=state, **call)
        tail, after = mamba3(**cut(inputs, at, inputs["x"].shape[1]), initial_state=middle, **call)
    torch.testing.assert_close(torch.cat([head, tail], 1), whole, rtol=1e-4, atol=1e-4)
    for (_, left), (_, right) in zip(after.canonical().tensors(), end.canonical().tensors(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("ranks", "pairing", "activation", "rotation", "trapezoid", "d_state"),
    [
        (None, "adjacent", "heavy_tail", "data_dependent", True, 16),
        (4, "half", "softplus", "data_dependent", True, 16),
        (3, "half", "heavy_tail", "fixed", True, 12),
        (None, "adjacent", "heavy_tail", "none", False, 10),
    ],
)
def test_steps_against_definition(ranks, pairing, activation, rotation, trapezoid, d_state):
    angles = 0 if rotation == "none" else 4
    inputs = make_inputs(
        batch_size=2, length=6, heads=2, head_dim=6, d_state=d_state, groups=1, ranks=ranks, angles=angles,
        norm=ranks is not None,
    )  # fmt: skip
    projection = Projection(2, 6, d_state, 1, ranks or 1, angles, activation, 1e-4, rotation, trapezoid)
    names = ("b_weight", "c_weight", "b_bias", "c_bias", "skip", "mimo_x", "mimo_z", "mimo_o", "norm_weight")
    generator = torch.Generator().manual_seed(3)
    projected = torch.randn(2, 6, sum(projection.widths), generator=generator, dtype=torch.float64)
    dt_bias = torch.randn(2, generator=generator, dtype=torch.float64)
    found = {}
    for backend, dtype in (("reference", torch.float64), ("torch", torch.float32), ("triton", torch.float32)):
        weights = {name: inputs[name].to(dtype) for name in names if name in inputs}
        state = make_state(inputs).map(lambda tensor, dtype=dtype: tensor.to(dtype))
        places = [tensor.data_ptr() for _, tensor in state.tensors()]
        with seqmodels.backend(backend):
            out = [
                mamba3_step(
                    projected[:, t].to(dtype), state, projection, dt_bias=dt_bias.to(dtype), pairing=pairing, **weights
                )
                for t in range(6)
            ]
        assert places == [tensor.data_ptr() for _, tensor in state.tensors()]
        found[backend] = {"out": torch.stack(out), **dict(state.canonical().tensors())}
    for name, value in found["reference"].items():
        bound = 2 * _error(found["torch"][name], value) + 8 * torch.finfo(torch.float32).eps
        assert _error(found["triton"][name], value) <= bound, name
