"""Laws 3 and 4: no token hears the future (causality), no sample hears another or its padding (batch)."""

from __future__ import annotations

import torch
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.mixers.base import Mixer
from seqmodels.testing.subject import (
    initial_state,
    is_stateful,
    law,
    prefix_layout,
    prepared,
    random_input,
    results,
    warm_state,
)
from seqmodels.testing.violation import check_close, check_exactly_zero, exact_bound, require


@law
def causality(
    layer: Mixer,
    *,
    batch_size: int = 2,
    length: int = 29,
    prefix: int = 5,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> None:
    """Law 3: what comes from token t on leaves outputs before t as they were.

    Changed to rounding only when x changes from t on (the order of a sum may depend on shapes),
    and the gradient of each output to later inputs is exactly zero; within rounding of the whole gradient
    where the layer says ``exactly_causal = False``. In prefix layers t lies behind the prefix of
    ``prefix`` tokens. Bidirectional layers are exempt.
    Bound: :func:`~seqmodels.testing.violation.exact_bound`.
    """
    if layer.causality == "bidirectional":
        return
    layer = prepared(layer, dtype, device)
    first = prefix if layer.causality == "prefix" else 1
    layout = prefix_layout(layer, batch_size, length, prefix)
    x = random_input(layer, batch_size, length).requires_grad_()
    y = layer(x, layout=layout).y
    bound = exact_bound(dtype, length)
    for t in sorted({first, first + 1, length // 2, length - 2, length - 1}):
        changed = torch.cat([x[:, :t], 10 * random_input(layer, batch_size, length - t)], dim=1).detach()
        other = layer(changed, layout=layout).y
        check_close(f"x changed from token {t} on", {"y before": other[:, :t]}, {"y before": y[:, :t]}, bound)
        seen = y[:, :t]
        (gradient,) = torch.autograd.grad((seen * torch.randn_like(seen)).sum(), x, retain_graph=True)
        where = f"from outputs before token {t} to inputs from it on"
        if getattr(layer, "exactly_causal", True):
            check_exactly_zero(where, gradient[:, t:])
        else:
            leak, size = gradient[:, t:].abs().max().item(), gradient.abs().max().item()
            require(leak <= bound * size, f"{where}: the gradient is {leak:.3g}; bound {bound * size:.3g}")


@law
def batch(
    layer: Mixer,
    *,
    batch_size: int = 3,
    length: int = 21,
    warmup: int = 4,
    steps: int = 3,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> None:
    """Law 4: a sample alone = the sample in a batch; left padding leaks nothing.

    Forward in training and evaluation mode, ``step``, and a batch reordered through
    ``State.select``. Padding holds large values; outputs, final states and the steps that follow
    are those of the prompt alone, and the gradient to padding is exactly zero.
    Bound: :func:`~seqmodels.testing.violation.exact_bound`.
    """
    layer = prepared(layer, dtype, device)
    bound = exact_bound(dtype, length)
    x = random_input(layer, batch_size, length)
    next_tokens = random_input(layer, batch_size, steps)
    state = warm_state(layer, batch_size, warmup, warmup + length + steps)
    for training in (True, False):
        layer.train(training)
        _check_alone(layer, x, next_tokens, state, bound)
    _check_left_padding(layer, x, next_tokens, bound)


def _check_alone(layer: Mixer, x: Tensor, next_tokens: Tensor, state, bound: float) -> None:
    mode = "training" if layer.training else "evaluation"
    stateful = state is not None
    together = layer(x, state, return_state=stateful)
    order = torch.arange(x.shape[0] - 1, -1, -1, device=x.device)
    reordered = layer(x[order], state.select(order) if stateful else None, return_state=stateful)
    expected = results(together.y[order], together.state.select(order) if stateful else None)
    check_close(f"batch in reverse order, {mode} mode", results(reordered.y, reordered.state), expected, bound)
    stepped = _steps(layer, next_tokens, together.state.detach().clone()) if stateful else next_tokens
    for row in range(x.shape[0]):
        rows = torch.tensor([row], device=x.device)
        alone = layer(x[rows], state.select(rows) if stateful else None, return_state=stateful)
        where = f"sample {row} of {x.shape[0]}, {mode} mode"
        expected = results(alone.y, alone.state)
        check_close(
            where, results(together.y[rows], together.state.select(rows) if stateful else None), expected, bound
        )
        if stateful:
            own = _steps(layer, next_tokens[rows], alone.state.detach().clone())
            check_close(f"steps of {where}", {"y": stepped[rows]}, {"y": own}, bound)


def _steps(layer: Mixer, tokens: Tensor, state) -> Tensor:
    return torch.stack([layer.step(tokens[:, t], state) for t in range(tokens.shape[1])], dim=1)


def _check_left_padding(layer: Mixer, x: Tensor, next_tokens: Tensor, bound: float) -> None:
    batch_size, length = x.shape[:2]
    stateful = is_stateful(layer)
    lengths = [max(1, length - 7 * row) for row in range(batch_size)]
    lengths[-1] = 1
    prefixes = [(entry + 1) // 2 for entry in lengths] if layer.causality == "prefix" else None
    layout = Layout.left_padded(lengths, length, prefix_lengths=prefixes, device=x.device)
    x = torch.where(layout.valid[..., None], x, 1000 * x).requires_grad_()
    capacity = length + next_tokens.shape[1]
    padded = layer(x, initial_state(layer, batch_size, capacity), layout=layout, return_state=stateful)
    require(bool(torch.isfinite(padded.y).all()), "left padding: outputs at padding are not finite")
    losses = padded.y.new_zeros(())
    for row, entry in enumerate(lengths):
        rows = torch.tensor([row], device=x.device)
        single = None if prefixes is None else Layout.full(1, entry, prefix_lengths=[prefixes[row]], device=x.device)
        alone = layer(x[rows, -entry:], initial_state(layer, 1, capacity), layout=single, return_state=stateful)
        found = results(padded.y[rows, -entry:], padded.state.select(rows) if stateful else None)
        check_close(f"row {row}, left padded to {length} from {entry}", found, results(alone.y, alone.state), bound)
        losses = losses + (padded.y[row, -entry:] * torch.randn_like(padded.y[row, -entry:])).sum()
        if stateful:
            after = _steps(layer, next_tokens[rows], padded.state.select(rows).detach())
            own = _steps(layer, next_tokens[rows], alone.state.detach().clone())
            check_close(f"steps after row {row}, left padded from {entry}", {"y": after}, {"y": own}, bound)
    (gradient,) = torch.autograd.grad(losses, x)
    check_exactly_zero("from outputs to left padding", gradient * ~layout.valid[..., None])
