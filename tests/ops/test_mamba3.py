"""Mamba-3's op against its definition, its limits, and its contract on state, documents and bad input."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from mamba3_inputs import cut, make_inputs, make_state, relative_error
from torch import Tensor

import seqmodels
from seqmodels import Layout
from seqmodels.ops.linear_attention import linear_attention
from seqmodels.ops.mamba3 import Mamba3State, Projection, mamba3, mamba3_step

FORMS = {
    "siso": dict(),
    "siso-half-norm": dict(pairing="half", norm=True, angles=4),
    "mimo": dict(ranks=3, pairing="half", groups=1),
    "mimo-adjacent-norm": dict(ranks=2, norm=True, d_state=7, angles=3, head_dim=5),
    "no-angles": dict(angles=0, d_state=3, groups=4),
}


def run(backend: str, inputs: dict[str, Tensor], **options) -> tuple[Tensor, Mamba3State]:
    with seqmodels.backend(backend):
        return mamba3(**inputs, **options)


def outputs(result: tuple[Tensor, Mamba3State]) -> dict[str, Tensor]:
    return {"out": result[0], **dict(result[1].canonical().tensors())}


def gradients(backend: str, inputs: dict[str, Tensor], state: Mamba3State | None, **options) -> dict[str, Tensor]:
    """Gradients of a random functional of all outputs, to all inputs and the state."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    carried = None if state is None else state.map(lambda tensor: tensor.detach().requires_grad_())
    result = outputs(run(backend, leaves, initial_state=carried, **options))
    generator = torch.Generator().manual_seed(7)
    loss = sum(
        (value * torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.dtype)).sum()
        for value in result.values()
    )
    if carried is not None:
        leaves |= {f"initial_{name}": tensor for name, tensor in carried.tensors()}
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def check_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        error = relative_error(actual[name], expected[name])
        assert error <= bound, f"{name}: relative error {error:.1e}, bound {bound:.1e}"


def split_options(form: str) -> tuple[dict, dict]:
    options = dict(FORMS[form])
    call = {"pairing": options.pop("pairing")} if "pairing" in options else {}
    return options, call


# ---- the chunked form is the recurrence


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("documents", [False, True])
def test_chunked_form_is_the_recurrence(form: str, documents: bool) -> None:
    sizes, call = split_options(form)
    inputs = make_inputs(**sizes)
    layout = Layout.packed([[5, 20, 1], [30]], 37, capacity=6) if documents else None
    state = make_state(inputs, 6 if documents else None)
    for start in (None, state):
        options = dict(initial_state=start, layout=layout, **call)
        check_equal(
            outputs(run("torch", inputs, chunk_size=8, **options)), outputs(run("reference", inputs, **options)), 1e-12
        )
    options = dict(layout=layout, **call)
    check_equal(
        gradients("torch", inputs, state, chunk_size=8, **options),
        gradients("reference", inputs, state, **options),
        1e-12,
    )


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 31])
@pytest.mark.parametrize("chunk_size", [1, 16, 64])
def test_any_length_and_chunk(length: int, chunk_size: int) -> None:
    inputs = make_inputs(length=length, ranks=2)
    check_equal(
        outputs(run("torch", inputs, chunk_size=chunk_size, initial_state=make_state(inputs))),
        outputs(run("reference", inputs, initial_state=make_state(inputs))),
        1e-12,
    )


def test_float32_error() -> None:
    """Specification: 5e-6 of the largest output, and for states 8 times what the float32 recurrence loses."""
    inputs = make_inputs(length=700, d_state=16, angles=4, dt_scale=0.2, dtype=torch.float32)
    exact = outputs(run("reference", {name: value.double() for name, value in inputs.items()}))
    own = outputs(run("reference", inputs))
    chunked = outputs(run("torch", inputs))
    assert relative_error(chunked["out"], exact["out"]) <= 5e-6
    for name in ("angle", "ssm", "k", "v"):
        bound = max(5e-6, 8 * relative_error(own[name], exact[name]))
        assert relative_error(chunked[name], exact[name]) <= bound, name


