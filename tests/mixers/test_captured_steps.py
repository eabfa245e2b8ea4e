"""What a CUDA graph cannot hold is in no layer's step; the graphs themselves are tried in tests/gpu."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seqmodels import MIXERS
from seqmodels.mixers import evaluation_cache, workspace

# A tensor made from Python numbers is a copy from the host's memory; factorisations read their error codes.
REFUSED = ("lift_fresh", "linalg", "_local_scalar_dense", "nonzero")


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def refused_in_step(layer: torch.nn.Module) -> set[str]:
    state, x = layer.init_state(2, max_length=8), torch.randn(2, 64)
    with torch.no_grad(), Calls() as calls:
        layer.step(x, state)
    return {name for name in calls.names if any(part in name for part in REFUSED)}


@pytest.mark.parametrize("name", [name for name in MIXERS.shipped() if MIXERS[name].causality == "causal"])
def test_step_can_be_captured(name, monkeypatch):
    monkeypatch.setattr(evaluation_cache, "usable", lambda parameters: False)  # as while a graph is captured
    monkeypatch.setattr(workspace, "_is_at_hand", lambda x: False)  # as on a GPU
    required = {"num_heads": 2} if "num_heads" in inspect.signature(MIXERS[name]).parameters else {}
    assert refused_in_step(MIXERS[name](64, **required).eval()) == set()


def test_a_copy_from_the_host_is_seen():
    class Copies(torch.nn.Module):
        def init_state(self, batch_size, max_length):
            return None

        def step(self, x_t, state):
            return x_t * torch.tensor([1.0], device=x_t.device)

    assert refused_in_step(Copies()) == {"lift_fresh"}
