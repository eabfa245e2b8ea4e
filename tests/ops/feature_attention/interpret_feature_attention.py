"""The Triton kernels of feature attention under the interpreter, in float32, against the definition."""

from __future__ import annotations

import pytest
import torch

import seqmodels
from seqmodels import Layout
from seqmodels.ops.feature_attention import (
    FeatureState,
    feature_attention,
    feature_attention_step,
    feature_state,
    feature_width,
    triton_problem,
)
from seqmodels.ops.kernels import KernelSpec

EPS = torch.finfo(torch.float32).eps
CASES = {
    "taylor": dict(feature_map="taylor", depth=16),
    "taylor narrow": dict(feature_map="taylor", depth=5, length=37),
    "taylor learned": dict(feature_map="taylor", depth=20, width=8, decay=True),
    "taylor decay": dict(feature_map="taylor", depth=16, decay=True),
    "exp": dict(feature_map="hedgehog_exp", width=12),
    "exp plain": dict(feature_map="hedgehog_exp", depth=16),
    "split": dict(feature_map="hedgehog_split", width=12),
    "split decay": dict(feature_map="hedgehog_split", width=12, decay=True, heads=2, batch=2),
    "joint": dict(feature_map="hedgehog_joint", width=12),
    "joint sums": dict(feature_map="hedgehog_joint", width=12, decay=True, normalize=False),
    "elu": dict(feature_map="elu", depth=20, decay=True),
    "t2r": dict(feature_map="t2r", width=16),
    "identity": dict(feature_map="identity", depth=16, normalize=False, decay=True),
    "groups": dict(feature_map="hedgehog_split", width=12, query_groups=2, key_groups=1, heads=4, batch=1),
    "wide values": dict(feature_map="hedgehog_joint", width=12, value_dim=40, decay=True),
    "wide taylor values": dict(feature_map="taylor", depth=16, value_dim=40),
    "one token": dict(feature_map="taylor", depth=16, length=1),
    "segments": dict(feature_map="taylor", depth=16, length=90, decay=True),
    "exp segments": dict(feature_map="hedgehog_exp", width=12, length=90),
    "documents": dict(feature_map="hedgehog_split", width=12, packed=[[1, 65, 3], [64, 40]], length=110, decay=True),
    "exp documents": dict(feature_map="hedgehog_exp", width=12, packed=[[1, 65, 3], [64, 40]], length=110),
    "taylor long documents": dict(feature_map="taylor", depth=16, packed=[[66, 1, 23]], length=92),
    "exp long documents": dict(feature_map="hedgehog_exp", width=12, packed=[[66, 1, 23]], length=92),
}


def _inputs(
    feature_map, *, depth=16, width=None, length=45, batch=1, heads=1, query_groups=None, key_groups=None, value_dim=24,
    normalize=True, decay=False, packed=None,
):  # fmt: skip
    """Tensors in float64 whose values are exact in float32, a layout, and the op's options."""
    generator = torch.Generator().manual_seed(length + depth)

    def draw(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).double()

    batch = len(packed) if packed else batch
    layout = Layout.packed(packed, length, capacity=6) if packed else None
    documents = layout.num_documents if layout else batch
    f = depth if width is None else width
    size = (documents, heads, feature_width(feature_map, f))
    tensors = {
        "q": draw(batch, length, query_groups or heads, depth),
        "k": draw(batch, length, key_groups or heads, depth),
        # v is a part of a wider projection, as layers pass it.
        "v": draw(batch, length, heads, 3 * value_dim)[..., value_dim : 2 * value_dim],
        "query_weight": None if width is None else draw(heads, depth, f, scale=depth**-0.5),
        "key_weight": None if width is None else draw(heads, depth, f, scale=depth**-0.5),
        "log_decay": -draw(batch, length, heads).abs() * 0.1 if decay else None,
        "matrix": 0.3 * draw(*size, value_dim + normalize),
    }
    if normalize:  # a state that sums of positive weights leave behind
        ones = tensors["matrix"][..., -1:].abs() + 0.5
        if feature_map == "taylor":  # phi . z stays positive with the weight on the constant feature
            ones = ones * 0.1
            ones[:, :, 0] += 5
        tensors["matrix"] = torch.cat([tensors["matrix"][..., :-1], ones], -1)
    scale = draw(*size) if feature_map == "hedgehog_exp" else None
    return tensors, scale, layout, {"feature_map": feature_map, "normalize": normalize}


def _run(case, dtype, backend, *, state_only=False):
    tensors, scale, layout, options = _inputs(**case)
    left_out = ("q", "query_weight") if state_only else ()
    leaves = {
        name: tensor.to(dtype).requires_grad_()
        for name, tensor in tensors.items()
        if tensor is not None and name not in left_out
    }
    given = dict(leaves)
    state = FeatureState(given.pop("matrix"), None if scale is None else scale.to(dtype))
    with seqmodels.backend(backend):
        if state_only:
            found = feature_state(**given, initial_state=state, layout=layout, **options)
            outputs = {"state": found.matrix}
        else:
            y, found = feature_attention(**given, initial_state=state, layout=layout, **options)
            outputs = {"y": y, "state": found.matrix}
        generator = torch.Generator().manual_seed(7)
        grads = [torch.randn(x.shape, generator=generator).to(dtype) for x in outputs.values()]
        gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), grads)
    result = {name: x.detach() for name, x in outputs.items()} | dict(zip(leaves, gradients, strict=True))
    if found.log_scale is not None:
        result["log_scale"] = found.log_scale
    return result


def _error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm().clamp_min(1e-300))


