"""Tile choices: by device, dtype and head size, never by length; refined by the tuner, stored per device."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import pickle

import pytest
import torch

import seqmodels.ops.short_conv  # noqa: F401  (registers the op)
from seqmodels.ops import tiles, tuning
from seqmodels.ops.kernels import KernelSpec, choosing_tiles
from seqmodels.ops.registration import OPERATORS
from seqmodels.ops.tiles import KNOWN_DEVICES, Tile, tuned_path, tuned_tile

H100 = KNOWN_DEVICES["sm_90"]
SMALL, LARGE = Tile({"BLOCK": 32}, num_warps=2), Tile({"BLOCK": 128}, num_warps=8)


def kernel(**kwargs):
    facts = {"function": None, "signature": {"x": "*{dtype}"}, "tiles": (SMALL, LARGE), "variants": ({"HEAD": 64},)}
    return KernelSpec("toy", **{**facts, **kwargs})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEQMODELS_CACHE", str(tmp_path))
    tiles.tuned_tiles.cache_clear()
    yield tmp_path
    tiles.tuned_tiles.cache_clear()


def test_first_shipped_tile_is_the_default_and_a_heuristic_may_look_at_the_device():
    assert kernel().tile(H100, {"HEAD": 64}, "bf16") == SMALL
    by_memory = kernel(choose=lambda device, variant, dtype: LARGE if device.shared_memory > 100_000 else SMALL)
    assert by_memory.tile(H100, {"HEAD": 64}, "bf16") == LARGE
    assert by_memory.tile(KNOWN_DEVICES["gfx942"], {"HEAD": 64}, "bf16") == SMALL


def test_heuristics_cannot_see_the_length():
    assert list(inspect.signature(KernelSpec.tile).parameters) == ["self", "device", "variant", "dtype"]


def test_combinations_that_are_not_valid_are_never_chosen():
    spec = kernel(valid=lambda tile, variant, dtype: tile == LARGE or variant["HEAD"] < 128)
    assert spec.tile(H100, {"HEAD": 64}, "bf16") == SMALL
    assert spec.tile(H100, {"HEAD": 128}, "bf16") == LARGE
    with pytest.raises(ValueError, match="no tile is valid"):
        kernel(valid=lambda *_: False).tile(H100, {"HEAD": 64}, "bf16")


def test_tiles_compare_by_content_and_survive_a_process_boundary():
    assert pickle.loads(pickle.dumps(SMALL)) == SMALL
    assert Tile({"A": 1, "B": 2}) == Tile({"B": 2, "A": 1})
    assert hash(Tile({"A": 1, "B": 2})) == hash(Tile({"B": 2, "A": 1}))
    assert SMALL.launch() == {"BLOCK": 32, "num_warps": 2, "num_stages": 2}
    with pytest.raises(ValueError, match="num_warps is 3"):
        Tile({}, num_warps=3)


def test_stored_tile_is_used_on_its_device_only(cache):
    tuning.store(H100, {("toy", "HEAD=64", "bf16"): LARGE})
    assert tuned_path(H100).is_relative_to(cache)
    assert kernel().tile(H100, {"HEAD": 64}, "bf16") == LARGE
    assert kernel().tile(H100, {"HEAD": 64}, "fp32") == SMALL
    assert kernel().tile(H100, {"HEAD": 128}, "bf16") == SMALL
    assert kernel().tile(KNOWN_DEVICES["sm_80"], {"HEAD": 64}, "bf16") == SMALL
    assert kernel(tiles=(SMALL,)).tile(H100, {"HEAD": 64}, "bf16") == SMALL, "a tile that is no longer shipped"
    tuning.store(H100, {("other", "", "fp32"): SMALL})
    assert tuned_tile(H100, "toy", {"HEAD": 64}, "bf16") == LARGE, "other entries stay"


def test_unreadable_file_is_reported_and_passed_over(caplog):
    path = tuned_path(H100)
    path.parent.mkdir(parents=True)
    path.write_text('{"tiles": [{"kernel": 1}]}')
    with caplog.at_level(logging.WARNING, logger="seqmodels"):
        assert kernel().tile(H100, {"HEAD": 64}, "bf16") == SMALL
    assert "run `seqmodels tune`" in caplog.text


def test_tuner_keeps_the_faster_tile_that_gives_the_same_results(monkeypatch):
    """A toy kernel stands in for Triton's: its tile decides its time, and one tile is wrong."""
    wrong = dataclasses.replace(SMALL, num_stages=4)
    spec = kernel(tiles=(SMALL, LARGE, wrong))
    operator = OPERATORS["short_conv"]
    right = operator.module("torch")
    launched = []

    def forward(*args):
        tile = spec.tile(H100, {"HEAD": 64}, "fp32")
        launched.append(tile)
        y, state = right.forward(*args)
        return (y * 2 if tile == wrong else y), state

    monkeypatch.setitem(operator._loaded, "torch", type("Module", (), {"forward": staticmethod(forward)}))

    def measure(run):
        run()
        return {SMALL: 2.0, LARGE: 1.0, wrong: 0.1}[launched[-1]]

    said = []
    arguments = {"ops": ["short_conv"], "dtypes": [torch.float32], "backend": "torch", "batch": 1, "length": 40}
    assert tuning.tune(torch.device("cpu"), **arguments, measure=measure, say=said.append) == 1
    assert any("differs from the default tile" in line for line in said)
    assert spec.tile(H100, {"HEAD": 64}, "fp32") == LARGE
    with choosing_tiles(lambda *_: SMALL):
        assert spec.tile(H100, {"HEAD": 64}, "fp32") == SMALL
    with pytest.raises(ValueError, match="'nothing' has no torch kernels"):
        tuning.tune(torch.device("cpu"), **{**arguments, "ops": ["nothing"]}, measure=measure)


def test_difference_within_noise_stores_nothing(monkeypatch):
    spec = kernel()
    operator = OPERATORS["short_conv"]
    right = operator.module("torch")
    forward = staticmethod(lambda *args: (spec.tile(H100, {"HEAD": 64}, "fp32"), right.forward(*args))[1])
    monkeypatch.setitem(operator._loaded, "torch", type("Module", (), {"forward": forward}))
    times = iter([1.0, 0.99] * 10)
    arguments = {"ops": ["short_conv"], "dtypes": [torch.float32], "backend": "torch", "batch": 1, "length": 40}
    stored = tuning.tune(torch.device("cpu"), **arguments, measure=lambda run: next(times), say=lambda text: None)
    assert stored == 0
