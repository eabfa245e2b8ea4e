"""Every kernel on a GPU: dtypes, shipped tiles, guarded memory, determinism, graphs.

The layers' laws on a GPU are in tests/test_laws.py. Run all with ``pytest -m gpu`` (at most 6 minutes).
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest
import torch

import seqmodels.ops
from seqmodels import MIXERS, backends
from seqmodels.ops import canary
from seqmodels.ops.examples import EXAMPLES, Draw
from seqmodels.ops.kernels import choosing_tiles
from seqmodels.ops.registration import OPERATORS
from seqmodels.testing.guarded import run_guarded

for _module in pkgutil.iter_modules(seqmodels.ops.__path__, "seqmodels.ops."):
    if _module.ispkg:
        importlib.import_module(_module.name)  # registers its operators

pytestmark = pytest.mark.gpu
KERNELS = [
    (name, backend) for name in sorted(EXAMPLES) for backend in ("triton", "cuda") if backend in OPERATORS[name].modules
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [1, 17, 64, 131]
# Operands that an op's kernels round to the inputs' dtype on the longest way from an input to a gradient, which the
# definition and the plain form keep in float32. Linear attention: past values, state, scores, weighted values, and
# the gradient over the divisor. Mamba-3: those, and q, k, v, y. Feature attention: weights, u, phi, scores, states and
# du, and two operands of a relu's or softmax's argument near its bend. Sparse attention: probabilities, their gradient,
# and y in the product with its gradient.
ROUNDINGS = {"linear_attention": 5, "mamba3": 9, "feature_attention": 16, "feature_state": 16, "sparse_attention": 3}


@pytest.fixture(autouse=True)
def kernels_run_whatever_the_canary_says(monkeypatch):
    """A kernel that the canary refuses must fail here, not be skipped."""
    monkeypatch.setattr(canary, "refusal", lambda *_: None)


def examples(name, backend, dtype, length=131):
    operator = OPERATORS[name]
    reason = backends.missing(backend)
    if reason is not None:
        pytest.skip(reason)
    found = [
        arguments
        for arguments in EXAMPLES[name](Draw(dtype, torch.device("cuda", 0), length=length))
        if operator._refusal(backend, "cuda", arguments) is None
    ]
    if not found:
        pytest.skip(f"{name}: backend {backend!r} takes none of the examples in {dtype}")
    return operator, found


def check(operator, backend, arguments):
    """Root-mean-square errors of every output, state and gradient against the float64 definition.

    At most four times what the definition, or the plain PyTorch form, loses in the same dtype on the same
    numbers, plus 32 float32 roundings: what another order of summation may cost, plus eps / 2 for each of
    ``ROUNDINGS``, were they to add up.
    """
    exact = canary.results(operator, "reference", canary.in_dtype(arguments, torch.float64))
    low, plain, found = (
        canary.compare(canary.results(operator, form, arguments), exact) for form in ("reference", "torch", backend)
    )
    for what, error in found.items():
        allowed = 4 * max(low[what], plain[what]) + 32 * torch.finfo(torch.float32).eps
        allowed += ROUNDINGS.get(operator.name, 0) * torch.finfo(arguments[0].dtype).eps / 2
        assert error <= allowed, f"{operator.name} on {backend}: {what} is off by {error:.2e}; allowed {allowed:.2e}"


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "backend"), KERNELS)
def test_agrees_with_the_definition(name, backend, dtype, length):
    operator, found = examples(name, backend, dtype, length)
    for arguments in found:
        check(operator, backend, arguments)


@pytest.mark.parametrize("tile", range(4))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "backend"), [kernel for kernel in KERNELS if kernel[1] == "triton"])
def test_every_shipped_tile_agrees(name, backend, dtype, tile):
    """Every tile, not only the one that the heuristic picks on this device."""
    used = []

    def choice(spec, variant, dtype_name):
        shipped = spec.shipped_tiles(variant, dtype_name)
        if tile >= len(shipped):
            return None
        used.append(shipped[tile])
        return shipped[tile]

    operator, found = examples(name, backend, dtype)
    with choosing_tiles(choice):
        for arguments in found:
            try:
                check(operator, backend, arguments)
            except Exception as error:
                if type(error).__name__ != "OutOfResources":  # the heuristic never picks it on this device
                    raise
    if not used:
        pytest.skip(f"no kernel of {name} ships {tile + 1} tiles")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "backend"), KERNELS)
def test_stays_inside_its_memory(name, backend, dtype):
    for length in (1, 63, 131):
        operator, found = examples(name, backend, dtype, length)
        for arguments in found:
            plain = canary.results(operator, backend, arguments)
            guarded = run_guarded(lambda *given, op=operator: canary.results(op, backend, given), *arguments)
            for (what, value), (_, same) in zip(plain, guarded, strict=True):
                assert torch.equal(value, same), f"{what} depends on memory outside the tensors"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "backend"), KERNELS)
def test_three_runs_are_bitwise_equal(name, backend, dtype):
    operator, found = examples(name, backend, dtype)
    for arguments in found:
        first = canary.results(operator, backend, arguments)
        for _ in range(2):
            for (what, value), (_, again) in zip(first, canary.results(operator, backend, arguments), strict=True):
                assert torch.equal(value, again), f"{what} differs from run to run"


@pytest.mark.parametrize(("name", "backend"), KERNELS)
def test_canary_accepts_this_gpu(name, backend):
    operator, _ = examples(name, backend, torch.bfloat16)  # skips where the kernels are not here
    assert canary.verdict(operator, backend, torch.device("cuda", 0), "this GPU") is None


def steppable():
    return [name for name in MIXERS.names() if MIXERS[name].causality == "causal"]


@pytest.mark.parametrize("name", steppable())
def test_captured_step_equals_the_eager_one(name):
    """A step reads nothing on the host, so a CUDA graph of it can be replayed token after token."""
    required = {"num_heads": 2} if "num_heads" in inspect.signature(MIXERS[name]).parameters else {}
    layer = MIXERS[name](128, **required).cuda().eval()
    tokens = torch.randn(12, 2, 128, device="cuda")
    eager_state = layer.init_state(2, max_length=16)
    expected = [layer.step(token, eager_state) for token in tokens]

    state, x = layer.init_state(2, max_length=16), tokens[0].clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer.step(x, layer.init_state(2, max_length=16))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    start = state.clone()
    with torch.cuda.graph(graph):
        y = layer.step(x, state)
    for (_, tensor), (_, value) in zip(state.tensors(), start.tensors(), strict=True):
        tensor.copy_(value)
    for token, wanted in zip(tokens, expected, strict=True):
        x.copy_(token)
        graph.replay()
        torch.testing.assert_close(y, wanted)
    for (field, tensor), (_, wanted) in zip(state.tensors(), eager_state.tensors(), strict=True):
        torch.testing.assert_close(tensor, wanted, msg=lambda text, field=field: f"state field {field}: {text}")


def test_throughput_suite_measures_on_this_gpu(tmp_path):
    pytest.importorskip("evals.throughput", reason="evals runs from the clone")
    from evals.results import Results, read
    from evals.throughput import runner
    from evals.throughput.problem import Case

    cases = [
        Case("op", "short_conv", "forward", "bfloat16", 2, 256, {"C": 256, "W": 4}),
        Case("op", "linear_attention", "forward+backward", "bfloat16", 2, 256, {"H": 4, "P": 64, "N": 64}),
        Case("op", "feature_attention_hedgehog", "forward+backward", "bfloat16", 2, 257, {"H": 4, "P": 64, "D": 64}),
        Case(
            "op", "feature_attention_prefix_taylor", "forward+backward", "bfloat16", 2, 257, {"H": 4, "P": 64, "D": 16}
        ),
        Case("layer", "mamba2", "decode", "bfloat16", 2, 64, {"d_model": 256}),
    ]
    runner.run(cases, Results(tmp_path, "throughput"), torch.device("cuda", 0))
    rows = read(tmp_path)
    failed = [row for row in rows if row["metric"] == "failed" and row["rival"] is None]
    assert not failed, failed
    assert {row["case"] for row in rows if row["metric"] == "latency" and row["rival"] is None} == {
        c.name for c in cases
    }
