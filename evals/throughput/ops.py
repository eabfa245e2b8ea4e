"""Problems of single ops: inputs, this library's backends, rivals, the float64 definition, the least work."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import seqmodels
from evals.throughput import feature_attention, hybrid, rivals, state_space
from evals.throughput.problem import Case, Contestant, Cost, Problem, bound_from, relative_error
from seqmodels import backends

# Tokens and rows of the problem on which every contestant is held against the definition.
CHECKED_LENGTH, CHECKED_BATCH = 256, 4
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Op:
    """An op as a case: ``sizes`` of the case name its widths.

    Attributes:
        inputs: random tensors for a case and a generator.
        run: this library's public function on them; returns y.
        cost: least work of a forward.
        backward_cost: least work of the backward alone.
        gradients: names of the inputs that get a gradient.
        rivals: see :mod:`evals.throughput.rivals`.
    """

    inputs: Callable[[Case, torch.Generator], Tensors]
    run: Callable[[Tensors], Tensor]
    cost: Callable[[Case], Cost]
    backward_cost: Callable[[Case], Cost]
    gradients: tuple[str, ...]
    rivals: Callable[[torch.device], Iterator[rivals.Rival]]


def build(case: Case, device: torch.device) -> Problem:
    """The problem of an op case on a device."""
    op = OPS[case.layer]
    training = case.mode == "forward+backward"

    def inputs(seed: int, length: int = case.length, batch: int = case.batch) -> Tensors:
        generator = torch.Generator(device).manual_seed(seed)
        tensors = op.inputs(Case(case.kind, case.layer, case.mode, case.dtype, batch, length, case.sizes), generator)
        if training:
            leaves = {name: tensor.requires_grad_() for name, tensor in tensors.items() if name in op.gradients}
            tensors |= leaves
            tensors["cotangent"] = _randn(generator, *_output_shape(op, tensors), dtype=case.torch_dtype)
        return tensors

    def contestant_run(function: Callable[[Tensors], Tensor]) -> Callable[[Tensors], Any]:
        if not training:
            return torch.no_grad()(function)

        def forward_and_backward(tensors: Tensors) -> list[Tensor]:
            y = function(tensors)
            wanted = [tensors[name] for name in op.gradients if name in tensors]
            return [y, *torch.autograd.grad(y, wanted, tensors["cotangent"], allow_unused=True, materialize_grads=True)]

        return forward_and_backward

    short = inputs(12345, min(case.length, CHECKED_LENGTH), min(case.batch, CHECKED_BATCH))
    contestants, skipped = [], {}
    for name in _own_backends(device):
        run = contestant_run(_on_backend(op.run, name))
        try:
            run(short)
        except backends.BackendUnavailable as error:
            skipped[name] = str(error)
            continue
        contestants.append(Contestant(name, run, ours=True))
        if not case.rivals:
            break
    for name, make, facts in op.rivals(device) if case.rivals else ():
        try:
            run = contestant_run(make())
            run(short)
        except Exception as error:  # a broken rival is reported and left out, whatever it raises
            skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            continue
        contestants.append(Contestant(name, run, **facts))

    whole = None
    if case.length > CHECKED_LENGTH and not training:
        whole = _LongCheck(op, lambda: inputs(54321, batch=1), case.torch_dtype)
    definition = functools.cache(lambda: _definition(op, short, contestant_run, case.torch_dtype))

    def check(contestant: Contestant) -> tuple[float, float]:
        exact, bound = definition()
        error = relative_error(_flat(contestant.run(short)), exact)
        if error > bound or whole is None:
            return error, bound
        return whole.check(contestant)

    cost = op.cost(case)
    if training:
        backward = op.backward_cost(case)
        cost = Cost(cost.flops + backward.flops, cost.bytes + backward.bytes, cost.tokens)
    return Problem(inputs, contestants, check, cost, skipped=skipped)


def _definition(op: Op, tensors: Tensors, wrap: Callable[..., Any], dtype: torch.dtype) -> tuple[list[Tensor], float]:
    """Float64 results of the reference, and the bound on errors in the case's own dtype."""
    run = wrap(_on_backend(op.run, "reference"))
    wide = {name: tensor.detach().double().requires_grad_(tensor.requires_grad) for name, tensor in tensors.items()}
    exact = [tensor.detach() for tensor in _flat(run(wide))]
    plain = wrap(_on_backend(op.run, "torch"))
    return exact, bound_from(*(relative_error(_flat(form(tensors)), exact) for form in (run, plain)), dtype=dtype)


