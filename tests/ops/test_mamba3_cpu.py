"""The C++ kernels of Mamba-3 against the float64 definition, on every instruction set this machine has.

Bound (the specification's): twice the error of the float32 PyTorch form on the same input, or 5e-6
where that is larger.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from mamba3_inputs import cut, make_inputs, make_state, relative_error
from torch import Tensor

import seqmodels
from seqmodels import Layout
from seqmodels.backends import BackendUnavailable, missing
from seqmodels.ops.extension import capability, capability_name
from seqmodels.ops.mamba3 import Mamba3State, Projection, mamba3, mamba3_step
from seqmodels.testing import poisoned

FLOAT32_BOUND = 5e-6
pytestmark = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))
BEST = None if missing("cpu") else capability_name()
LEVELS = ["default", "avx2", "avx512"][: 1 + ["default", "avx2", "avx512"].index(BEST)] if BEST else []

CASES = {
    "siso": dict(),
    "siso-half-norm": dict(pairing="half", norm=True, angles=4),
    "mimo": dict(ranks=3, pairing="half", groups=1),
    "mimo-adjacent-norm": dict(ranks=2, norm=True, d_state=7, angles=3, head_dim=5),
    "mimo-wide": dict(ranks=4, d_state=33, angles=16, head_dim=17, length=70),
    "no-angles": dict(angles=0, d_state=3, groups=4),
    "segments": dict(d_state=24, angles=6, head_dim=20, length=523, dt_scale=0.2, batch_size=1),
}


@functools.cache
def reference(case: str, documents: bool) -> tuple[dict, dict, dict[str, Tensor], dict[str, float]]:
    """Inputs, call options, float64 results with gradients, and the bound for each."""
    sizes = dict(CASES[case])
    pairing = sizes.pop("pairing", "adjacent")
    inputs = make_inputs(**sizes, dtype=torch.float32)
    length, batch_size = inputs["x"].shape[1], inputs["x"].shape[0]
    layout = None
    if documents:
        rows = [[5, length - 7, 1], [length - 7]][:batch_size]
        layout = Layout.packed(rows, length, capacity=6)
    state = make_state(inputs, 6 if documents else None)
    options = dict(layout=layout, pairing=pairing)
    exact = run("reference", {k: v.double() for k, v in inputs.items()}, state.to(dtype=torch.float64), options)
    chunked = run("torch", inputs, state, options)
    bounds = {name: max(FLOAT32_BOUND, 2 * relative_error(chunked[name], exact[name])) for name in exact}
    return inputs, {"state": state, "options": options}, exact, bounds


def run(backend: str, inputs: dict[str, Tensor], state: Mamba3State, options: dict) -> dict[str, Tensor]:
    """Outputs, final state, and the gradients of a random functional of them to everything."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    carried = state.map(lambda tensor: tensor.detach().requires_grad_())
    with seqmodels.backend(backend):
        out, after = mamba3(**leaves, initial_state=carried, **options)
    results = {"out": out, **dict(after.canonical().tensors())}
    generator = torch.Generator().manual_seed(7)
    loss = sum(
        (value * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)).sum()
        for value in results.values()
    )
    leaves |= {f"initial_{name}": tensor for name, tensor in carried.tensors()}
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {name: value.detach() for name, value in results.items()} | {
        f"grad_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)
    }


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_forward_and_backward(case: str, documents: bool, level: str) -> None:
    inputs, call, exact, bounds = reference(case, documents)
    with capability(level):
        found = run("cpu", inputs, call["state"], call["options"])
    for name, expected in exact.items():
        error = relative_error(found[name], expected)
        assert error <= bounds[name], f"{name}: relative error {error:.1e}, bound {bounds[name]:.1e}"


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 127, 255, 256, 257])
@pytest.mark.parametrize("ranks", [None, 5])
def test_lengths_around_chunks_and_segments(length: int, ranks: int | None) -> None:
    inputs = make_inputs(batch_size=1, length=length, heads=2, head_dim=3, d_state=5, groups=1, angles=1, ranks=ranks,
                         dt_scale=0.3, dtype=torch.float32)  # fmt: skip
    state = make_state(inputs)
    exact = run("reference", {k: v.double() for k, v in inputs.items()}, state.to(dtype=torch.float64), {})
    chunked, found = run("torch", inputs, state, {}), run("cpu", inputs, state, {})
    for name, expected in exact.items():
        bound = max(FLOAT32_BOUND, 2 * relative_error(chunked[name], expected))
        assert relative_error(found[name], expected) <= bound, name


def test_most_ranks() -> None:
    inputs = make_inputs(length=3, ranks=64, heads=2, groups=1, dtype=torch.float32)
    exact, _ = mamba3(**{name: value.double() for name, value in inputs.items()})
    with seqmodels.backend("cpu"):
        assert relative_error(mamba3(**inputs)[0], exact) <= 5e-6
        with pytest.raises(BackendUnavailable, match="at most 64 ranks"):
            mamba3(**make_inputs(length=1, ranks=65, dtype=torch.float32))


