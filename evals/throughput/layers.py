"""Problems of whole layers: projections, convolution, recurrence, norm and all."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqmodels
from evals.throughput import hybrid
from evals.throughput.problem import Case, Contestant, Cost, Problem, bound_from, relative_error, tensors_of
from evals.throughput.rivals import require
from evals.throughput.state_space import s4d_rival
from seqmodels.channel import CHANNELS
from seqmodels.models.arguments import build_layer
from seqmodels.models.initialization import construction

CHECKED_LENGTH, CHECKED_BATCH = 256, 4
STEPS_BETWEEN_RESETS = 64


class Instance:
    """One layer ready to run: module, its inputs, its decode loop. ``models`` builds the same for whole models.

    Args:
        module: what obeys the contract of ``Mixer`` (forward, step, init_state, state_bytes).
        draw: ``draw(generator, batch, length)``: random inputs of a forward.
        primary: the tensor of ``module(x)`` that is compared.
    """

    def __init__(
        self,
        module: nn.Module,
        draw: Callable[[torch.Generator, int, int], Tensor],
        primary: Callable[[Any], Tensor],
    ) -> None:
        self.module, self.draw, self.primary = module, draw, primary

    def forward(self, module: nn.Module, mode: str) -> Callable[[Mapping[str, Tensor]], Any]:
        """What is timed: y, y and state, or y and all gradients."""
        if mode == "forward":
            return torch.no_grad()(lambda tensors: self.primary(module(tensors["x"])))
        if mode == "prefill":

            @torch.no_grad()
            def prefill(tensors: Mapping[str, Tensor]) -> list[Tensor]:
                out = module(tensors["x"], return_state=True)
                return [self.primary(out), *(tensor for _, tensor in out.state.tensors() if tensor.is_floating_point())]

            return prefill
        wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]

        def forward_and_backward(tensors: Mapping[str, Tensor]) -> list[Tensor]:
            y = self.primary(module(tensors["x"]))
            leaves = [tensors["x"], *wanted] if tensors["x"].requires_grad else wanted
            return [y, *torch.autograd.grad(y, leaves, tensors["cotangent"].to(y.dtype), materialize_grads=True)]

        return forward_and_backward


def build(case: Case, device: torch.device) -> Problem:
    """The problem of a layer case on a device."""
    torch.manual_seed(0)
    width = case.sizes["d_model"]
    options = {name: value for name, value in case.sizes.items() if name != "d_model"}
    with construction(device, case.torch_dtype):
        layer = build_layer(case.layer, width, options, case.name)
    instance = Instance(
        layer,
        lambda generator, batch, length: torch.randn(batch, length, width, generator=generator, device=device).to(
            case.torch_dtype
        ),
        lambda out: out[0] if isinstance(out, tuple) else out,
    )
    return problem_of(case, device, instance, _rivals(case, layer, device))


def problem_of(case: Case, device: torch.device, instance: Instance, rivals: Iterator[Any]) -> Problem:
    """The common part of layer and model problems."""
    if case.mode == "decode":
        return _decode_problem(case, device, instance, rivals)
    training = case.mode == "forward+backward"

    def inputs(seed: int, length: int = case.length, batch: int = case.batch) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        x = instance.draw(generator, batch, length)
        if not training:
            return {"x": x}
        x = x.requires_grad_(x.is_floating_point())
        with torch.no_grad():
            shape = instance.primary(instance.module(x[:1, :1])).shape
        cotangent = torch.randn(batch, length, shape[-1], generator=generator, device=device)
        return {"x": x, "cotangent": cotangent.to(case.torch_dtype)}

    short = inputs(12345, min(case.length, CHECKED_LENGTH), min(case.batch, CHECKED_BATCH))
    definition = functools.cache(lambda: _definition(instance, case.mode, short, case.torch_dtype))
    contestants, skipped = [], {}
    for name in ("auto", "torch") if case.rivals else ("auto",):
        contestants.append(Contestant(name, _on_backend(instance.forward(instance.module, case.mode), name), ours=True))
    for name, make, facts in rivals if case.rivals else ():
        try:
            rival = instance.forward(make(), "forward" if case.mode == "prefill" else case.mode)
            rival(short)
        except Exception as error:  # a broken rival is reported and left out, whatever it raises
            skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            continue
        contestants.append(Contestant(name, rival, **facts))

    def check(contestant: Contestant) -> tuple[float, float]:
        exact, bound = definition()
        found = tensors_of(contestant.run(short))
        shared = len(found) if contestant.ours else 1 + (training and short["x"].requires_grad)
        return relative_error(found[:shared], exact[:shared]), bound

    cost = _cost(case, instance.module, training)
    state_bytes = instance.module.state_bytes(case.length, batch_size=case.batch)  # type: ignore[operator]
    return Problem(inputs, contestants, check, cost, state_bytes, skipped)


def _definition(
    instance: Instance, mode: str, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[list[Tensor], float]:
    """Float64 results on the reference backend, and the bound on errors in the layer's own dtype."""
    wide = copy.deepcopy(instance.module).double()
    exact_inputs = {
        name: tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    exact = [t.detach() for t in tensors_of(_on_backend(instance.forward(wide, mode), "reference")(exact_inputs))]
    run = instance.forward(instance.module, mode)
    forms = (tensors_of(_on_backend(run, backend)(tensors)) for backend in ("reference", "torch"))
    return exact, bound_from(*(relative_error(form, exact) for form in forms), dtype=dtype)


def _on_backend(function: Callable[[Any], Any], name: str) -> Callable[[Any], Any]:
    def run(tensors: Any) -> Any:
        with seqmodels.backend(name):
            return function(tensors)

    return run


def _cost(case: Case, module: nn.Module, training: bool) -> Cost:
    """The layer's own count of operations (three times that with the backward); weights and activations once."""
    factor = 3 if training else 1
    width = case.torch_dtype.itemsize
    weights = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    activations = 2 * case.batch * case.length * case.sizes["d_model"] * width
    flops = case.batch * module.flops(case.length)  # type: ignore[operator]
    return Cost(factor * flops, factor * (weights + activations), case.batch * case.length)


# ---- decode


def _decode_problem(case: Case, device: torch.device, instance: Instance, rivals: Iterator[Any]) -> Problem:
    module = instance.module

    def inputs(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        return {"x": instance.draw(generator, case.batch, 1)[:, 0]}

    contestants, skipped = [], {}
    warm = _warm_state(case, instance, device)
    for name in ("auto", "torch") if case.rivals else ("auto",):
        loop = _on_backend(decode_loop(module, warm.clone()), name)
        contestants.append(Contestant(name, loop, ours=True))
    for name, make, facts in rivals if case.rivals else ():
        try:
            step = make().decode_loop(case.batch, case.length)
            step(inputs(0))
        except Exception as error:  # a broken rival is reported and left out, whatever it raises
            skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
            continue
        contestants.append(Contestant(name, step, **facts))

    def check(contestant: Contestant) -> tuple[float, float]:
        return _decode_error(case, instance, device, contestant.name)

    weights = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    state = module.state_bytes(case.length, batch_size=case.batch)  # type: ignore[operator]
    growing = state != module.state_bytes(2 * case.length, batch_size=case.batch)  # type: ignore[operator]
    flops = case.batch * _step_products(module) + (2 if growing else 4) * _state_elements(module, case)
    cost = Cost(flops, weights + (1 if growing else 2) * state, case.batch)  # a cache is read, a state read and written
    return Problem(inputs, contestants, check, cost, state, skipped)


def _step_products(module: nn.Module) -> int:
    """Operations of the matrix products of one token: projections, and a head that is the embedding."""
    linear = [part.weight for part in module.modules() if isinstance(part, nn.Linear)]
    head = getattr(module, "head_weight", None)
    if head is not None and all(head is not weight for weight in linear):
        linear.append(head)
    return 2 * sum(weight.numel() for weight in linear)


def _state_elements(module: nn.Module, case: Case) -> int:
    """Numbers in the state: each is decayed, added to and read (4 operations), or a cache's entry read (2)."""
    state = module.init_state(case.batch, max_length=case.length, device="meta")  # type: ignore[operator]
    return sum(tensor.numel() for _, tensor in state.tensors() if tensor.is_floating_point())


def _warm_state(case: Case, instance: Instance, device: torch.device) -> Any:
    """The state after ``case.length`` random tokens, with room for the steps between two resets."""
    generator = torch.Generator(device).manual_seed(1)
    state = instance.module.init_state(case.batch, max_length=case.length + STEPS_BETWEEN_RESETS)  # type: ignore[operator]
    with torch.no_grad():
        x = instance.draw(generator, case.batch, case.length)
        return instance.module(x, state, return_state=True).state


def decode_loop(module: nn.Module, state: Any) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """One step a call; positions are set back before the cache is full, so that every call is alike.

    On a GPU they are set back in every call, because calls may be captured in a graph of any number of them.
    """
    positions = [(tensor, tensor.clone()) for _, tensor in state.tensors() if not tensor.is_floating_point()]
    calls, every = 0, STEPS_BETWEEN_RESETS
    if any(tensor.is_cuda for tensor, _ in positions):
        every = 1

    @torch.no_grad()
    def step(tensors: Mapping[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls % every == 0:
            for tensor, start in positions:
                tensor.copy_(start)
        return module.step(tensors["x"], state)  # type: ignore[operator]

    return step


def _decode_error(case: Case, instance: Instance, device: torch.device, backend: str) -> tuple[float, float]:
    """Steps against a float64 forward on the reference over the same tokens."""
    module, generator = instance.module, torch.Generator(device).manual_seed(2)
    batch = min(case.batch, CHECKED_BATCH)
    x = instance.draw(generator, batch, 16)
    wide = copy.deepcopy(module).double()
    exact_x = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        with seqmodels.backend("reference"):
            exact = instance.primary(wide(exact_x))
            own = instance.primary(module(x))
        state = module.init_state(batch, max_length=x.shape[1])  # type: ignore[operator]
        with seqmodels.backend(backend):
            steps = torch.stack([module.step(x[:, t], state) for t in range(x.shape[1])], dim=1)  # type: ignore[operator]
    return relative_error([steps], [exact]), bound_from(relative_error([own], [exact]), dtype=case.torch_dtype)


# ---- rivals


class SdpaLayer(nn.Module):
    """Attention as one writes it in PyTorch: one projection, SDPA, one projection; a cache filled in place."""

    def __init__(self, d_model: int, head_dim: int = 64) -> None:
        super().__init__()
        self.head_dim, self.heads = head_dim, d_model // head_dim
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))

    def decode_loop(self, batch: int, length: int) -> Callable[[Mapping[str, Tensor]], Tensor]:
        like = self.qkv.weight
        keys, values = (like.new_zeros(batch, self.heads, length, self.head_dim).normal_() for _ in range(2))

        @torch.no_grad()
        def step(tensors: Mapping[str, Tensor]) -> Tensor:
            q, k, v = self.qkv(tensors["x"]).unflatten(-1, (3, self.heads, 1, self.head_dim)).unbind(1)
            keys[:, :, -1:] = k
            values[:, :, -1:] = v
            return self.out(F.scaled_dot_product_attention(q, keys, values).flatten(1))

        return step


def _rivals(case: Case, layer: nn.Module, device: torch.device) -> Iterator[Any]:
    width = case.sizes["d_model"]
    made = {"device": device, "dtype": case.torch_dtype}
    if case.layer == "mamba2":
        for chunk in (64, 256):
            yield f"HF Mamba2Mixer chunk {chunk}", lambda chunk=chunk: hf_mamba2(layer, width, chunk).to(**made), {}
        yield "mamba-ssm Mamba2", lambda: _mamba_ssm("mamba2", "Mamba2", layer, width).to(**made), {}
    if case.layer == "mamba3":
        yield "mamba-ssm Mamba3", lambda: _mamba_ssm("mamba3", "Mamba3", layer, width).to(**made), {}
    if case.layer == "s4d" and case.mode != "decode":
        yield s4d_rival(layer)
    for name, make, facts in hybrid.twins(case, layer):
        yield name, lambda make=make: make().to(**made), facts
    if case.layer in CHANNELS:
        return
    softmax = {"same_function": False, "omits": "softmax attention of the same width, not the same function"}
    yield "sdpa layer", lambda: SdpaLayer(width).to(**made), softmax


def hf_mamba2(layer: Any, width: int, chunk: int) -> nn.Module:
    """Hugging Face's layer with this layer's weights."""
    require("transformers", "transformers")
    from transformers import Mamba2Config, logging
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=width,
        num_heads=layer.num_heads,
        head_dim=layer.inner // layer.num_heads,
        state_size=layer.d_state,
        n_groups=layer.num_groups,
        expand=layer.inner // width,
        conv_kernel=layer.d_conv,
        chunk_size=chunk,
        num_hidden_layers=1,
        layer_norm_epsilon=1e-5,
    )
    logging.set_verbosity_error()  # it says at length that its fused kernels are absent: the rows' versions show it
    mixer = Mamba2Mixer(config, 0)
    mixer.load_state_dict(layer.state_dict())
    return mixer


def _mamba_ssm(module: str, name: str, layer: Any, width: int) -> nn.Module:
    """mamba-ssm's layer with this layer's weights (both keep the released parameter names)."""
    require("mamba_ssm", "mamba-ssm")
    rival = getattr(importlib.import_module(f"mamba_ssm.modules.{module}"), name)(width)
    rival.load_state_dict(layer.state_dict())
    return rival
