"""Problems of whole language models: prefill of a prompt, decode of one token, a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evals.throughput.layers import Instance, SdpaLayer, problem_of
from evals.throughput.problem import Case, Problem
from evals.throughput.rivals import require


def build(case: Case, device: torch.device) -> Problem:
    """A model of ``layers`` blocks of one mixer; ``sizes`` also hold d_model, vocab_size, the mixer's arguments."""
    from seqmodels.models import LanguageModel, ModelConfig

    torch.manual_seed(0)
    size = case.sizes
    options = {name: value for name, value in size.items() if name not in ("d_model", "layers", "vocab_size")}
    config = ModelConfig(
        d_model=size["d_model"],
        vocab_size=size["vocab_size"],
        pattern=f"{size['layers']}x({case.layer})",
        layers={case.layer: options} if options else {},
    )
    model = LanguageModel(config, device=device, dtype=case.torch_dtype)
    instance = Instance(
        model,
        lambda generator, batch, length: torch.randint(
            size["vocab_size"], (batch, length), generator=generator, device=device
        ),
        lambda out: out if isinstance(out, Tensor) else out.logits if hasattr(out, "logits") else out[0],
    )
    inside = sum(parameter.numel() for parameter in model.backbone.parameters())
    return problem_of(case, device, instance, _rivals(case, device, inside))


def _rivals(case: Case, device: torch.device, parameters: int) -> Iterator[Any]:
    """Rivals of a model whose layers hold ``parameters`` in all."""
    made = {"device": device, "dtype": case.torch_dtype}
    other = {"same_function": False}
    if case.layer in ("mamba2", "mamba3"):
        omits = "its own random weights" if case.layer == "mamba2" else "Mamba-2: no rotation, no trapezoid"
        for chunk in (64, 256):
            facts = {**other, "omits": omits}
            yield f"HF Mamba-2 chunk {chunk}", lambda chunk=chunk: _HuggingFaceMamba2(case, chunk).to(**made), facts
    if case.layer != "attention":
        depth = max(1, round(parameters / (4 * case.sizes["d_model"] ** 2)))
        facts = {**other, "omits": f"softmax attention of the same width, {depth} layers for about as many parameters"}
        yield "sdpa model", lambda: _SdpaModel(case, depth).to(**made), facts


class _SdpaModel(nn.Module):
    """Embedding, pre-norm attention blocks, tied head: the plainest transformer of this depth without MLPs."""

    def __init__(self, case: Case, depth: int) -> None:
        super().__init__()
        width = case.sizes["d_model"]
        self.embedding = nn.Embedding(case.sizes["vocab_size"], width)
        self.layers = nn.ModuleList(SdpaLayer(width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(depth + 1))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        for layer, norm in zip(self.layers, self.norms, strict=False):
            hidden = hidden + layer(norm(hidden))
        return self.norms[-1](hidden) @ self.embedding.weight.T

    def decode_loop(self, batch: int, length: int) -> Callable[[Mapping[str, Tensor]], Tensor]:
        loops = [layer.decode_loop(batch, length) for layer in self.layers]  # type: ignore[operator]

        @torch.no_grad()
        def step(tensors: Mapping[str, Tensor]) -> Tensor:
            hidden = self.embedding(tensors["x"])
            for loop, norm in zip(loops, self.norms, strict=False):
                hidden = hidden + loop({"x": norm(hidden)})
            return self.norms[-1](hidden) @ self.embedding.weight.T

        return step


class _HuggingFaceMamba2(nn.Module):
    """``transformers``' Mamba2ForCausalLM of the case's sizes."""

    def __init__(self, case: Case, chunk: int) -> None:
        super().__init__()
        require("transformers", "transformers")
        from transformers import Mamba2Config, Mamba2ForCausalLM, logging

        logging.set_verbosity_error()

        width = case.sizes["d_model"]
        config = Mamba2Config(
            hidden_size=width, num_heads=2 * width // 64, head_dim=64, state_size=128, n_groups=1, expand=2,
            chunk_size=chunk, num_hidden_layers=case.sizes["layers"], vocab_size=case.sizes["vocab_size"],
            tie_word_embeddings=True, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        self.model = Mamba2ForCausalLM(config).eval()

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, use_cache=False).logits

    def decode_loop(self, batch: int, length: int) -> Callable[[Mapping[str, Tensor]], Tensor]:
        device = self.model.device
        with torch.no_grad():  # its cache does not grow: a short prompt costs what a long one does
            cache = self.model(torch.zeros(batch, 8, dtype=torch.long, device=device), use_cache=True).cache_params

        @torch.no_grad()
        def step(tensors: Mapping[str, Tensor]) -> Tensor:
            return self.model(tensors["x"].unsqueeze(1), cache_params=cache, use_cache=True).logits

        return step
