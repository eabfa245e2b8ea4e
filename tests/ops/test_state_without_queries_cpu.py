"""The C++ form of a state without queries: linear attention's and feature attention's, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from feature_attention_cases import Case, cast
from linear_attention_cases import Case as PlainCase
from linear_attention_cases import cast as plain_cast
from two_times_rule import check_against

import seqmodels
from seqmodels import Layout
from seqmodels.ops import extension
from seqmodels.ops.feature_attention import FEATURE_MAPS, FeatureState, feature_state
from seqmodels.ops.linear_attention import linear_attention_state

pytestmark = pytest.mark.skipif(extension.load() is not None, reason=str(extension.load()))
PACKED = Layout.packed([[65, 1, 20], [64, 23], [87]], 90, capacity=7)
LEVELS = ("default", "avx2", "avx512")
PLAIN = {
    "all": PlainCase(length=130, key_dim=20, value_dim=17),
    "ranks, normalised": PlainCase(length=40, ranks=3, key_groups=1, normalize=True, absent=("initial_state",)),
    "packed": PlainCase(key_dim=16, value_dim=8, key_groups=1).with_layout(PACKED),
    "no decay": PlainCase(length=67, key_groups=2, heads=24, absent=("log_decay", "past_weight")),
}


def at_level(level: str):
    try:
        with extension.capability(level):
            pass
    except RuntimeError as reason:
        pytest.skip(str(reason))
    return extension.capability(level)


def gradients(leaves: dict, state: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(state.shape, generator=generator).to(state.dtype)
    present = {name: x for name, x in leaves.items() if x is not None}
    found = torch.autograd.grad(state, list(present.values()), grad)
    return {f"grad {name}": x.double() for name, x in zip(present, found, strict=True)}


def run_plain(case: PlainCase, backend: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    names = ("k", "v", "log_decay", "past_weight", "initial_state")
    _, *inputs = plain_cast(case.inputs(torch.float32), dtype)
    given = [inputs[0], inputs[1], inputs[2], inputs[3], inputs[5]]
    leaves = {name: None if x is None else x.requires_grad_() for name, x in zip(names, given, strict=True)}
    options = dict(normalize=case.normalize, layout=case.layout)
    with seqmodels.backend(backend):
        state = linear_attention_state(
            leaves["k"], leaves["v"], leaves["log_decay"], past_weight=leaves["past_weight"],
            initial_state=leaves["initial_state"], **options,
        )  # fmt: skip
        return {"state": state.detach().double(), **gradients(leaves, state)}


def run_mapped(
    case: Case, backend: str, dtype: torch.dtype, exact_in: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    _, k, v, _, weight, log_decay, matrix, scale = cast(case.inputs(exact_in), dtype)
    leaves = dict(k=k, v=v, key_weight=weight, log_decay=log_decay, matrix=matrix)
    leaves = {name: None if x is None else x.requires_grad_() for name, x in leaves.items()}
    initial = None if matrix is None else FeatureState(leaves["matrix"], scale)
    with seqmodels.backend(backend):
        state = feature_state(
            leaves["k"], leaves["v"], leaves["key_weight"], feature_map=case.feature_map,
            log_decay=leaves["log_decay"], initial_state=initial, normalize=case.normalize, layout=case.layout,
        )  # fmt: skip
        scales = {} if state.log_scale is None else {"scale": state.log_scale.double()}
        return {"state": state.matrix.detach().double(), **scales, **gradients(leaves, state.matrix)}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", PLAIN)
def test_linear_attention(name, level):
    exact, low = (run_plain(PLAIN[name], "torch", dtype) for dtype in (torch.float64, torch.float32))
    with at_level(level):
        check_against(run_plain(PLAIN[name], "cpu", torch.float32), low, exact, name)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", ["packed", "no weights", "from nothing"])
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_feature_attention(name, shape, level):
    decay = name != "hedgehog_exp"
    case = {
        "packed": Case(name, key_groups=1, heads=4, head_dim=6, decay=decay).with_layout(PACKED),
        "no weights": Case(name, length=67, width=None, key_groups=2, heads=4, decay=decay),
        "from nothing": Case(name, length=130, head_dim=16, width=16, value_dim=16, state=False),
    }[shape]
    if name == "t2r":
        case = replace(case, width=case.width or 5)
    exact = run_mapped(case, "torch", torch.float64)
    low = run_mapped(case, "torch" if decay else "reference", torch.float32)
    with at_level(level):
        check_against(run_mapped(case, "cpu", torch.float32), low, exact, f"{name}, {shape}")


@pytest.mark.parametrize("name", ["taylor", "hedgehog_exp"])
def test_bfloat16_rounds_results_once(name):
    case = Case(name, length=67, width=None, key_groups=1, heads=16)  # one group over two blocks of heads
    exact = run_mapped(case, "torch", torch.float64, torch.bfloat16)
    found = run_mapped(case, "cpu", torch.bfloat16, torch.bfloat16)
    for key, value in exact.items():
        # Sums are float32, of 67 terms; gradients of k and v leave in bfloat16, rounded by 2^-9 relative.
        bound = 2.0**-9 if key in ("grad k", "grad v") else 0.0
        assert (found[key] - value).norm() <= (bound + 67 * 2.0**-23) * value.norm(), key