def test_bfloat16_error() -> None:
    inputs = make_inputs(length=200, ranks=2, norm=True, dt_scale=0.2, dtype=torch.float32)
    for name in ("x", "b", "c", "z"):
        inputs[name] = inputs[name].bfloat16()
    out, state = run("torch", inputs)
    exact, exact_state = run("reference", {name: value.double() for name, value in inputs.items()})
    assert out.dtype == torch.bfloat16
    assert relative_error(out, exact) <= 2e-2
    for (name, value), (_, expected) in zip(state.tensors(), exact_state.tensors(), strict=True):
        assert value.dtype == torch.float32
        assert relative_error(value, expected) <= 2e-2, name


def test_gradcheck_of_the_definition() -> None:
    inputs = make_inputs(batch_size=1, length=4, heads=2, head_dim=2, d_state=4, groups=1, ranks=2, angles=1, norm=True)
    state = make_state(inputs)
    names, fields = list(inputs), [name for name, _ in state.tensors()]
    leaves = [value.requires_grad_() for value in (*inputs.values(), *(tensor for _, tensor in state.tensors()))]

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        carried = Mamba3State(**dict(zip(fields, values[len(names) :], strict=True)))
        out, after = mamba3(**dict(zip(names, values[: len(names)], strict=True)), initial_state=carried)
        return (out, *(tensor for _, tensor in after.tensors()))

    with seqmodels.backend("reference"):
        assert torch.autograd.gradcheck(function, leaves)


# ---- limits in which the core op is the judge


