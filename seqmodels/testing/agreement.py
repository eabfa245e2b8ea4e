"""Law 5: every backend computes the float64 reference, as exactly as its precision can."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from seqmodels import backends as backend_choice
from seqmodels.layout import Layout
from seqmodels.mixers.base import Mixer
from seqmodels.testing.subject import (
    gradients,
    initial_state,
    law,
    leaf_state,
    leaves_of,
    prefix_layout,
    prepared,
    random_input,
    results,
    warm_state,
    weighted,
)
from seqmodels.testing.violation import Violated, check_close, exact_bound, max_error, require, scale_of

FLOOR_ULPS = 4  # one rounding each of input, product, sum and output


@law
def backend_agreement(
    layer: Mixer,
    *,
    backends: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16),
    autocast: torch.dtype | None = torch.bfloat16,
    device: torch.device | str = "cpu",
    batch_size: int = 2,
    length: int = 37,
    warmup: int = 5,
) -> dict[str, float]:
    """Law 5: each backend against the float64 reference, forward, backward, final state and step.

    Parameters, inputs and initial state are the same numbers in both precisions. The largest
    error e of each tensor must satisfy

        e <= 2 e_low + 4 eps m

    e_low is the error of the plain PyTorch form (of the reference, when that form is judged) in
    the same low precision on the same numbers, eps the dtype's epsilon, m the largest value of
    the tensor's group (outputs, states, gradients). In float64, where a backend takes it, it
    agrees with the reference to :func:`~seqmodels.testing.violation.exact_bound`.

    Args:
        backends: those to judge, each of which must run; by default ``auto`` and every one that
            can run this layer here.
        dtypes: of parameters and inputs, besides float64.
        autocast: judges float32 parameters under autocast to this dtype as well; None leaves it out.

    Returns:
        For each ``backend/dtype`` judged, its worst error as a fraction of its bound.
    """
    asked_for = None if backends is None else tuple(backends)
    judged: dict[str, float] = {}
    modes = [(dtype, False) for dtype in (torch.float64, *dtypes)]
    if autocast is not None:
        modes.append((autocast, True))
    for dtype, automatic in modes:
        low = prepared(layer, torch.float32 if automatic else dtype, device)
        exact = copy.deepcopy(low).double()
        x = random_input(low, batch_size, length)
        with backend_choice.backend("reference"):
            start = _start(low, batch_size, warmup, warmup + length + 1)
        layout = prefix_layout(low, batch_size, length, warmup)
        weights: dict[str, Tensor] = {}
        exact_start = None if start is None else start.to(dtype=torch.float64)
        truth = _trace(exact, x.double(), exact_start, layout, "reference", weights)
        runs: dict[str, dict[str, dict[str, Tensor]]] = {}
        for name in ("reference", "torch", *(usable_backends() if asked_for is None else asked_for)):
            try:
                with torch.autocast(x.device.type, dtype=dtype, enabled=automatic):
                    runs[name] = _trace(low, x, start, layout, name, weights)
            except backend_choice.BackendUnavailable:
                must_run = asked_for is not None and dtype != torch.float64
                if name in ("reference", "torch", "auto") or must_run:
                    raise
        label_of_mode = f"{'autocast ' if automatic else ''}{str(dtype).removeprefix('torch.')}"
        for name, run in runs.items():
            if name == "reference" or (asked_for is not None and name not in asked_for):
                continue
            label = f"{name}/{label_of_mode}"
            if dtype == torch.float64:
                bound = exact_bound(dtype, length)
                judged[label] = max(check_close(f"{label} {k}", v, truth[k], bound) for k, v in run.items())
                continue
            yardstick = runs["reference" if name == "torch" else "torch"]
            judged[label] = _worst_ratio(label, run, yardstick, truth, torch.finfo(dtype).eps)
    require(bool(judged), "no backend was judged")
    return judged


def _start(layer: Mixer, batch_size: int, warmup: int, capacity: int) -> Any:
    """A nonzero state; the zero state for prefix layers, whose first call must hold the prefix."""
    if layer.causality == "prefix":
        return initial_state(layer, batch_size, capacity)
    return warm_state(layer, batch_size, warmup, capacity)


def usable_backends() -> tuple[str, ...]:
    """``auto`` and the kernels that this machine can run."""
    return ("auto", *(name for name in ("cpu", "triton", "cuda") if backend_choice.missing(name) is None))


def _trace(
    layer: Mixer, x: Tensor, state: Any, layout: Layout | None, backend: str, weights: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Groups of named tensors: outputs, final state, gradients, and one step after the sequence."""
    with backend_choice.backend(backend):
        x = x.clone().requires_grad_()
        state = leaf_state(state)
        run = layer(x, state, layout=layout, return_state=state is not None)
        if run.state is not None:
            for (name, after), (_, before) in zip(run.state.tensors(), state.tensors(), strict=True):
                change = f"{after.dtype} from {before.dtype}"
                require(after.dtype == before.dtype, f"{backend}: state field {name!r} became {change}")
        values = results(run.y, run.state)
        for name, tensor in values.items():
            if tensor.is_floating_point() and name not in weights:
                weights[name] = torch.randn(tensor.shape, dtype=tensor.dtype, device=tensor.device).float().double()
        used = {name: weights[name].to(tensor.dtype) for name, tensor in values.items() if name in weights}
        found = gradients(layer, weighted(values, used), {"x": x, **leaves_of(state)})
        groups = {"output": {"y": values.pop("y")}, "state": values, "gradient": found}
        if run.state is not None:
            after = run.state.detach().clone()
            y_t = layer.step(x[:, -1].detach(), after)
            groups["step"] = {"y": y_t}
            groups["state after step"] = {k: v for k, v in results(y_t, after).items() if k != "y"}
    return groups


def _worst_ratio(label: str, run: Any, yardstick: Any, truth: Any, epsilon: float) -> float:
    worst = 0.0
    for group, tensors in truth.items():
        floor = FLOOR_ULPS * epsilon * scale_of(tensors)
        for name, exact in tensors.items():
            found, low = run[group][name], yardstick[group][name]
            require(
                found.dtype == low.dtype and found.shape == exact.shape,
                f"{label}: {group} {name} is {tuple(found.shape)} {found.dtype}; "
                f"expected {tuple(exact.shape)} {low.dtype}",
            )
            if not exact.is_floating_point():
                same = torch.equal(found, exact)
                require(same, f"{label}: {group} {name} is {found.tolist()}; expected {exact.tolist()}")
                continue
            error = max_error(found, exact)
            bound = 2 * max_error(low, exact) + floor
            if not error <= bound:
                raise Violated(
                    f"{label}: {group} {name} is {error:.3g} from the float64 reference; "
                    f"bound {bound:.3g} (2 x {max_error(low, exact):.3g} of the low-precision reference + {floor:.3g})"
                )
            worst = max(worst, error / bound if bound else 0.0)
    return worst
