"""``seqmodels.testing`` as a library: what it says, and what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import torch
from moving_average import MovingAverage
from test_broken_layers import ForgetsPosition, LeaksAcrossDocuments, StepUsesNewToken

from seqmodels.testing import LAWS, LawViolation, check_law, check_layer, laws, poisoned


def test_message_names_law_layer_place_error_and_bound():
    expected = r"packing law: LeaksAcrossDocuments: document 1 \(7 tokens at flat index 1\).* y differs by .* bound \d"
    with pytest.raises(LawViolation, match=expected) as caught:
        laws.packing(LeaksAcrossDocuments(16))
    assert caught.value.law == "packing"


def test_all_broken_laws_are_listed():
    class BrokenTwice(StepUsesNewToken, ForgetsPosition):
        pass

    with pytest.raises(LawViolation, match=r"(?s)2 laws are broken:\n- split law.*\n- accounting law") as caught:
        check_layer(BrokenTwice, only=["split", "causality", "accounting"])
    assert caught.value.law == "split, accounting"


def test_an_exception_out_of_the_layer_is_a_violation():
    class Refuses(MovingAverage):
        def step(self, x_t, state):
            raise RuntimeError("no step today")

    with pytest.raises(LawViolation, match="split law: Refuses raised RuntimeError: no step today") as caught:
        laws.split(Refuses(16))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_unknown_law_is_refused():
    with pytest.raises(ValueError, match="unknown law 'splt'; expected one of split, packing"):
        check_law("splt", MovingAverage, d_model=16)


@pytest.mark.parametrize("law", [law for law in LAWS if law != "registration"])
def test_a_law_leaves_layer_seed_and_settings_alone(law):
    layer = MovingAverage(16)
    before = copy.deepcopy(layer.state_dict())
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False
    seed = torch.random.get_rng_state()
    try:
        LAWS[law](layer)
        assert not torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert layer.training
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_memory_is_poisoned():
    with poisoned():
        for tensor in (torch.empty(5), torch.empty_like(torch.zeros(3)), torch.zeros(2).new_empty(4)):
            assert tensor.isnan().all()


def test_a_law_reads_uninitialised_memory_as_nan():
    """A layer that leaves one output unwritten, which would often pass by luck."""

    class ForgetsToken(MovingAverage):
        def mix(self, h, x, layout):
            y = torch.empty_like(x)
            y[:, 1:] = super().mix(h, x, layout)[:, 1:]
            return y

    with pytest.raises(LawViolation, match="differs by nan"):
        laws.split(ForgetsToken(16))


def test_laws_are_the_same_every_time():
    layer = MovingAverage(16)
    first, second = (laws.backend_agreement(layer, backends=["torch"]) for _ in range(2))
    assert first == second
    assert set(first) == {"torch/float64", "torch/float32", "torch/bfloat16", "torch/autocast bfloat16"}
    assert all(0 <= ratio <= 1 for ratio in first.values())