class _LongCheck:
    """One row of the whole length against the chunked PyTorch form in float64, itself tested against the definition."""

    def __init__(self, op: Op, inputs: Callable[[], Tensors], dtype: torch.dtype) -> None:
        self.op, self.inputs, self.dtype = op, inputs, dtype
        self.expected: list[Tensor] = []
        self.bound = 0.0

    def check(self, contestant: Contestant) -> tuple[float, float]:
        tensors = self.inputs()
        with torch.no_grad():
            if not self.expected:
                run = _on_backend(self.op.run, "torch")
                self.expected = _flat(run({name: tensor.double() for name, tensor in tensors.items()}))
                self.bound = bound_from(relative_error(_flat(run(tensors)), self.expected), dtype=self.dtype)
            return relative_error(_flat(contestant.run(tensors)), self.expected), self.bound


def _flat(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _on_backend(function: Callable[[Tensors], Tensor], name: str) -> Callable[[Tensors], Tensor]:
    def run(tensors: Tensors) -> Tensor:
        with seqmodels.backend(name):
            return function(tensors)

    return run


def _own_backends(device: torch.device) -> tuple[str, ...]:
    """Every way this library has here, the one that "auto" takes first; the definition is no contestant."""
    return tuple(
        name for name in backends.preference(device.type) if name != "reference" and backends.missing(name) is None
    )


def _output_shape(op: Op, tensors: Tensors) -> tuple[int, ...]:
    if op is OPS["attention"]:
        return tuple(tensors["q"].shape)
    return tuple((tensors["v"] if "v" in tensors else tensors["x"]).shape)


def _randn(generator: torch.Generator, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=generator, device=generator.device) * scale).to(dtype)


def _width(dtype: str) -> int:
    return {"float64": 8, "float32": 4}.get(dtype, 2)


# ---- linear attention with decay: heads H, groups G, key width N, head width P


def _linear_attention_inputs(case: Case, generator: torch.Generator) -> Tensors:
    size, dtype = case.sizes, case.torch_dtype
    grid = (case.batch, case.length)
    keys = (*grid, size.get("G", 1), size["N"])
    return {
        "q": _randn(generator, *keys, dtype=dtype, scale=size["N"] ** -0.25),
        "k": _randn(generator, *keys, dtype=dtype, scale=size["N"] ** -0.25),
        "v": _randn(generator, *grid, size["H"], size["P"], dtype=dtype),
        "log_decay": -F.softplus(_randn(generator, *grid, size["H"], dtype=torch.float32) - 2),
    }


def _linear_attention(tensors: Tensors) -> Tensor:
    from seqmodels.ops.linear_attention import linear_attention

    decay = tensors["log_decay"]
    return linear_attention(tensors["q"], tensors["k"], tensors["v"], decay)[0]


def _linear_attention_cost(case: Case) -> Cost:
    """4NP + Q(P + N G/H) operations a token and head with chunk Q = 64; inputs and y once, decays in float32.

    Only the causal half of a chunk's scores counts, and the heads of a group share q k^T.
    """
    size, width = case.sizes, _width(case.dtype)
    tokens = case.batch * case.length
    shared = size["N"] * size.get("G", 1) / size["H"]
    flops = tokens * size["H"] * (4 * size["N"] * size["P"] + 64 * (size["P"] + shared))
    moved = tokens * (size["H"] * (2 * size["P"] * width + 4) + 2 * size.get("G", 1) * size["N"] * width)
    return Cost(flops, moved, tokens)


def _linear_attention_backward_cost(case: Case) -> Cost:
    """10NP + Q(2P + 3N G/H): states and scores are computed again. Reads inputs and dy, writes their gradients."""
    size, width = case.sizes, _width(case.dtype)
    tokens = case.batch * case.length
    shared = size["N"] * size.get("G", 1) / size["H"]
    flops = tokens * size["H"] * (10 * size["N"] * size["P"] + 64 * (2 * size["P"] + 3 * shared))
    moved = tokens * (size["H"] * (3 * size["P"] * width + 8) + 4 * size.get("G", 1) * size["N"] * width)
    return Cost(flops, moved, tokens)


