"""Linear attention with its feature map inside: Hedgehog's exponentials of 2 f features, Based's packed Taylor."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from evals.throughput.problem import Case, Cost
from evals.throughput.rivals import SOFTMAX, Rival, narrow, require, sdpa

Tensors = dict[str, Tensor]

# heads H, value width P, key width D; Hedgehog has f features of either sign a head (D of them where f is not given)


def _features(case: Case) -> int:
    width = case.sizes["D"]
    if case.layer.endswith("taylor"):
        return 1 + width + width * (width + 1) // 2
    return 2 * case.sizes.get("f", width)


def _prefixed(case: Case) -> bool:
    return "prefix" in case.layer


def inputs(case: Case, generator: torch.Generator) -> Tensors:
    size, dtype, device = case.sizes, case.torch_dtype, generator.device

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device) * scale

    grid, width = (case.batch, case.length, size["H"]), size["D"]
    tensors = {name: randn(*grid, width).to(dtype) for name in "qk"} | {"v": randn(*grid, size["P"]).to(dtype)}
    if _prefixed(case):  # the encoder's own keys and values, over the first half
        prefix = (case.batch, (case.length + 1) // 2, size["H"])
        tensors |= {"ke": randn(*prefix, width).to(dtype), "ve": randn(*prefix, size["P"]).to(dtype)}
    if case.layer.endswith("taylor"):
        return tensors
    weights = {name: randn(size["H"], width, size.get("f", width), scale=width**-0.5) for name in ("wq", "wk")}
    return tensors | weights


def run(tensors: Tensors) -> Tensor:
    from seqmodels.ops.feature_attention import feature_attention, feature_state

    name = "hedgehog_exp" if "wq" in tensors else "taylor"
    q, k, v = (tensors[key] for key in "qkv")
    prefix = feature_state(tensors["ke"], tensors["ve"], feature_map=name) if "ke" in tensors else None
    return feature_attention(q, k, v, tensors.get("wq"), tensors.get("wk"), feature_map=name, initial_state=prefix)[0]


def cost(case: Case) -> Cost:
    """4 F P + Q (F + P) operations a token and head with chunks of Q = 64, and 4 D f for Hedgehog's two matrices;
    Taylor's scores cost Q D. Inputs and y once; a prefix of half the tokens adds its keys and values, and 2 F P."""
    size, features = case.sizes, _features(case)
    taylor, width = case.layer.endswith("taylor"), size["D"]
    scores = width if taylor else features
    products = 4 * features * size["P"] + 64 * (scores + size["P"]) + (0 if taylor else 2 * width * features)
    tokens, bytes_each = case.batch * case.length * size["H"], 4 if case.dtype == "float32" else 2
    moved = 2 * tokens * (width + size["P"]) * bytes_each
    if _prefixed(case):
        return Cost(tokens * (products + features * size["P"]), moved * 5 / 4, case.batch * case.length)
    return Cost(tokens * products, moved, case.batch * case.length)


def backward_cost(case: Case) -> Cost:
    """10 F P + Q (3 F + 2 P): features, states and scores are made again; 12 D f for Hedgehog's matrices.
    A prefix reads its keys and values once more and writes their gradients: 4 F P."""
    size, features = case.sizes, _features(case)
    taylor, width = case.layer.endswith("taylor"), size["D"]
    scores = width if taylor else features
    products = 10 * features * size["P"] + 64 * (3 * scores + 2 * size["P"]) + (0 if taylor else 6 * width * features)
    tokens, bytes_each = case.batch * case.length * size["H"], 4 if case.dtype == "float32" else 2
    moved = tokens * (4 * width + 3 * size["P"]) * bytes_each
    if _prefixed(case):
        products, moved = products + 2 * features * size["P"], moved + tokens * (width + size["P"]) * bytes_each
    return Cost(tokens * products, moved, case.batch * case.length)


def rivals(device: torch.device) -> Iterator[Rival]:
    """The same function with its features in memory, flash-linear-attention's on a GPU, softmax attention."""
    yield "features in memory", _unfused, {}
    if device.type == "cuda":
        yield "fla", _fla, {}
    yield "sdpa flash", narrow(sdpa("FLASH_ATTENTION")), SOFTMAX


def prefix_rivals(device: torch.device) -> Iterator[Rival]:
    """Causal softmax attention of the same heads, as the paper compares; no other library has an installable one."""
    yield "sdpa flash", narrow(sdpa("FLASH_ATTENTION")), SOFTMAX


def _fla() -> Callable[[Tensors], Tensor]:
    """Based's own kernel for Taylor; for Hedgehog the chunked kernel on features in memory."""
    require("fla", "flash-linear-attention")
    from fla.ops.based import parallel_based
    from fla.ops.linear_attn import chunk_linear_attn

    features = _features_of()

    def run(tensors: Tensors) -> Tensor:
        q, k, v = (tensors[key] for key in "qkv")
        if "wq" not in tensors:
            return parallel_based(q, k, v, scale=q.shape[-1] ** -0.5, use_norm=True)
        phi_q, phi_k = features(tensors)
        return chunk_linear_attn(phi_q, phi_k, v, scale=1.0, normalize=True)[0]

    return run


def _unfused() -> Callable[[Tensors], Tensor]:
    from seqmodels.ops.linear_attention import linear_attention

    features = _features_of()

    def run(tensors: Tensors) -> Tensor:
        phi_q, phi_k = features(tensors)
        options = {"epsilon": 1e-30} if "wq" in tensors else {}
        return linear_attention(phi_q, phi_k, tensors["v"], normalize=True, **options)[0]

    return run


def _features_of() -> Callable[[Tensors], tuple[Tensor, Tensor]]:
    """phi(q) and phi(k) in memory, in v's dtype."""
    from seqmodels.mixers.feature_maps import HedgehogExp, Taylor, paired_features

    def features(tensors: Tensors) -> tuple[Tensor, Tensor]:
        q, k, v = (tensors[key] for key in "qkv")
        heads, width = q.shape[2:]
        if "wq" not in tensors:
            taylor = Taylor(heads, width)
            return taylor(q), taylor(k)
        maps = []
        for name in ("wq", "wk"):
            one = HedgehogExp(heads, width, feature_dim=tensors[name].shape[2], init="kaiming")
            del one.weight
            one.weight = tensors[name]  # an input, for its gradient
            maps.append(one)
        phi_q, phi_k = paired_features(maps[0], maps[1], q, k)
        return phi_q.to(v.dtype), phi_k.to(v.dtype)

    return features