def test_bfloat16() -> None:
    """Rounded inputs, float32 inside: no worse than the PyTorch form, which rounds keys and queries too."""
    inputs = make_inputs(length=200, ranks=2, norm=True, dt_scale=0.2, dtype=torch.float32)
    for name in ("x", "b", "c", "z"):
        inputs[name] = inputs[name].bfloat16()
    state = make_state(inputs)
    exact = run("reference", {k: v.double() for k, v in inputs.items()}, state.to(dtype=torch.float64), {})
    chunked, found = run("torch", inputs, state, {}), run("cpu", inputs, state, {})
    for name, expected in exact.items():
        assert found[name].dtype == chunked[name].dtype, name
        bound = max(2.0**-8, relative_error(chunked[name], expected))  # one rounding to bfloat16
        assert relative_error(found[name], expected) <= bound, name


def test_bits_do_not_depend_on_threads() -> None:
    inputs, call, _, _ = reference("mimo-wide", True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = run("cpu", inputs, call["state"], call["options"])
        torch.set_num_threads(3)
        three = run("cpu", inputs, call["state"], call["options"])
    finally:
        torch.set_num_threads(threads)
    for name in one:
        assert torch.equal(one[name], three[name]), name


def test_slices_of_a_projection_are_not_copied() -> None:
    """The layer's x, b, c, z are slices: tokens are apart, and the kernels read them where they are."""
    from seqmodels.ops.mamba3.cpu import _dense_tokens

    projection, _ = step_arguments(2)
    projected = torch.randn(2, 9, sum(projection.widths))
    token = projection.unpack(projected, torch.zeros(4))
    for tensor in token[:4]:
        assert _dense_tokens(tensor) is tensor
    assert _dense_tokens(token.x.transpose(2, 3)).is_contiguous()
    assert _dense_tokens(token.x[:, ::2].transpose(0, 1)).is_contiguous()
    weights = {name: value for name, value in make_inputs(ranks=2, dtype=torch.float32).items() if name in WEIGHTS}
    with seqmodels.backend("cpu"):
        sliced = mamba3(*token[:8], **weights)
        copied = mamba3(*(tensor.contiguous() for tensor in token[:8]), **weights)
    assert torch.equal(sliced[0], copied[0])


def test_phase_is_summed_without_loss() -> None:
    """64K tokens, whole and behind another document: the float32 phase is the float64 one, rounded once."""
    length, first = 1 << 16, 1000
    inputs = make_inputs(batch_size=1, length=length, heads=1, head_dim=1, d_state=2, groups=1, angles=1,
                         dt_scale=0.2, dtype=torch.float32)  # fmt: skip
    increments = (inputs["dt"].double() * inputs["rate"].double()).flatten()
    with seqmodels.backend("cpu"):
        _, whole = mamba3(**inputs)
        _, packed = mamba3(**inputs, layout=Layout.packed([[first, length - first]], length))
    for angle, phase in ((whole.angle[0], increments.sum()), (packed.angle[1], increments[first:].sum())):
        distance = torch.remainder(angle.double() - phase + torch.pi, 2 * torch.pi) - torch.pi
        assert distance.abs().max() <= torch.pi * 2.0**-23


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("head_dim", "d_state", "angles", "ranks"), [(1, 1, 0, None), (63, 33, 16, None), (65, 17, 8, 3), (7, 5, 2, 4)]
)
def test_every_element_is_written(
    head_dim: int, d_state: int, angles: int, ranks: int | None, dtype: torch.dtype, level: str
) -> None:
    """Fresh memory holds NaN, and heads are no whole number of vectors: none of it may reach a result."""
    for length in (1, 2, 65):
        sizes = dict(length=length, heads=3, groups=3, head_dim=head_dim, d_state=d_state, angles=angles)
        inputs = make_inputs(**sizes, ranks=ranks, norm=True, dtype=torch.float32)
        for name in ("x", "b", "c", "z"):
            inputs[name] = inputs[name].to(dtype)
        layout = Layout.packed([[1] * min(length, 3), [length]], length, capacity=6)
        for options in (dict(layout=None), dict(layout=layout, pairing="half")):
            state = make_state(inputs, 2 if options["layout"] is None else 6)
            with poisoned(), capability(level):
                found = run("cpu", inputs, state, options)
            for name, value in found.items():
                assert value.isfinite().all(), (name, length)


def test_float64_is_refused_by_name() -> None:
    with (
        seqmodels.backend("cpu"),
        pytest.raises(BackendUnavailable, match=r"float32 and bfloat16; x is torch\.float64"),
    ):
        mamba3(**make_inputs())


# ---- decode

WEIGHTS = ("b_weight", "c_weight", "b_bias", "c_bias", "skip", "mimo_x", "mimo_z", "mimo_o", "norm_weight")


def step_arguments(ranks: int | None, **sizes: int) -> tuple[Projection, dict[str, Tensor]]:
    inputs = make_inputs(ranks=ranks, norm=ranks == 3, dtype=torch.float32, length=1, **sizes)
    R, heads, head_dim = 1 if ranks is None else ranks, inputs["x"].shape[2], inputs["x"].shape[3]
    projection = Projection(heads, head_dim, inputs["b"].shape[-1], inputs["b"].shape[3], R, inputs["rate"].shape[-1],
                            "heavy_tail", 1e-4, "data_dependent", True)  # fmt: skip
    return projection, {name: inputs[name] for name in WEIGHTS if name in inputs}