def _conditioning(case, wanted):
    """How much larger the terms of log_decay's gradient are than the gradient itself.

    The kernel sums phi(q) . dphi(q) - phi(k) . dphi(k) from each token to the end. Such a product is at most a
    gradient of q (k) times q (k) for maps of degree one, twice that for Taylor; independent roundings add in squares.
    """
    tensors, *_ = _inputs(**case)
    names = [name for name in ("q", "k", "v") if name in wanted]
    terms = sum((wanted[x].flatten(2).norm(dim=-1) * tensors[x].flatten(2).norm(dim=-1)) ** 2 for x in names)
    suffix = terms.flip(1).cumsum(1).flip(1).sqrt()
    return float(suffix.norm() / wanted["log_decay"].norm())


def _check(case, *, state_only=False):
    wanted = _run(case, torch.float64, "reference", state_only=state_only)
    plain = _run(case, torch.float32, "torch", state_only=state_only)
    found = _run(case, torch.float32, "triton", state_only=state_only)
    # hedgehog_exp's plain form runs in float64 inside, so its own error says nothing: the rounding of exponents
    # does. |u| stays below 6 here, and e^u is known to |u| roundings.
    floor = (16 if case["feature_map"] == "hedgehog_exp" else 4) * EPS
    if case.get("decay"):
        # A decay is e to the difference of two sums inside a tile of 64 tokens, each rounded relative to itself.
        sums = _inputs(**case)[0]["log_decay"].abs().unfold(1, min(64, case.get("length", 45)), 1).sum(-1)
        floor += EPS * float(sums.max())
    for name, value in wanted.items():
        bound = 2 * _error(plain[name], value) + floor
        if name == "log_decay":
            bound += floor * _conditioning(case, wanted)
        assert _error(found[name], value) <= bound, f"{name}: {_error(found[name], value):.2e} exceeds {bound:.2e}"


# The interpreter runs every declaration in float32; each ships its own tiles and way to load.
TILES = {
    "middle": triton_problem.tile_of(64, 32, 4, 1, tma=False),
    "small": triton_problem.SMALL,
    "tma": None,  # the tiles of the GPUs that have it
}
RUNS = [("middle", case) for case in CASES]
RUNS += [("small", "joint"), ("tma", "taylor narrow"), ("tma", "exp documents"), ("tma", "groups")]


@pytest.fixture
def short_segments(monkeypatch):
    """Rows are cut after 64 tokens; 256 would take the interpreter minutes."""
    cut = property(lambda problem: (-(-problem.shape[1] // triton_problem.CHUNK), triton_problem.CHUNK))
    monkeypatch.setattr(triton_problem.Problem, "segments", cut)


def _use(tile, monkeypatch):
    if tile != "tma":
        monkeypatch.setattr(KernelSpec, "tile", lambda self, device, variant, dtype: TILES[tile])


@pytest.mark.parametrize(("tile", "case"), [run for run in RUNS if "segments" not in run[1] and "long" not in run[1]])
def test_against_definition(tile, case, monkeypatch):
    _use(tile, monkeypatch)
    _check(CASES[case])


@pytest.mark.parametrize("case", [case for case in CASES if "segments" in case or "long" in case])
@pytest.mark.usefixtures("short_segments")
def test_segments_against_definition(case, monkeypatch):
    _use("middle", monkeypatch)
    _check(CASES[case])


@pytest.mark.parametrize("case", ["exp", "split decay", "segments", "exp segments"])
@pytest.mark.usefixtures("short_segments")
def test_state_without_queries(case, monkeypatch):
    _use("middle", monkeypatch)
    _check(CASES[case], state_only=True)


def test_one_long_row_fills_the_machine():
    """Two programs a multiprocessor of an H100, which the interpreter stands for, whatever the batch."""
    v = torch.empty(1, 32768, 2, 64)
    problem = triton_problem.Problem.of(v, v, None, None, None, None, "hedgehog_exp", True, 0.0)
    count, length = problem.segments
    assert 128 <= 4 * count <= 264
    assert length % triton_problem.CHUNK == 0
    assert count * length >= 32768


STEPS = ["taylor narrow", "taylor learned", "taylor decay", "exp", "exp plain", "split", "joint sums", "elu", "t2r",
         "identity", "groups", "wide values"]  # fmt: skip


@pytest.mark.parametrize("case", STEPS)
def test_step_against_definition(case):
    found = {}
    for backend, dtype in (("reference", torch.float64), ("torch", torch.float32), ("triton", torch.float32)):
        tensors, scale, _, options = _inputs(**CASES[case] | {"batch": 3, "length": 2})
        args = {name: None if x is None else x.to(dtype).contiguous() for name, x in tensors.items()}
        state = FeatureState(args.pop("matrix"), None if scale is None else scale.to(dtype))
        maps = {name: args.pop(name) for name in ("query_weight", "key_weight")}
        outputs = []
        with seqmodels.backend(backend):
            for t in range(2):
                token = {name: None if x is None else x[:, t] for name, x in args.items()}
                outputs.append(feature_attention_step(**token, **maps, state=state, **options))
        found[backend] = {"y": torch.stack(outputs), "state": state.matrix}
        if scale is not None:
            found[backend]["scale"] = state.log_scale
    floor = (16 if case.startswith("exp") else 4) * EPS  # as in _check
    for name, value in found["reference"].items():
        bound = 2 * _error(found["torch"][name], value) + floor
        assert _error(found["triton"][name], value) <= bound, name


def test_two_runs_are_bitwise_equal():
    first, second = (_run(CASES["exp"], torch.float32, "triton") for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name
