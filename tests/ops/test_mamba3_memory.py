"""Memory of Mamba-3's training on a CPU: what waits for the backward, and the peak of forward and backward."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mamba3_inputs import make_inputs
from torch import Tensor

import seqmodels
from seqmodels.backends import missing
from seqmodels.mixers import Mamba3
from seqmodels.ops.mamba3 import mamba3

pytestmark = pytest.mark.skipif(missing("cpu") is not None, reason=str(missing("cpu")))

# Prints the bytes by which the peak of forward and backward exceeds what was there before: the inputs and the
# gradient of the output. In a process of its own, whose peak no other test has raised.
PEAK = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from mamba3_inputs import make_inputs
import seqmodels
from seqmodels.ops.mamba3 import mamba3

torch.set_num_threads(2)
for length in (64, int(sys.argv[2])):  # once small, so that libraries have what they keep
    inputs = make_inputs(batch_size=1, length=length, heads=16, head_dim=64, d_state=128, groups=1, angles=32,
                         ranks=int(sys.argv[3]) or None, dtype=torch.float32)
    leaves = [value.requires_grad_() for value in inputs.values()]
    grad = torch.ones(1, length, 16, 64)
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
    before = int(open("/proc/self/statm").read().split()[1]) * 4096
    with seqmodels.backend("cpu"):
        out, _ = mamba3(**inputs)
        gradients = torch.autograd.grad(out, leaves, grad)
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(int(peak.split()[1]) * 1024 - before)
"""


def size(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def kept_storages(function) -> dict[int, int]:
    """Address and bytes of every storage that ``function`` keeps for its backward."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # alive while the addresses are read
    assert result is not None
    return kept


@pytest.mark.parametrize("ranks", [None, 4])
def test_the_op_keeps_its_inputs_and_nothing_else(ranks: int | None) -> None:
    inputs = make_inputs(length=130, ranks=ranks, dtype=torch.float32)
    leaves = {name: value.requires_grad_() for name, value in inputs.items()}
    with seqmodels.backend("cpu"):
        kept = kept_storages(lambda: mamba3(**leaves))
    assert kept.keys() == {value.untyped_storage().data_ptr() for value in leaves.values()}


@pytest.mark.parametrize("ranks", [None, 4])
def test_the_layer_keeps_two_projections(ranks: int | None) -> None:
    """Beside its parameters: the input, what in_proj and the op gave, and a few numbers a token and head."""
    layer = Mamba3(64, d_state=32, head_dim=16, mimo_rank=ranks)
    x = torch.randn(2, 200, 64)
    with seqmodels.backend("cpu"):
        kept = kept_storages(lambda: layer(x))
    parameters = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    found = sum(nbytes for address, nbytes in kept.items() if address not in parameters)
    p = layer.projection
    width = 64 + sum(p.widths) + p.num_heads * p.head_dim  # of a token's input, projection and output
    scalars = 12 * p.num_heads + 2 * p.angles  # activations of dt, A, trapezoid and theta, and what they are made of
    assert found <= 4 * 400 * (width + scalars)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize("ranks", [0, 4])
def test_peak_of_training(ranks: int) -> None:
    """At most 1.3 times inputs, outputs, the gradients of both, and a state for each chunk."""
    length, heads, head_dim, d_state, chunk = 4096, 16, 64, 128, 64 // max(ranks, 1)
    inputs = make_inputs(batch_size=1, length=1, heads=heads, head_dim=head_dim, d_state=d_state, groups=1, angles=32,
                         ranks=ranks or None, dtype=torch.float32)  # fmt: skip
    per_token = [value for value in inputs.values() if value.dim() > 2 and value.shape[1] == 1 and value.shape[0] == 1]
    out = 4 * heads * head_dim * length
    present = size(per_token) * length + out  # before the measurement: inputs and the output's gradient
    states = length // chunk * heads * head_dim * d_state * 4
    command = [sys.executable, "-c", PEAK, str(Path(__file__).parent), str(length), str(ranks)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert int(found.stdout) + present <= 1.3 * (2 * present + states)


@pytest.mark.parametrize("ranks", [None, 4])
def test_a_step_allocates_its_results_alone(ranks: int | None) -> None:
    """The two projections' rows and the gated one: no scratch, no copy of a weight or of the state."""
    layer = Mamba3(64, d_state=32, head_dim=16, mimo_rank=ranks, out_norm=True)
    state, x, width = layer.init_state(3), torch.randn(3, 64), sum(layer.projection.widths)
    with seqmodels.backend("cpu"):
        layer.step(x, state)  # scratch grows once
        with torch.profiler.profile(profile_memory=True) as profile:
            layer.step(x, state)
    allocated = [event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0]
    rows = [(4 * 3 * n + 63) // 64 * 64 for n in (width, 128, 64)]  # the allocator rounds to 64 bytes
    assert allocated == rows