# ---- short convolution: C channels, width W, SiLU


def _short_conv_inputs(case: Case, generator: torch.Generator) -> Tensors:
    channels, width, dtype = case.sizes["C"], case.sizes["W"], case.torch_dtype
    return {
        "x": _randn(generator, case.batch, case.length, channels, dtype=dtype),
        "weight": _randn(generator, channels, width, dtype=dtype, scale=0.5),
        "bias": _randn(generator, channels, dtype=dtype, scale=0.5),
    }


def _short_conv(tensors: Tensors) -> Tensor:
    from seqmodels.ops.short_conv import short_conv

    return short_conv(tensors["x"], tensors["weight"], tensors["bias"], activation="silu")[0]


def _short_conv_cost(case: Case) -> Cost:
    elements = case.batch * case.length * case.sizes["C"]
    return Cost(2 * case.sizes["W"] * elements, 2 * elements * _width(case.dtype), case.batch * case.length)


def _short_conv_backward_cost(case: Case) -> Cost:
    elements = case.batch * case.length * case.sizes["C"]
    return Cost(6 * case.sizes["W"] * elements, 3 * elements * _width(case.dtype), case.batch * case.length)


# ---- softmax attention: H heads, G key heads, head width P


def _attention_inputs(case: Case, generator: torch.Generator) -> Tensors:
    size, grid = case.sizes, (case.batch, case.length)
    groups = size.get("G", size["H"])
    return {
        "q": _randn(generator, *grid, size["H"], size["P"], dtype=case.torch_dtype),
        "k": _randn(generator, *grid, groups, size["P"], dtype=case.torch_dtype),
        "v": _randn(generator, *grid, groups, size["P"], dtype=case.torch_dtype),
    }


def _attention(tensors: Tensors) -> Tensor:
    from seqmodels.ops.attention import attention

    return attention(tensors["q"], tensors["k"], tensors["v"])


def _attention_cost(case: Case) -> Cost:
    """2 L^2 P a head (the causal half of two products); q, k, v and y once."""
    size, tokens = case.sizes, case.batch * case.length
    moved = tokens * size["P"] * (2 * size["H"] + 2 * size.get("G", size["H"])) * _width(case.dtype)
    return Cost(2 * tokens * case.length * size["P"] * size["H"], moved, tokens)


def _attention_backward_cost(case: Case) -> Cost:
    forward = _attention_cost(case)
    return Cost(2.5 * forward.flops, 2 * forward.bytes, forward.tokens)


# ---- Mamba-3 from projections to gated output: heads H, head width P, state N, angles N / 4, ranks R


