"""Problems of the diagonal state-space family: kernel generation, linear recurrence, and the layer's plain form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from evals.throughput.problem import Case, Cost
from evals.throughput.rivals import Rival

Tensors = dict[str, Tensor]

# ---- Vandermonde product: H heads, state size N (N / 2 modes, conjugates left out)


def vandermonde_inputs(case: Case, generator: torch.Generator) -> Tensors:
    """S4D-Lin's exponents with log-uniform steps. ``x`` holds no number: it says the output's shape."""
    heads, modes, device = case.sizes["H"], case.sizes["N"] // 2, generator.device
    unit = torch.rand(heads, 1, generator=generator, device=device, dtype=torch.float64)
    dt = torch.exp(math.log(1e-3) + unit * math.log(100))
    mode = torch.arange(modes, device=device, dtype=torch.float64)
    z = torch.stack((-0.5 * dt.expand(heads, modes), dt * math.pi * mode), -1)
    weight = torch.randn(heads, modes, 2, generator=generator, device=device).to(case.torch_dtype)
    return {"z": z, "weight": weight, "x": torch.empty(heads, case.length, device=device)}


def vandermonde(tensors: Tensors) -> Tensor:
    from seqmodels.ops.vandermonde import vandermonde

    return vandermonde(tensors["z"], tensors["weight"], tensors["x"].shape[1], scale=2.0)


def vandermonde_cost(case: Case) -> Cost:
    """Two-level form: a product of depth N for each head and time; the kernel is written once."""
    elements = case.sizes["H"] * case.length
    return Cost(2 * case.sizes["N"] * elements, 4 * elements, case.length)


def vandermonde_backward_cost(case: Case) -> Cost:
    """Two moments for each mode; the gradient is read once."""
    elements = case.sizes["H"] * case.length
    return Cost(4 * case.sizes["N"] * elements, 4 * elements, case.length)


def vandermonde_rivals(device: torch.device) -> Iterator[Rival]:
    loses = "float32 phases: its error grows with length, so it is not held to the bound"
    yield "torch broadcast", lambda: _broadcast, {"same_function": False, "omits": loses}


def _broadcast(tensors: Tensors) -> Tensor:
    """2 Re sum_n w e^{l z} over a tensor of heads x modes x length, as plain implementations write it."""
    z, weight = (torch.view_as_complex(tensors[name].float()) for name in ("z", "weight"))
    times = torch.arange(tensors["x"].shape[1], device=z.device)
    return 2 * torch.einsum("hn,hnl->hl", weight, torch.exp(z.unsqueeze(-1) * times)).real


# ---- linear recurrence: C complex channels, decays constant or (V = 1) one for each token


def recurrence_inputs(case: Case, generator: torch.Generator) -> Tensors:
    shape = (case.batch, case.length, case.sizes["C"], 2)
    decays = shape if case.sizes.get("V") else shape[2:]

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=generator.device).to(case.torch_dtype)

    return {"decay": 0.7 * torch.tanh(normal(*decays)), "x": normal(*shape)}


def recurrence(tensors: Tensors) -> Tensor:
    from seqmodels.ops.linear_recurrence import linear_recurrence

    return linear_recurrence(tensors["decay"], tensors["x"])[0]


def recurrence_cost(case: Case) -> Cost:
    """8 operations a complex element; x and h once, and decays where they change."""
    elements = case.batch * case.length * case.sizes["C"]
    return Cost(8 * elements, (24 if case.sizes.get("V") else 16) * elements, case.batch * case.length)


def recurrence_backward_cost(case: Case) -> Cost:
    """Reads dh and h and writes dx; reads decays and writes their gradients where they change."""
    elements = case.batch * case.length * case.sizes["C"]
    return Cost(16 * elements, (40 if case.sizes.get("V") else 24) * elements, case.batch * case.length)


def recurrence_rivals(device: torch.device) -> Iterator[Rival]:
    moves = "moves the same bytes between the same tensors and computes no recurrence"
    yield "torch copy", lambda: _copy, {"same_function": False, "omits": moves}


def _copy(tensors: Tensors) -> Tensor:
    """As many tensors read and written, newly allocated ones included, as the recurrence's forward has."""
    decay, x = tensors["decay"], tensors["x"]
    if x.requires_grad:
        raise ValueError("a copy's backward moves nothing: there is nothing to compare with")
    return decay + x if decay.shape == x.shape else x.clone()


# ---- the layer


class PlainS4D(nn.Module):
    """S4D as its small standalone forms write it: the kernel by broadcasting, then the convolution by FFT.

    Args:
        layer: this library's, whose parameters it reads; one (A, B), zero-order hold, real part exp, one direction.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.layer
        u = x.transpose(1, 2)
        length = u.shape[2]
        a = torch.complex(-torch.exp(layer.A_real), layer.A_imag)
        z = a * torch.exp(layer.log_dt)[:, None]
        weight = torch.view_as_complex(layer.C[0]) * torch.view_as_complex(layer.B) * (torch.exp(z) - 1) / a
        times = torch.arange(length, device=x.device)
        kernel = 2 * torch.einsum("hn,hnl->hl", weight, torch.exp(z.unsqueeze(-1) * times)).real
        spectrum = torch.fft.rfft(kernel, n=2 * length) * torch.fft.rfft(u, n=2 * length)
        y = torch.fft.irfft(spectrum, n=2 * length)[..., :length]
        return (y + layer.D[0][:, None] * u).transpose(1, 2)


def s4d_rival(layer: nn.Module) -> tuple[str, Callable[[], nn.Module], dict[str, object]]:
    loses = "float32 phases: its error grows with length, so it is not held to the bound"
    return "S4D in plain PyTorch", lambda: PlainS4D(layer), {"same_function": False, "omits": loses}
