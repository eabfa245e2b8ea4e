"""One op, several implementations, registered once with ``torch.library``.

An :class:`Operator` puts every backend, the reference included, behind the registered op
``seqmodels::<name>``, so that compile, export and fake tensors see one opaque node and a
change of length recompiles nothing. Its gradient is an ``autograd.Function`` registered at
the Autograd key whose backward is a second registered op, ``seqmodels::<name>_backward``.

An implementation is a module with

* ``forward(*args)``: takes the schema's arguments without ``backend``, returns its outputs;
* ``backward(*grads, *args, *kept)``: ``kept`` are the residuals, or all outputs with
  ``keep_outputs``. Returns one tensor per differentiable argument
  (an empty one where the argument was None). A module without it is differentiated by autograd;
* ``supports(*args) -> str | None`` (optional): why it cannot take these arguments;
* ``BY_NAME_ONLY = True`` (optional): ``auto`` passes over it (a gradient that is not deterministic).

It is imported when it is first needed.
"""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from seqmodels import backends
from seqmodels.ops import canary

_library = torch.library.Library("seqmodels", "FRAGMENT")


OPERATORS: dict[str, Operator] = {}


class Operator:
    """A registered op with a choice of implementations.

    Args:
        name: the op becomes ``torch.ops.seqmodels.<name>``.
        arguments: schema of the arguments, e.g. ``"Tensor x, Tensor? bias, int width"``; a
            trailing ``str backend`` is added. In-place arguments (``Tensor(a!) state``) are
            allowed when ``differentiable`` is empty.
        outputs: number of tensors returned, residuals included.
        fake: ``fake(*args) -> outputs`` on fake tensors, without ``backend``.
        modules: backend name to import path of its implementation.
        differentiable: positions of the arguments that get a gradient; empty for an op that
            has none (decode steps).
        residuals: how many of the outputs, at the end, are kept for the backward and have no
            gradient of their own.
        keep_outputs: the backward gets every output, not only the residuals.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        *,
        outputs: int,
        fake: Callable[..., Any],
        modules: dict[str, str],
        differentiable: Sequence[int] = (),
        residuals: int = 0,
        keep_outputs: bool = False,
    ) -> None:
        self.name = name
        self.modules = modules
        self.differentiable = tuple(differentiable)
        self.residuals = residuals
        self.outputs = outputs
        self.kept = outputs if keep_outputs else residuals
        self._loaded: dict[str, ModuleType] = {}
        OPERATORS[name] = self
        returns = "Tensor" if outputs == 1 else "(" + ", ".join(["Tensor"] * outputs) + ")"
        _library.define(f"{name}({arguments}, str backend) -> {returns}")
        _library.impl(name, self._forward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"seqmodels::{name}", lambda *args: fake(*args[:-1]), lib=_library)
        self.overload = getattr(torch.ops.seqmodels, name).default
        if self.differentiable:
            self._register_gradient(arguments)

    def __call__(self, *args: Any) -> Any:
        """Runs the op on the backend in force."""
        return self.overload(*args, backends.requested_backend())

    # ---- choice of the implementation

    def module(self, backend: str) -> ModuleType:
        if backend not in self._loaded:
            self._loaded[backend] = importlib.import_module(self.modules[backend])
        return self._loaded[backend]

    def resolve(self, backend: str, args: Sequence[Any]) -> ModuleType:
        """The implementation for these arguments; raises :class:`BackendUnavailable` by name."""
        device_type = next(arg.device.type for arg in args if isinstance(arg, Tensor))
        if backend != "auto":
            reason = self._refusal(backend, device_type, args)
            if reason is not None:
                raise backends.BackendUnavailable(f"{self.name}: backend {backend!r} was asked for, but {reason}")
            return self.module(backend)
        reasons = []
        for candidate in backends.preference(device_type):
            if candidate not in self.modules:
                continue
            if backends.missing(candidate) is None and getattr(self.module(candidate), "BY_NAME_ONLY", False):
                continue
            reason = self._refusal(candidate, device_type, args)
            if reason is None:
                backends.announce(self.name, device_type, candidate, tuple(reasons))
                return self.module(candidate)
            reasons.append(f"not {candidate!r}: {reason}")
        raise backends.BackendUnavailable(f"{self.name}: no backend can run on {device_type}: {'; '.join(reasons)}")

    def _refusal(self, backend: str, device_type: str, args: Sequence[Any]) -> str | None:
        if backend not in self.modules:
            return f"this op has only {', '.join(self.modules)}"
        reason = backends.missing(backend)
        if reason is not None:
            return reason
        if backend == "cpu" and device_type != "cpu":
            return f"its tensors are on {device_type!r}; C++ kernels run on the CPU"
        if backend == "triton" and device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            return (
                f"its tensors are on {device_type!r}; Triton kernels run on a GPU (TRITON_INTERPRET=1 interprets them)"
            )
        if backend == "cuda" and device_type != "cuda":
            return f"its tensors are on {device_type!r}; CUDA kernels run on a GPU"
        inputs = [args[index] for index in self.differentiable[:2] or (0,)]
        if backend in ("triton", "cuda") and any(isinstance(x, Tensor) and x.numel() == 0 for x in inputs):
            return "there is nothing to launch for an empty tensor"
        module = self.module(backend)
        supports = getattr(module, "supports", None)
        reason = None if supports is None else supports(*args)
        if reason is None and device_type == "cuda" and backend in ("triton", "cuda"):
            device = next(arg.device for arg in args if isinstance(arg, Tensor))
            reason = canary.refusal(self, backend, device)
        return reason

    # ---- kernels

    def _forward(self, *args: Any) -> Any:
        with _without_autocast(args), _on_device(args):
            return self.resolve(args[-1], args[:-1]).forward(*args[:-1])

    def _backward(self, *args: Any) -> tuple[Tensor, ...]:
        *values, backend = args
        num_grads = self.outputs - self.residuals
        grads, inputs = values[:num_grads], values[num_grads : len(values) - self.kept]
        with _without_autocast(inputs), _on_device(inputs):
            module = self.resolve(backend, inputs)
            if hasattr(module, "backward"):
                # Contiguous, as the fake backward promises: compiled code reads the strides it was told.
                return tuple(gradient.contiguous() for gradient in module.backward(*values))
            return self._differentiate(module.forward, grads, inputs)

    def _differentiate(
        self, forward: Callable[..., Any], grads: Sequence[Tensor], inputs: Sequence[Any]
    ) -> tuple[Tensor, ...]:
        """Gradient of an implementation written in plain PyTorch, by recomputing it under autograd."""
        leaves = list(inputs)
        with torch.enable_grad(), _autograd_dispatch():
            for index in self.differentiable:
                if leaves[index] is not None:
                    leaves[index] = leaves[index].detach().requires_grad_()
            outputs = forward(*leaves)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs[: len(grads)]
            wanted = [leaves[index] for index in self.differentiable if leaves[index] is not None]
            pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
            found = iter(
                torch.autograd.grad([out for out, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True)
            )
        result = []
        for index in self.differentiable:
            leaf = leaves[index]
            if leaf is None:
                result.append(grads[0].new_empty(0))
                continue
            gradient = next(found)
            result.append(torch.zeros_like(leaf) if gradient is None else gradient.contiguous())
        return tuple(result)

    def _register_gradient(self, arguments: str) -> None:
        name, num_grads = self.name, self.outputs - self.residuals
        grad_schema = ", ".join(f"Tensor grad_{index}" for index in range(num_grads))
        kept_schema = "".join(f", Tensor kept_{index}" for index in range(self.kept))
        returns = (
            "Tensor" if len(self.differentiable) == 1 else "(" + ", ".join(["Tensor"] * len(self.differentiable)) + ")"
        )
        single = len(self.differentiable) == 1
        _library.define(f"{name}_backward({grad_schema}, {arguments}{kept_schema}, str backend) -> {returns}")

        def backward_kernel(*args: Any) -> Any:
            result = self._backward(*args)
            return result[0] if single else result

        def backward_fake(*args: Any) -> Any:
            inputs = args[num_grads:]
            result = tuple(
                args[0].new_empty(0)
                if inputs[index] is None
                else torch.empty_like(inputs[index], memory_format=torch.contiguous_format)
                for index in self.differentiable
            )
            return result[0] if single else result

        _library.impl(f"{name}_backward", backward_kernel, "CompositeExplicitAutograd")
        torch.library.register_fake(f"seqmodels::{name}_backward", backward_fake, lib=_library)
        backward_overload = getattr(torch.ops.seqmodels, f"{name}_backward").default
        overload, positions, num_kept = self.overload, self.differentiable, self.kept

        class Gradient(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                with torch._C._AutoDispatchBelowAutograd():
                    outputs = overload(*args)
                outputs = (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)
                residuals = outputs[num_grads:]
                tensors = [arg for arg in args if isinstance(arg, Tensor)]
                ctx.save_for_backward(*tensors, *outputs[len(outputs) - num_kept :])
                ctx.template = [None if isinstance(arg, Tensor) else (arg,) for arg in args]
                if residuals:
                    ctx.mark_non_differentiable(*residuals)
                return outputs[0] if len(outputs) == 1 else outputs

            @staticmethod
            def backward(ctx: Any, *grads: Any) -> Any:
                saved = iter(ctx.saved_tensors)
                args = [next(saved) if entry is None else entry[0] for entry in ctx.template]
                with torch.no_grad():
                    gradients = backward_overload(*grads[:num_grads], *args[:-1], *saved, args[-1])
                gradients = (gradients,) if isinstance(gradients, Tensor) else gradients
                if torch.is_grad_enabled():  # create_graph=True
                    gradients = _FirstDerivative.apply(name, len(gradients), *gradients, *grads, *ctx.saved_tensors)
                result: list[Any] = [None] * len(args)
                for position, gradient in zip(positions, gradients, strict=True):
                    if args[position] is not None:
                        result[position] = gradient
                return tuple(result)

        Gradient.__name__ = f"{name}_gradient"

        def autograd_kernel(*args: Any) -> Any:
            if not torch.is_grad_enabled():
                with torch._C._AutoDispatchBelowAutograd():
                    return overload(*args)
            return Gradient.apply(*args)

        _library.impl(name, autograd_kernel, "Autograd")


class _FirstDerivative(torch.autograd.Function):
    """Passes gradients on and refuses to differentiate them: they depend on the tensors behind them, but a
    backward op has no gradient of its own (``once_differentiable`` would take them for constants)."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.name = name
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{ctx.name} is differentiable once, and its gradient was asked for a gradient (create_graph=True); "
            "leave create_graph out, or write the definition (the op's reference.py) in PyTorch operations"
        )


@contextlib.contextmanager
def _autograd_dispatch() -> Iterator[None]:
    """Lets autograd record inside an op. A compiled graph without a backward of its own runs its
    ops below the autograd keys, where recording would give no gradient and no error."""
    key = torch._C.DispatchKey
    with contextlib.ExitStack() as stack:
        for entry in (key.AutogradFunctionality, key.ADInplaceOrView):
            stack.enter_context(torch._C._SetExcludeDispatchKeyGuard(entry, False))
        yield


def _without_autocast(args: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """Autocast acts in front of an op (:func:`cast_inputs`), never on the operations inside it."""
    device_type = next(arg.device.type for arg in args if isinstance(arg, Tensor))
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _on_device(args: Sequence[Any]) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensors' GPU the current one: kernels are launched on that, whatever their pointers say."""
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype autocast asks for on this device, or None outside autocast.

    Ops cast their matrix inputs with it; decays, phases and carried state stay as they are.
    """
    if torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def cast_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """``tensors`` in autocast's dtype (unchanged outside autocast; float64 is never lowered)."""
    dtype = autocast_dtype(tensors[0].device.type)
    if dtype is None:
        return tensors
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Carried state is float32, or float64 beside float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
