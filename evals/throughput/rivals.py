"""Libraries that users run today, as callables on this library's tensors. Imported when a case wants them.

Each ``..._rivals`` function yields ``(name, make, facts)``: ``make()`` imports the rival and returns a
function of one input set; it may raise when the rival is missing or broken, which the runner reports.
``facts`` are fields of :class:`~evals.throughput.problem.Contestant`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Rival = tuple[str, Callable[[], Callable[[dict[str, Tensor]], Tensor]], dict[str, Any]]
SOFTMAX = {"same_function": False, "omits": "softmax attention of the same heads, not the same function"}


def require(module: str, package: str) -> None:
    """Raises ImportError that says what to install."""
    if importlib.util.find_spec(module) is None:
        raise ModuleNotFoundError(f"not installed (pip install {package})")


def sdpa(backend: str | None) -> Callable[[], Callable[[dict[str, Tensor]], Tensor]]:
    """Causal ``scaled_dot_product_attention`` on one of its backends; q and k are cut to v's head width."""

    def make() -> Callable[[dict[str, Tensor]], Tensor]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def run(tensors: dict[str, Tensor]) -> Tensor:
            q, k, v = (tensors[name].transpose(1, 2) for name in "qkv")
            grouped = q.shape[1] != k.shape[1]
            if backend is None:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)
            with sdpa_kernel([getattr(SDPBackend, backend)]):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped).transpose(1, 2)

        return run

    return make


def attention_rivals(device: torch.device) -> Iterator[Rival]:
    """PyTorch's attention by backend, FlexAttention, flash-attn."""
    if device.type == "cpu":
        yield "sdpa flash", sdpa("FLASH_ATTENTION"), {}
        yield "sdpa math", sdpa("MATH"), {}
        return
    for name in ("flash", "efficient", "cudnn"):
        yield f"sdpa {name}", sdpa(f"{name.upper()}_ATTENTION"), {}
    yield "flex attention", _flex, {}
    yield "flash-attn", _flash_attn, {}


def _flex() -> Callable[[dict[str, Tensor]], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled = torch.compile(flex_attention, dynamic=False)
    masks: dict[int, Any] = {}

    def run(tensors: dict[str, Tensor]) -> Tensor:
        q, k, v = (tensors[name].transpose(1, 2) for name in "qkv")
        length = q.shape[2]
        if length not in masks:
            masks[length] = create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, q.device.type)
        return compiled(q, k, v, block_mask=masks[length], enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)

    return run


def _flash_attn() -> Callable[[dict[str, Tensor]], Tensor]:
    require("flash_attn", "flash-attn")
    from flash_attn import flash_attn_func

    return lambda tensors: flash_attn_func(tensors["q"], tensors["k"], tensors["v"], causal=True)


def linear_attention_rivals(device: torch.device) -> Iterator[Rival]:
    """FLA's and mamba-ssm's chunked kernels on a GPU; softmax attention of the same heads everywhere."""
    if device.type == "cuda":
        yield "fla simple_gla", _fla_simple_gla, {}
        yield "mamba-ssm chunk_scan", _mamba_chunk_scan, {}
        yield "sdpa flash", narrow(sdpa("FLASH_ATTENTION")), SOFTMAX
        yield "sdpa cudnn", narrow(sdpa("CUDNN_ATTENTION")), SOFTMAX
    else:
        yield "sdpa flash", narrow(sdpa("FLASH_ATTENTION")), SOFTMAX


def narrow(make: Callable[[], Callable[[dict[str, Tensor]], Tensor]]) -> Callable[[], Any]:
    """Softmax attention with as many heads as v has, of v's width: v stands for q and k too."""

    def outer() -> Callable[[dict[str, Tensor]], Tensor]:
        run = make()

        return lambda tensors: run(dict.fromkeys("qkv", tensors["v"]))

    return outer


def _fla_simple_gla() -> Callable[[dict[str, Tensor]], Tensor]:
    require("fla", "flash-linear-attention")
    from fla.ops.simple_gla import chunk_simple_gla

    def run(tensors: dict[str, Tensor]) -> Tensor:
        heads = tensors["v"].shape[2]
        q, k = (_per_head(tensors[name], heads) for name in "qk")
        return chunk_simple_gla(q, k, tensors["v"], g=tensors["log_decay"], scale=1.0, output_final_state=True)[0]

    return run


def _mamba_chunk_scan() -> Callable[[dict[str, Tensor]], Tensor]:
    require("mamba_ssm", "mamba-ssm")
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    def run(tensors: dict[str, Tensor]) -> Tensor:
        # its kernel takes dt and a: e^{dt a} with a = -1 is the decay, and x dt is what enters the state
        dt = -tensors["log_decay"]
        a = -torch.ones(dt.shape[-1], device=dt.device)
        x = (tensors["v"].float() / dt.unsqueeze(-1)).to(tensors["v"].dtype)
        y, _ = mamba_chunk_scan_combined(x, dt, a, tensors["k"], tensors["q"], chunk_size=256, return_final_states=True)
        return y

    return run


def _per_head(tensor: Tensor, heads: int) -> Tensor:
    return tensor if tensor.shape[2] == heads else tensor.repeat_interleave(heads // tensor.shape[2], dim=2)


def short_conv_rivals(device: torch.device) -> Iterator[Rival]:
    """``F.conv1d`` with groups, as most implementations write it, and causal-conv1d."""
    yield "torch conv1d", lambda: _conv1d, {}
    if device.type == "cuda":
        yield "causal-conv1d", _causal_conv1d, {}


def _conv1d(tensors: dict[str, Tensor]) -> Tensor:
    x, weight = tensors["x"].transpose(1, 2), tensors["weight"]
    width, length = weight.shape[1], x.shape[2]
    y = F.conv1d(x, weight.unsqueeze(1), tensors["bias"], padding=width - 1, groups=weight.shape[0])
    return F.silu(y[..., :length]).transpose(1, 2)


def _causal_conv1d() -> Callable[[dict[str, Tensor]], Tensor]:
    require("causal_conv1d", "causal-conv1d")
    from causal_conv1d import causal_conv1d_fn

    def run(tensors: dict[str, Tensor]) -> Tensor:
        y = causal_conv1d_fn(tensors["x"].transpose(1, 2), tensors["weight"], tensors["bias"], activation="silu")
        return y.transpose(1, 2)

    return run


def no_rivals(device: torch.device) -> Iterator[Rival]:
    """Layers' own rows compare ops that no other library offers on its own."""
    return iter(())
