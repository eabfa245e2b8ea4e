"""Kernels prove themselves before their first use on a GPU that nobody has checked.

Compilers have been silently wrong on new chips for months. So at the first use of an op's
``triton`` or ``cuda`` backend on an architecture outside :data:`CHECKED`, the op's small problems
(:mod:`seqmodels.ops.examples`) run forward and backward against the definition in float64. A kernel
that disagrees is refused by name; ``auto`` then takes the next backend and says why. It takes a
second or two a kernel, once a process, and never happens while a CUDA graph is captured: warm up first,
as for any capture.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from seqmodels.ops.examples import EXAMPLES, Arguments, Draw
from seqmodels.ops.tiles import device_properties

if TYPE_CHECKING:
    from seqmodels.ops.registration import Operator

# Architectures whose run of `pytest -m gpu` is committed in evals/results. None so far.
CHECKED: frozenset[str] = frozenset()
# A canary tells wrong from right, not good from better: kernels of the right function err by less than
# a third of this, a lost tile or a swapped operand by far more. The GPU check has the tight bounds.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}

logger = logging.getLogger("seqmodels")
_verdicts: dict[tuple[str, str, int | None], str | None] = {}
_running = False


def refusal(operator: Operator, backend: str, device: torch.device) -> str | None:
    """Why this op's kernels must not run on this GPU, or None. Runs the canary where it has not run yet."""
    global _running
    key = (operator.name, backend, device.index)
    if key in _verdicts:
        return _verdicts[key]
    if _running or operator.name not in EXAMPLES or torch.cuda.is_current_stream_capturing():
        return None
    target = device_properties(device.index).target
    if target in CHECKED:
        _verdicts[key] = None
        return None
    _running = True
    try:
        with torch.cuda.device(device):
            _verdicts[key] = verdict(operator, backend, device, target)
    finally:
        _running = False
    return _verdicts[key]


def verdict(operator: Operator, backend: str, device: torch.device, target: str) -> str | None:
    """Runs every example in float32 and bfloat16; what disagrees, in words."""
    for dtype in (torch.float32, torch.bfloat16):
        for number, arguments in enumerate(EXAMPLES[operator.name](Draw(dtype, device))):
            where = f"{operator.name} kernel of backend {backend!r} on {target}, {dtype}, example {number}"
            try:
                errors = relative_errors(operator, backend, arguments)
            except NotImplementedError:
                continue  # the kernel says itself that it does not take these arguments
            except Exception as error:
                return f"{where}: raised {type(error).__name__}: {error}. {_WHAT_NOW}"
            for name, error in errors.items():
                if not error <= TOLERANCE[dtype]:
                    return f"{where}: {name} is off by {error:.1e} of its norm from the float64 definition. {_WHAT_NOW}"
    logger.info("%s: the %r kernels agree with the definition on %s", operator.name, backend, target)
    return None


_WHAT_NOW = (
    "Use seqmodels.backend('torch'), another Triton or driver version, and please report it with `pytest -m gpu`"
)


def relative_errors(operator: Operator, backend: str, arguments: Arguments) -> dict[str, float]:
    """Relative error of every output, every updated state and every gradient of ``backend``.

    Raises:
        NotImplementedError: the backend does not take these arguments.
    """
    exact = results(operator, "reference", in_dtype(arguments, torch.float64))
    return compare(results(operator, backend, arguments), exact)


def compare(found: Sequence[tuple[str, Tensor]], exact: Sequence[tuple[str, Tensor]]) -> dict[str, float]:
    """Root mean square of each difference over that of the truth; infinite for what is not a number.

    A tensor that is small beside its kind (a gradient that is zero but for rounding) is measured against
    a hundredth of the largest of its kind: outputs, updated arguments, gradients.
    """
    sizes: dict[str, float] = {}
    for name, truth in exact:
        kind = name.split()[0]
        sizes[kind] = max(sizes.get(kind, 0.0), _size(truth))
    errors = {}
    for (name, truth), (_, value) in zip(exact, found, strict=True):
        error = _size(value.double() - truth.double())
        scale = max(_size(truth), 0.01 * sizes[name.split()[0]], 1e-30)
        errors[name] = error / scale if math.isfinite(error) else math.inf
    return errors


def _size(tensor: Tensor) -> float:
    return tensor.double().square().mean().sqrt().item() if tensor.numel() else 0.0


def results(operator: Operator, backend: str, arguments: Arguments) -> list[tuple[str, Tensor]]:
    """Outputs, written arguments, and gradients of the outputs summed with fixed random weights."""
    module = operator.module(backend)
    reason = getattr(module, "supports", lambda *_: None)(*arguments)
    if reason is not None:
        raise NotImplementedError(reason)
    written = [index for index in written_arguments(operator) if arguments[index] is not None]
    arguments = tuple(value.clone() if index in written else value for index, value in enumerate(arguments))
    outputs = operator._forward(*arguments, backend)
    outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
    public = outputs[: operator.outputs - operator.residuals]
    found = [(f"output {index}", output) for index, output in enumerate(public)]
    found += [(f"updated argument {index}", arguments[index]) for index in written]
    if operator.differentiable:
        gradients = _gradients(operator, backend, arguments, outputs, public)
        found += [
            (f"gradient to argument {index}", gradient)
            for index, gradient in zip(operator.differentiable, gradients, strict=True)
            if arguments[index] is not None
        ]
    return found


def _gradients(
    operator: Operator, backend: str, arguments: Arguments, outputs: Sequence[Tensor], public: Sequence[Tensor]
) -> Sequence[Tensor]:
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(out.shape, generator=generator).to(out.device, out.dtype) for out in public]
    kept = outputs[len(outputs) - operator.kept :] if operator.kept else ()
    return operator._backward(*weights, *arguments, *kept, backend)


def written_arguments(operator: Operator) -> list[int]:
    """Positions of the arguments that the op updates in place."""
    schema = operator.overload._schema.arguments
    return [index for index, argument in enumerate(schema) if argument.alias_info and argument.alias_info.is_write]


def in_dtype(arguments: Arguments, dtype: torch.dtype) -> tuple[Any, ...]:
    """The same numbers with every floating-point tensor in ``dtype``."""
    return tuple(
        value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value for value in arguments
    )