def gate_and_skip(y: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    return (y + inputs["skip"][:, None] * inputs["x"]) * F.silu(inputs["z"])


def plain_keys(inputs: dict[str, Tensor], name: str) -> Tensor:
    """Normed and biased, not rotated: (B, L, H, N) of SISO inputs."""
    raw, heads = inputs[name][:, :, 0], inputs["x"].shape[2]
    normed = F.rms_norm(raw, raw.shape[-1:], inputs[f"{name}_weight"], 1e-5)
    return normed.repeat_interleave(heads // raw.shape[2], dim=2) + inputs[f"{name}_bias"][:, 0]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_euler_without_rotation_is_mamba2(backend: str) -> None:
    inputs = make_inputs()
    inputs["trapezoid"] = torch.ones_like(inputs["trapezoid"])
    inputs["rate"] = torch.zeros_like(inputs["rate"])
    dt, q, k = inputs["dt"], plain_keys(inputs, "c"), plain_keys(inputs, "b")
    y, final = linear_attention(q, k, inputs["x"], inputs["log_decay"], past_weight=dt, diagonal_weight=dt)
    out, state = run(backend, inputs)
    assert relative_error(out, gate_and_skip(y, inputs)) <= 1e-12
    assert relative_error(state.ssm.mT, final) <= 1e-12
    # Without help of the core op: the whole mask, section 3 of the Mamba-2 paper.
    total = inputs["log_decay"].cumsum(1).transpose(1, 2)
    mask = (total[..., :, None] - total[..., None, :]).exp().tril()
    scores = torch.einsum("bihn,bjhn->bhij", q, k) * mask
    y = torch.einsum("bhij,bjhp->bihp", scores, dt[..., None] * inputs["x"])
    assert relative_error(out, gate_and_skip(y, inputs)) <= 1e-12


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_decay_is_linear_attention(backend: str) -> None:
    """With a = 0 and dt = 1, the weights of a token add up to 1 from the next step on."""
    inputs = make_inputs()
    inputs["dt"] = torch.ones_like(inputs["dt"])
    inputs["log_decay"] = torch.zeros_like(inputs["dt"])
    inputs["rate"] = torch.zeros_like(inputs["rate"])
    inputs["trapezoid"] = torch.ones_like(inputs["dt"])
    y, _ = linear_attention(plain_keys(inputs, "c"), plain_keys(inputs, "b"), inputs["x"])
    assert relative_error(run(backend, inputs)[0], gate_and_skip(y, inputs)) <= 1e-12


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_rank_one_is_siso(backend: str) -> None:
    inputs = make_inputs(d_state=8, angles=4)
    ones = torch.ones(4, 1, 6, dtype=torch.float64)
    mixes = {"mimo_x": ones, "mimo_z": ones, "mimo_o": ones}
    siso = outputs(run(backend, inputs))
    check_equal(outputs(run(backend, {**inputs, **mixes})), siso, 1e-12)
    # The other pairing is a permutation of the state's lanes.
    lanes = torch.arange(8).view(4, 2).T.flatten()  # lane 2i to i, lane 2i + 1 to i + N / 2
    permuted = {**inputs, **mixes}
    for name in ("b", "c", "b_weight", "c_weight", "b_bias", "c_bias"):
        permuted[name] = inputs[name][..., lanes]
    half = outputs(run(backend, permuted, pairing="half"))
    siso["ssm"], siso["k"] = siso["ssm"][..., lanes], siso["k"][..., lanes]
    check_equal(half, siso, 1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equal_ranks_are_siso(backend: str) -> None:
    ranks, inputs = 3, make_inputs()
    copies = dict(inputs)
    for name in ("b", "c"):
        copies[name] = inputs[name].repeat(1, 1, ranks, 1, 1)
    for name in ("b_bias", "c_bias"):
        copies[name] = inputs[name].repeat(1, ranks, 1)
    mean = torch.full((4, ranks, 6), 1 / ranks, dtype=torch.float64)
    copies |= {"mimo_x": mean, "mimo_o": mean, "mimo_z": torch.ones_like(mean)}
    expected, _ = run(backend, {**inputs, "skip": inputs["skip"] / ranks})
    assert relative_error(run(backend, copies)[0], expected) <= 1e-12


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_parity_by_construction(backend: str) -> None:
    """A rotation by pi for each bit, and hardly any decay: the sign of the output is the parity of the bits."""
    length, lanes = 256, 2
    bits = torch.randint(0, 2, (1, length), generator=torch.Generator().manual_seed(0)).double()
    bits[:, 0] = 0
    token = torch.ones(1, length, 1, dtype=torch.float64)
    impulse = torch.zeros(1, length, 1, 1, dtype=torch.float64)
    impulse[:, 0] = 1
    zero = torch.zeros(1, length, 1, 1, lanes, dtype=torch.float64)
    unit = torch.tensor([1.0, 0.0], dtype=torch.float64)
    out, _ = run(
        backend,
        dict(
            x=impulse, b=zero, c=zero, z=torch.ones_like(impulse), dt=token, log_decay=-1e-4 * token, trapezoid=token,
            rate=math.pi * torch.tanh(20 * bits)[..., None], b_weight=unit, c_weight=unit,
            b_bias=unit.view(1, 1, 2), c_bias=unit.view(1, 1, 2), skip=torch.zeros(1, dtype=torch.float64),
        ),
    )  # fmt: skip
    parity = bits.cumsum(1) % 2
    assert torch.equal(out[0, :, 0, 0].sign(), 1 - 2 * parity[0])
    assert out.abs().min() > 0.5  # far from a coin's toss


# ---- phase


def test_phase_is_summed_without_loss() -> None:
    """64K tokens: the float32 phase is the float64 one, rounded once."""
    length = 1 << 16
    inputs = make_inputs(batch_size=1, length=length, heads=1, head_dim=1, d_state=2, groups=1, angles=1)
    inputs["dt"] = 0.1 * torch.ones_like(inputs["dt"])
    low = {name: value.float() for name, value in inputs.items()}
    _, state = run("torch", low)
    phase = (low["dt"].double() * low["rate"].double()).sum()
    distance = torch.remainder(state.angle.double().flatten() - phase + math.pi, 2 * math.pi) - math.pi
    assert distance.abs() <= math.pi * 2.0**-23
    layout = Layout.packed([[1000, length - 1000]], length)
    _, packed = run("torch", low, layout=layout)
    phase = (low["dt"].double() * low["rate"].double())[:, 1000:].sum()
    distance = torch.remainder(packed.angle[1].double().flatten() - phase + math.pi, 2 * math.pi) - math.pi
    assert distance.abs() <= math.pi * 2.0**-23


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_whole_turns_change_nothing(backend: str) -> None:
    inputs = make_inputs()
    state = make_state(inputs)
    turned = Mamba3State(state.angle + 2 * math.pi * 5, state.ssm, state.k, state.v)
    check_equal(
        outputs(run(backend, inputs, initial_state=turned)), outputs(run(backend, inputs, initial_state=state)), 1e-12
    )
    _, after = run(backend, inputs, initial_state=turned)
    assert after.angle.abs().max() <= math.pi


# ---- state, documents, causality


@pytest.mark.parametrize("ranks", [None, 2])
@pytest.mark.parametrize("at", [1, 7, 8, 9, 36])
def test_cut_anywhere(ranks: int | None, at: int) -> None:
    """The state at a cut is a decode state: no look-ahead of the next token is in it, at a chunk's edge neither."""
    inputs = make_inputs(ranks=ranks)
    state = make_state(inputs)
    out, final = run("torch", inputs, initial_state=state, chunk_size=8)
    head, between = run("torch", cut(inputs, 0, at), initial_state=state, chunk_size=8)
    tail, after = run("torch", cut(inputs, at, 37), initial_state=between, chunk_size=8)
    assert relative_error(torch.cat((head, tail), dim=1), out) <= 1e-12
    check_equal(dict(after.canonical().tensors()), dict(final.canonical().tensors()), 1e-12)
    _, recurrent = run("reference", cut(inputs, 0, at), initial_state=state)
    check_equal(dict(between.canonical().tensors()), dict(recurrent.canonical().tensors()), 1e-12)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_nothing_leaks_between_documents(backend: str) -> None:
    inputs = {name: value.requires_grad_() for name, value in make_inputs(ranks=2).items()}
    layout = Layout.packed([[8, 9, 1, 10], [7, 20]], 37)
    out, state = run(backend, inputs, layout=layout)
    second = out[0, 8:17].sum() + sum(tensor[1].sum() for _, tensor in state.tensors())
    per_token = ["x", "b", "c", "z", "dt", "log_decay", "trapezoid", "rate"]
    for name, gradient in zip(per_token, torch.autograd.grad(second, [inputs[n] for n in per_token]), strict=True):
        assert gradient[0, 8:17].abs().max() > 0, name
        gradient[0, 8:17] = 0
        assert gradient.abs().max() == 0, name
    assert out[:, 28:].abs()[0].max() == 0


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_padding_is_not_read(backend: str) -> None:
    inputs = make_inputs()
    layout = Layout.left_padded([30, 12], 37)
    clean = outputs(run(backend, inputs, layout=layout))
    poisoned = dict(inputs)
    for name in ("x", "b", "c", "z", "dt", "log_decay", "trapezoid", "rate"):
        poisoned[name] = inputs[name].clone()
        poisoned[name][~layout.valid] = math.nan
    check_equal(outputs(run(backend, poisoned, layout=layout)), clean, 0.0)
    for name, gradient in gradients(backend, poisoned, None, layout=layout).items():
        assert gradient.isfinite().all(), name


def test_unused_slots_keep_their_state() -> None:
    inputs = make_inputs()
    layout = Layout.packed([[5], [30]], 37, capacity=4)
    state = make_state(inputs, 4)
    for backend in ("reference", "torch"):
        _, after = run(backend, inputs, layout=layout, initial_state=state)
        for (name, tensor), (_, before) in zip(after.tensors(), state.tensors(), strict=True):
            assert torch.equal(tensor[2:], before[2:]), name


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_saturated_gates_stay_finite(backend: str) -> None:
    projection = Projection(2, 4, 4, 1, 1, 1, "heavy_tail", 1e-4, "data_dependent", True)
    generator = torch.Generator().manual_seed(0)
    for activation in ("heavy_tail", "softplus"):
        for raw_a in (1e4, -1e4):
            for raw_trapezoid in (30.0, -30.0):
                for raw_dt in (10.0, math.log(math.expm1(1e-4))):
                    width = sum(projection.widths)
                    projected = torch.randn(1, 40, width, generator=generator)
                    projected[..., -7:-5], projected[..., -5:-3], projected[..., -3:-1] = raw_dt, raw_a, raw_trapezoid
                    projected.requires_grad_()
                    token = projection._replace(a_activation=activation).unpack(projected, torch.zeros(2))
                    inputs = make_inputs(batch_size=1, length=40, heads=2, head_dim=4, d_state=4, groups=1, angles=1)
                    weights = {
                        name: inputs[name].float() for name in ("b_weight", "c_weight", "b_bias", "c_bias", "skip")
                    }
                    with seqmodels.backend(backend):
                        out, state = mamba3(*token[:8], **weights)
                    assert out.isfinite().all()
                    (gradient,) = torch.autograd.grad(out.sum() + state.ssm.sum(), projected)
                    assert gradient.isfinite().all()


# ---- decode


def step_arguments(
    ranks: int | None, rotation: str = "data_dependent", trapezoid: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[Projection, dict[str, Tensor]]:
    R = 1 if ranks is None else ranks
    projection = Projection(4, 6, 8, 2, R, 2 if rotation != "none" else 0, "heavy_tail", 1e-4, rotation, trapezoid)
    inputs = make_inputs(ranks=ranks, norm=ranks is not None, dtype=dtype)
    names = ("b_weight", "c_weight", "b_bias", "c_bias", "skip", "mimo_x", "mimo_z", "mimo_o", "norm_weight")
    return projection, {name: inputs[name] for name in names if name in inputs}


def zero_state(projection: Projection, batch_size: int, dtype: torch.dtype = torch.float64) -> Mamba3State:
    p = projection
    return Mamba3State(
        torch.zeros(batch_size, p.num_heads, p.angles, dtype=dtype),
        torch.zeros(batch_size, p.num_heads, p.head_dim, p.d_state, dtype=dtype),
        torch.zeros(batch_size, p.ranks, p.num_heads, p.d_state, dtype=dtype),
        torch.zeros(batch_size, p.num_heads, p.head_dim, dtype=dtype),
    )


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("ranks", [None, 3])
@pytest.mark.parametrize(
    ("rotation", "trapezoid"), [("data_dependent", True), ("fixed", True), ("none", True), ("data_dependent", False)]
)
def test_steps_are_the_recurrence(backend: str, ranks: int | None, rotation: str, trapezoid: bool) -> None:
    projection, weights = step_arguments(ranks, rotation, trapezoid)
    generator = torch.Generator().manual_seed(3)
    projected = torch.randn(2, 20, sum(projection.widths), generator=generator, dtype=torch.float64)
    dt_bias = torch.randn(4, generator=generator, dtype=torch.float64)
    token = projection.unpack(projected, dt_bias)
    out, final = run("reference", {**token._asdict(), **weights}, pairing="half")
    state = zero_state(projection, 2)
    with seqmodels.backend(backend):
        steps = [
            mamba3_step(projected[:, t], state, projection, dt_bias=dt_bias, pairing="half", **weights)
            for t in range(20)
        ]
    assert relative_error(torch.stack(steps, dim=1), out.flatten(2)) <= 1e-12
    check_equal(dict(state.canonical().tensors()), dict(final.canonical().tensors()), 1e-12)


def test_no_drift_in_ten_thousand_steps() -> None:
    """The float32 state against a float64 recurrence with the same phases as the step's, to the unit roundings.

    Each step rounds the phase once (at most pi 2^-24), at random: after n steps the standard deviation is
    pi 2^-24 sqrt(n / 3). Eight of these bound the phase, and through it keys, state and output.
    """
    steps = 10_000
    projection, weights = step_arguments(2, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    projected = torch.randn(1, steps, sum(projection.widths), generator=generator)
    dt_bias = torch.full((4,), -2.0)
    exact_weights = {name: value.double() for name, value in weights.items()}
    token = projection.unpack(projected.double(), dt_bias.double())
    out, final = run("torch", {**token._asdict(), **exact_weights})  # equal to the recurrence to 1e-12 (above)
    state = zero_state(projection, 1, torch.float32)
    for t in range(steps):
        last = mamba3_step(projected[:, t], state, projection, dt_bias=dt_bias, **weights)
    bound = 8 * math.pi * 2.0**-24 * math.sqrt(steps / 3)
    turn = state.angle.double() - final.angle
    assert (torch.remainder(turn + math.pi, 2 * math.pi) - math.pi).abs().max() <= bound
    assert relative_error(state.ssm, final.ssm) <= bound
    assert relative_error(last, out[:, -1].flatten(1)) <= bound


# ---- registration and bad input


@pytest.mark.parametrize("ranks", [None, 2])
def test_opcheck(ranks: int | None) -> None:
    inputs = make_inputs(length=9, ranks=ranks, dtype=torch.float32)
    layout = Layout.packed([[4, 3], [9]], 9)
    order = ["x", "b", "c", "z", "dt", "log_decay", "trapezoid", "dt", "rate", "b_weight", "c_weight", "b_bias"]
    order += ["c_bias", "skip", "mimo_x", "mimo_z", "mimo_o", "norm_weight"]
    values = [inputs.get(name) for name in order]
    values = [None if value is None else value.clone().requires_grad_() for value in values]
    state = [tensor for _, tensor in make_state(inputs, 3).tensors()]
    torch.library.opcheck(
        torch.ops.seqmodels.mamba3.default,
        (*values, *state, layout.starts, layout.lengths, "adjacent", 1e-5, 4, "torch"),
    )


def test_autocast_rounds_products_only() -> None:
    inputs = make_inputs(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, state = run("torch", inputs)
    assert out.dtype == torch.bfloat16
    assert {tensor.dtype for _, tensor in state.tensors()} == {torch.float32}
    low = {name: value.bfloat16() if name in ("x", "b", "c", "z") else value for name, value in inputs.items()}
    check_equal(outputs(run("torch", low)), outputs((out, state)), 0.0)


BAD = {
    "groups": (lambda i: {**i, **{name: i[name].repeat(1, 1, 1, 2, 1)[..., :3, :] for name in ("b", "c")}},
               "3 groups do not divide the 4 heads"),
    "angles": (lambda i: {**i, "rate": i["rate"].repeat(1, 1, 3)}, "at most 4"),
    "bias": (lambda i: {**i, "b_bias": i["b_bias"].transpose(0, 1)}, "b_bias has shape .* expected"),
    "mimo part": (lambda i: {**i, "mimo_x": torch.ones(4, 1, 6, dtype=torch.float64)}, "come together"),
    "ranks": (lambda i: {**i, "b": i["b"].repeat(1, 1, 2, 1, 1), "c": i["c"].repeat(1, 1, 2, 1, 1)}, "MIMO needs"),
    "z": (lambda i: {**i, "z": i["z"][:, :5]}, "do not fit together"),
    "length": (lambda i: cut(i, 0, 0), "at least one token"),
    "pairing": (lambda i: {**i, "pairing": "interleaved"}, "'interleaved'; expected one of 'adjacent', 'half'"),
    "chunk": (lambda i: {**i, "chunk_size": 0}, "chunk_size is 0"),
    "layout": (lambda i: {**i, "layout": Layout.full(2, 36)}, r"grid of \(2, 36\)"),
    "state batch": (lambda i: {**i, "initial_state": make_state(i, 3)}, r"'angle' is \(3, 4, 2\)"),
    "state dtype": (lambda i: {**i, "initial_state": make_state(i).to(dtype=torch.float32)}, "torch.float32; expected"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        mamba3(**change(make_inputs()))


def test_mixed_dtypes() -> None:
    inputs = make_inputs()
    with pytest.raises(TypeError, match="one floating-point dtype"):
        mamba3(**{**inputs, "z": inputs["z"].float()})


def test_step_refuses_another_state() -> None:
    projection, weights = step_arguments(None)
    projected, dt_bias = torch.randn(2, sum(projection.widths), dtype=torch.float64), torch.zeros(4)
    with pytest.raises(ValueError, match=r"'angle' is \(3, 4, 2\) .* expected \(2, 4, 2\) torch\.float64"):
        mamba3_step(projected, zero_state(projection, 3), projection, dt_bias=dt_bias, **weights)
    with pytest.raises(ValueError, match="projected has shape"):
        mamba3_step(projected[:, 1:], zero_state(projection, 2), projection, dt_bias=dt_bias, **weights)
    # Sizes whose products agree: head_dim 6 and d_state 8 the other way round.
    whole = zero_state(projection, 2)
    swapped = Mamba3State(whole.angle, torch.zeros(2, 4, 8, 6, dtype=torch.float64), whole.k, whole.v)
    with pytest.raises(ValueError, match=r"'ssm' is \(2, 4, 8, 6\) .* expected \(2, 4, 6, 8\)"):
        mamba3_step(projected, swapped, projection, dt_bias=dt_bias, **weights)
    with pytest.raises(TypeError, match="state is tuple; expected Mamba3State"):
        mamba3_step(projected, tuple(torch.zeros(2) for _ in range(4)), projection, dt_bias=dt_bias, **weights)  # type: ignore[arg-type]
