"""Tiny transformers models whose attention is not uniform, and the converted attention written out naively."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

VOCABULARY, POSITIONS = 61, 64
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": POSITIONS,
}
_ROPE = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 16}  # fmt: skip


def tiny(family: str, **options: Any) -> Any:
    """A float64 model in evaluation mode, queries and keys enlarged so that its softmax is spiky."""
    torch.manual_seed(0)
    if family == "gpt2":
        sizes = {"vocab_size": VOCABULARY, "n_positions": POSITIONS, "n_embd": 32, "n_layer": 2, "n_head": 4}
        special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
        model: Any = GPT2LMHeadModel(GPT2Config(**{**sizes, **special, **options}))
    elif family == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(**{**_SIZES, "num_key_value_heads": 2, "rope_parameters": _ROPE, "pad_token_id": 0, **options})
        )
    elif family == "mistral":
        model = MistralForCausalLM(
            MistralConfig(**{**_SIZES, "num_key_value_heads": 2, "sliding_window": 32, "pad_token_id": 0, **options})
        )
    else:
        model = BertForMaskedLM(BertConfig(**{**_SIZES, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and any(part in name for part in ("c_attn", "q_proj", "k_proj", "query", "key")):
                parameter.mul_(12)
    return model.double().eval()


def perturb(model: Any) -> Any:
    """Moves every map away from the identity."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.maps().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.2)
    return model


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(7))


def exponential_pair(u: torch.Tensor) -> torch.Tensor:
    return torch.cat([u.exp(), (-u).exp()], -1)


def softmax_pair(u: torch.Tensor) -> torch.Tensor:
    return torch.cat([u.exp() / u.exp().sum(-1, keepdim=True), (-u).exp() / (-u).exp().sum(-1, keepdim=True)], -1)


def naive_attention(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any,
                    scaling: float, dropout: float = 0.0, **kwargs: Any) -> tuple[torch.Tensor, None]:  # fmt: skip
    """The definition of ``module.naive.kind`` token by token: exponentials as they stand, one query at a time."""
    heads, length = query.shape[1], query.shape[2]
    groups = heads // key.shape[1]
    core, settings = module.linear_core, module.naive
    y = torch.zeros_like(query)
    linear_query = query
    if settings.kind == "hedgehog_window":  # a scale beyond the usual one goes into the queries of both parts
        linear_query = query * (scaling * query.shape[-1] ** 0.5)
    for h in range(heads):
        k, v = key[:, h // groups], value[:, h // groups]
        uq = linear_query[:, h] @ core.query_map.weight[h]
        uk = k @ core.key_map.weight[h]
        form = softmax_pair if settings.kind == "hedgehog_window" else exponential_pair
        phi_q, phi_k = form(uq), form(uk)
        gamma = 1 / (1 + (-core.window_logit[h]).exp()) if settings.kind == "hedgehog_window" else None
        for i in range(length):
            keys = range(i + 1) if module.naive_causal else range(length)
            top, weights = 0.0, []
            if gamma is not None:
                near = [(query[:, h, i] * k[:, j]).sum(-1) * scaling for j in keys if j > i - settings.window]
                top = torch.stack(near).amax(0)
            for j in keys:
                if gamma is not None and j > i - settings.window:
                    weights.append(gamma * ((query[:, h, i] * k[:, j]).sum(-1) * scaling - top).exp())
                else:
                    weights.append((phi_q[:, i] * phi_k[:, j]).sum(-1))
            stacked = torch.stack(weights, -1)
            stacked = stacked / stacked.sum(-1, keepdim=True)
            y[:, h, i] = torch.einsum("bj,bjd->bd", stacked, v[:, : stacked.shape[-1]])
    return y.transpose(1, 2), None