def _mamba3_inputs(case: Case, generator: torch.Generator) -> Tensors:
    size, dtype, grid = case.sizes, case.torch_dtype, (case.batch, case.length)
    heads, width, state, ranks = size["H"], size["P"], size["N"], size.get("R", 1)
    float32 = torch.float32
    dt = F.softplus(_randn(generator, *grid, heads, dtype=float32) - 3)
    mixes = {}
    if "R" in size:
        mixes = {f"mimo_{name}": _randn(generator, heads, ranks, width, dtype=float32) / ranks for name in "xzo"}
    return {
        "x": _randn(generator, *grid, heads, width, dtype=dtype),
        "b": _randn(generator, *grid, ranks, 1, state, dtype=dtype),
        "c": _randn(generator, *grid, ranks, 1, state, dtype=dtype),
        "z": _randn(generator, *grid, heads, width, dtype=dtype),
        "dt": dt,
        "log_decay": -dt * (1 + _randn(generator, *grid, heads, dtype=float32).abs()),
        "trapezoid": torch.sigmoid(_randn(generator, *grid, heads, dtype=float32)),
        "rate": math.pi * torch.tanh(_randn(generator, *grid, state // 4, dtype=float32)),
        "b_weight": 1 + _randn(generator, state, dtype=float32, scale=0.1),
        "c_weight": 1 + _randn(generator, state, dtype=float32, scale=0.1),
        "b_bias": 1 + _randn(generator, heads, ranks, state, dtype=float32, scale=0.1),
        "c_bias": 1 + _randn(generator, heads, ranks, state, dtype=float32, scale=0.1),
        "skip": 1 + _randn(generator, heads, dtype=float32, scale=0.1),
        **mixes,
    }


def _mamba3(tensors: Tensors) -> Tensor:
    from seqmodels.ops.mamba3 import mamba3

    given = {name: tensor for name, tensor in tensors.items() if name != "cotangent"}
    return mamba3(**given)[0]


def _mamba3_cost(case: Case) -> Cost:
    """4RNP + QR^2(N + P) operations a token and head, the causal half of a chunk's scores; Q = 64, or 16 for MIMO.

    The bias makes keys differ from head to head, so scores are not shared. x, z, y and shared b, c, angles once.
    """
    size, width, tokens = case.sizes, _width(case.dtype), case.batch * case.length
    ranks = size.get("R", 1)
    chunk = 16 if ranks > 1 else 64
    products = 4 * ranks * size["N"] * size["P"] + chunk * ranks**2 * (size["N"] + size["P"])
    moved = size["H"] * (3 * size["P"] * width + 12) + 2 * ranks * size["N"] * width + size["N"]
    return Cost(tokens * size["H"] * products, tokens * moved, tokens)


def _mamba3_backward_cost(case: Case) -> Cost:
    size, width, tokens = case.sizes, _width(case.dtype), case.batch * case.length
    ranks = size.get("R", 1)
    chunk = 16 if ranks > 1 else 64
    products = 10 * ranks * size["N"] * size["P"] + chunk * ranks**2 * (3 * size["N"] + 2 * size["P"])
    moved = size["H"] * (5 * size["P"] * width + 24) + 4 * ranks * size["N"] * width + 2 * size["N"]
    return Cost(tokens * size["H"] * products, tokens * moved, tokens)


def _mamba3_rivals(device: torch.device) -> Iterator[rivals.Rival]:
    def make() -> Callable[[Tensors], Tensor]:
        run = rivals.sdpa("FLASH_ATTENTION")()
        return lambda t: run(dict.fromkeys("qkv", t["x"]))

    yield "sdpa flash", make, rivals.SOFTMAX


OPS: dict[str, Op] = {
    "linear_attention": Op(
        _linear_attention_inputs, _linear_attention, _linear_attention_cost, _linear_attention_backward_cost,
        ("q", "k", "v", "log_decay"), rivals.linear_attention_rivals,
    ),
    **{
        f"feature_attention_{name}": Op(
            feature_attention.inputs, feature_attention.run, feature_attention.cost, feature_attention.backward_cost,
            gradients, feature_attention.rivals,
        )
        for name, gradients in (("hedgehog", ("q", "k", "v", "wq", "wk")), ("taylor", ("q", "k", "v")))
    },
    "feature_attention_prefix_taylor": Op(
        feature_attention.inputs, feature_attention.run, feature_attention.cost, feature_attention.backward_cost,
        ("q", "k", "v", "ke", "ve"), feature_attention.prefix_rivals,
    ),
    "short_conv": Op(
        _short_conv_inputs, _short_conv, _short_conv_cost, _short_conv_backward_cost,
        ("x", "weight", "bias"), rivals.short_conv_rivals,
    ),
    "attention": Op(
        _attention_inputs, _attention, _attention_cost, _attention_backward_cost,
        ("q", "k", "v"), rivals.attention_rivals,
    ),
    "mamba3": Op(
        _mamba3_inputs, _mamba3, _mamba3_cost, _mamba3_backward_cost,
        ("x", "b", "c", "z", "dt", "log_decay", "trapezoid", "rate", "b_bias", "c_bias", "skip"), _mamba3_rivals,
    ),
    "sparse_attention": Op(
        hybrid.sparse_inputs, hybrid.sparse, hybrid.sparse_cost, hybrid.sparse_backward_cost,
        ("q", "k", "v", "scores"), hybrid.sparse_rivals,
    ),
    "vandermonde": Op(
        state_space.vandermonde_inputs, state_space.vandermonde, state_space.vandermonde_cost,
        state_space.vandermonde_backward_cost, ("z", "weight"), state_space.vandermonde_rivals,
    ),
    "linear_recurrence": Op(
        state_space.recurrence_inputs, state_space.recurrence, state_space.recurrence_cost,
        state_space.recurrence_backward_cost, ("decay", "x"), state_space.recurrence_rivals,
    ),
}  # fmt: skip
