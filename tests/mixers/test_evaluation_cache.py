"""The kernel of evaluation: made once, made anew when anything that it depends on changes, never seen from outside."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import seqmodels
from seqmodels.mixers import S4D, s4d
from seqmodels.mixers.evaluation_cache import EvaluationCache


@pytest.fixture
def layer() -> S4D:
    torch.manual_seed(0)
    return S4D(4, d_state=144, init="lin").eval()  # more modes than a scan takes: a kernel is made


@pytest.fixture
def kernels(monkeypatch) -> list[int]:
    """Lengths of the kernels that were computed."""
    made: list[int] = []
    original = s4d.vandermonde

    def counted(z, weight, length, **options):
        made.append(length)
        return original(z, weight, length, **options)

    monkeypatch.setattr(s4d, "vandermonde", counted)
    return made


X = torch.linspace(-1, 1, 80).view(1, 20, 4)


@torch.no_grad()
def test_one_kernel_serves_all_shorter_sequences(layer: S4D, kernels: list[int]) -> None:
    first = layer(X).y
    assert torch.equal(layer(X).y, first)
    torch.testing.assert_close(layer(X[:, :7]).y, first[:, :7])
    assert kernels == [20]
    layer(torch.cat((X, X), 1))
    layer(X)
    assert kernels == [20, 40]


def _in_place(layer: S4D) -> None:
    layer.A_imag.mul_(1.5)


def _optimiser(layer: S4D) -> None:
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def _load(layer: S4D) -> None:
    layer.load_state_dict({name: 1.1 * value for name, value in layer.state_dict().items()})


def _assign(layer: S4D) -> None:
    layer.load_state_dict({name: 1.1 * value for name, value in layer.state_dict().items()}, assign=True)


def _replace(layer: S4D) -> None:
    layer.C = torch.nn.Parameter(layer.C * 2)


def _data(layer: S4D) -> None:
    layer.C.data.mul_(2)
    layer.eval()


def _rate(layer: S4D) -> None:
    layer.rate = 3.0


@pytest.mark.parametrize("change", [_in_place, _optimiser, _load, _assign, _replace, _data, _rate])
@pytest.mark.parametrize("stepping", [False, True])
@torch.no_grad()
def test_changes_are_seen(layer: S4D, change, stepping: bool) -> None:
    def outputs(candidate: S4D) -> torch.Tensor:
        return candidate.step(X[:, 0], candidate.init_state(1)) if stepping else candidate(X).y

    before = outputs(layer)
    change(layer)
    fresh = copy.deepcopy(layer)
    assert not torch.equal(outputs(layer), before)
    assert torch.equal(outputs(layer), outputs(fresh))


def test_gradients_are_never_cut(layer: S4D, kernels: list[int]) -> None:
    with torch.no_grad():
        layer(X)
    layer(X).y.sum().backward()
    assert layer.A_real.grad is not None
    layer(X)
    assert kernels == [20, 20, 20]


@torch.no_grad()
def test_moves_and_copies(layer: S4D) -> None:
    expected = layer(X).y
    twin = copy.deepcopy(layer)
    assert not twin._cache._entries
    assert not pickle.loads(pickle.dumps(layer))._cache._entries
    assert "_cache" not in "".join(layer.state_dict())
    wide = layer.double()(X.double()).y
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), expected)
    with torch.inference_mode():
        torch.testing.assert_close(twin(X).y, expected)
    torch.testing.assert_close(twin(X).y, expected)


@torch.no_grad()
def test_a_backend_asked_for_by_name_runs(layer: S4D, kernels: list[int]) -> None:
    layer(X)
    with seqmodels.backend("reference"):
        layer(X)
    assert kernels == [20, 20]


def test_compiled_code_holds_no_cached_value(layer: S4D) -> None:
    with torch.no_grad():
        layer(X)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        compiled(X)
        layer.C.mul_(2)
        torch.testing.assert_close(compiled(X).y, layer(X).y)


def test_tensor_subclasses_and_inference_tensors_are_left_alone() -> None:
    cache = EvaluationCache()
    with torch.inference_mode():
        inference = torch.ones(2)
    with torch.no_grad():
        assert cache.get("a", [inference], (), lambda: 1) == 1
        assert cache.get("a", [torch.ones(2, device="meta")], (), lambda: 2) == 2
    assert not cache._entries
