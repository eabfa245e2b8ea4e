"""Problems of the parts of hybrids: sparse global attention, and twins of the KV shift and of mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from evals.throughput.problem import Case, Cost
from evals.throughput.rivals import SOFTMAX, Rival, sdpa

Tensors = dict[str, Tensor]

# ---- sparse global attention: H heads of P, window W, G chosen tokens, blocks of S queries


def sparse_inputs(case: Case, generator: torch.Generator) -> Tensors:
    size, shape = case.sizes, (case.batch, case.length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=generator.device)

    heads = {name: normal(*shape, size["H"], size["P"]).to(case.torch_dtype) for name in "qkv"}
    # One number, whose shape says what the call needs to know beside the tensors.
    sizes = torch.empty(size["W"], size["G"], size["S"], device="meta")
    return {**heads, "scores": normal(*shape), "sizes": sizes}


def sparse(tensors: Tensors) -> Tensor:
    from seqmodels.ops.sparse_attention import sparse_attention

    window, num_globals, block = tensors["sizes"].shape
    return sparse_attention(
        *(tensors[name] for name in "qkv"), tensors["scores"], window=window, num_globals=num_globals, block=block
    )


def sparse_cost(case: Case) -> Cost:
    """Two products with every key a query can see; q, k, v and y once."""
    size, tokens = case.sizes, case.batch * case.length
    reach = min(case.length, size["W"] + size["G"])
    elements = tokens * size["H"] * size["P"]
    return Cost(4 * elements * reach, 4 * elements * case.torch_dtype.itemsize, tokens)


def sparse_backward_cost(case: Case) -> Cost:
    """Five products; q, k, v, y and dy are read, three gradients written."""
    forward = sparse_cost(case)
    return Cost(2.5 * forward.flops, 2 * forward.bytes, forward.tokens)


def sparse_rivals(device: torch.device) -> Iterator[Rival]:
    yield "sdpa causal", sdpa(None), {**SOFTMAX, "omits": "full causal attention of the same heads"}


# ---- layers beside the layer they extend


def twins(case: Case, layer: Any) -> Iterator[tuple[str, Callable[[], nn.Module], dict[str, object]]]:
    """What a layer is an addition to, or the dense layer of the same work."""
    from seqmodels.channel import SwiGLU
    from seqmodels.mixers import Attention

    if case.layer == "kv_shift_attention" and case.mode != "decode":
        sizes = {name: case.sizes[name] for name in ("num_heads", "num_kv_heads") if name in case.sizes}
        facts: dict[str, object] = {"same_function": False, "omits": "the shift: this library's attention without it"}
        yield "attention without the shift", lambda: Attention(case.sizes["d_model"], **sizes), facts
    if case.layer == "chunk_moe" and case.mode != "decode":
        hidden = case.sizes["experts_per_token"] * case.sizes["d_hidden"]
        facts = {"same_function": False, "omits": "routing: one dense SwiGLU of the same work for each token"}
        yield "dense SwiGLU of the same work", lambda: SwiGLU(case.sizes["d_model"], d_hidden=hidden), facts