def steps(backend: str, projected: Tensor, state: Mamba3State, call: Callable[..., Tensor]) -> Tensor:
    with seqmodels.backend(backend):
        return torch.stack([call(projected[:, t], state) for t in range(projected.shape[1])], dim=1)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("ranks", "sizes"),
    [(None, {}), (1, {}), (2, dict(groups=1)), (3, dict(head_dim=5)), (4, dict(d_state=33, angles=16)),
     (None, dict(head_dim=17, d_state=130, angles=65, heads=2)), (None, dict(angles=0, d_state=3))],
)  # fmt: skip
@pytest.mark.parametrize("pairing", ["adjacent", "half"])
def test_steps(ranks: int | None, sizes: dict, pairing: str, level: str) -> None:
    projection, weights = step_arguments(ranks, **sizes)
    projection = projection._replace(a_activation="softplus" if pairing == "half" else "heavy_tail")
    generator = torch.Generator().manual_seed(5)
    projected = torch.randn(3, 12, sum(projection.widths), generator=generator)
    dt_bias = torch.randn(projection.num_heads, generator=generator) - 1
    inputs = make_inputs(ranks=ranks, batch_size=3, length=1, **sizes, dtype=torch.float32)
    start = make_state(inputs)
    options = dict(pairing=pairing, dt_bias=dt_bias)
    wide = {name: value.double() for name, value in weights.items()}
    exact_state = start.to(dtype=torch.float64)
    exact_options = dict(pairing=pairing, dt_bias=dt_bias.double())
    exact = steps(
        "reference",
        projected.double(),
        exact_state,
        lambda p, s: mamba3_step(p, s, projection, **wide, **exact_options),
    )

    def call(token: Tensor, state: Mamba3State) -> Tensor:
        return mamba3_step(token, state, projection, **weights, **options)

    plain_state, state = start.clone(), start.clone()
    plain = steps("torch", projected, plain_state, call)
    pointers = [tensor.data_ptr() for _, tensor in state.tensors()]
    with capability(level):
        found = steps("cpu", projected, state, call)
    assert pointers == [tensor.data_ptr() for _, tensor in state.tensors()]
    pairs = [(found, plain, exact)]
    for (_, a), (_, b), (_, c) in zip(
        state.canonical().tensors(), plain_state.canonical().tensors(), exact_state.canonical().tensors(), strict=True
    ):
        pairs.append((a, b, c))
    for actual, rounded, expected in pairs:
        assert relative_error(actual, expected) <= max(FLOAT32_BOUND, 2 * relative_error(rounded, expected))


def test_prefill_then_steps() -> None:
    projection, weights = step_arguments(2)
    projected = torch.randn(2, 80, sum(projection.widths))
    token = projection.unpack(projected, torch.zeros(4))
    inputs = {**token._asdict(), **weights}
    with seqmodels.backend("cpu"):
        whole, final = mamba3(**inputs)
        _, state = mamba3(**cut(inputs, 0, 65))
    tail = steps(
        "cpu", projected[:, 65:], state, lambda p, s: mamba3_step(p, s, projection, **weights, dt_bias=torch.zeros(4))
    )
    assert relative_error(tail, whole[:, 65:].flatten(2)) <= 5e-6
    for (name, a), (_, b) in zip(state.canonical().tensors(), final.canonical().tensors(), strict=True):
        assert relative_error(a, b) <= 5e-6, name


def test_step_in_bfloat16() -> None:
    projection, weights = step_arguments(None)
    projected = torch.randn(2, 30, sum(projection.widths)).bfloat16()
    state = make_state(make_inputs(dtype=torch.float32))
    exact = state.to(dtype=torch.float64)
    wide = {name: value.double() for name, value in weights.items()}
    call = lambda p, s: mamba3_step(p, s, projection, **weights, dt_bias=torch.zeros(4))  # noqa: E731
    found = steps("cpu", projected, state, call)
    expected = steps("reference", projected.double(), exact,
                     lambda p, s: mamba3_step(p, s, projection, **wide, dt_bias=torch.zeros(4).double()))  # fmt: skip
    assert found.dtype == torch.bfloat16
    assert relative_error(found, expected) <= 2.0**-8
    assert relative_error(state.ssm, exact.ssm) <= 5e-6


def test_ablations_take_another_backend() -> None:
    projection, weights = step_arguments(None)
    projection = projection._replace(rotation="fixed")
    projected = torch.randn(2, sum(projection.widths))
    state = make_state(make_inputs(dtype=torch.float32))
    with seqmodels.backend("cpu"), pytest.raises(BackendUnavailable, match="rotation='fixed'"):
        mamba3_step(projected, state, projection, **weights, dt_bias=torch.zeros(4))
    mamba3_step(projected, state, projection, **weights, dt_bias=torch.zeros(4))
