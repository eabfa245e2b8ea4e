"""Inputs of the feature attention tests, and one way to call the op on them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import seqmodels
from seqmodels import Layout
from seqmodels.ops.feature_attention import FeatureState, feature_attention, feature_width

NAMES = ("q", "k", "v", "query_weight", "key_weight", "log_decay", "matrix", "log_scale")
WIDE = 3  # of the inputs, how many are in the model's dtype: q, k, v


@dataclass(frozen=True)
class Case:
    """Sizes and options; ``scale`` multiplies u."""

    feature_map: str
    batch: int = 2
    length: int = 13
    query_groups: int = 2
    key_groups: int = 2
    heads: int = 2
    head_dim: int = 5
    width: int | None = 4  # of u; None: no weights
    value_dim: int = 3
    decay: bool = False
    state: bool = True
    scale: float = 1.0
    layout: Layout | None = None

    @property
    def normalize(self) -> bool:
        return self.feature_map != "identity"

    def with_layout(self, layout: Layout) -> Case:
        return replace(self, layout=layout, batch=layout.batch_size, length=layout.length)

    def inputs(self, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
        """In ``NAMES``'s order; values exact in ``dtype`` (the others in float32), in float64; NaN on padding."""
        generator = torch.Generator().manual_seed(0)

        def draw(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, generator=generator).to(of).double()

        tokens = (self.batch, self.length)
        documents = self.batch if self.layout is None else self.layout.num_documents
        q = draw(*tokens, self.query_groups, self.head_dim, of=dtype)
        k = draw(*tokens, self.key_groups, self.head_dim, of=dtype)
        v = draw(*tokens, self.heads, self.value_dim, of=dtype)
        if self.width is None:
            weights, width = [None, None], self.head_dim
            q, k = ((x * self.scale).to(dtype).double() for x in (q, k))
        else:
            width, scale = self.width, self.scale / self.head_dim**0.5
            weights = [draw(self.heads, self.head_dim, width).mul(scale).float().double() for _ in range(2)]
        decay = (-draw(*tokens, self.heads).abs() * 0.25).float().double() if self.decay else None
        features = feature_width(self.feature_map, width)
        state = draw(documents, self.heads, features, self.value_dim + int(self.normalize)) if self.state else None
        if state is not None and self.normalize:  # sums of positive weights
            state[..., -1] = 1 + state[..., -1].abs()
        scale = (
            draw(documents, self.heads, features) if state is not None and self.feature_map == "hedgehog_exp" else None
        )
        inputs = [q, k, v, *weights, decay, state, scale]
        if self.layout is not None:
            for tensor in (q, k, v, decay):
                if tensor is not None:
                    tensor[~self.layout.valid] = float("nan")
        return inputs


def cast(inputs: list[Tensor | None], dtype: torch.dtype) -> list[Tensor | None]:
    """q, k, v in ``dtype``; the others in float32 (float64)."""
    rest = torch.float64 if dtype == torch.float64 else torch.float32
    return [None if x is None else x.to(dtype if index < WIDE else rest) for index, x in enumerate(inputs)]


def call(inputs: list[Tensor | None], case: Case, chunk_size: int = 64) -> tuple[Tensor, FeatureState]:
    q, k, v, query_weight, key_weight, log_decay, matrix, log_scale = inputs
    assert q is not None
    assert k is not None
    assert v is not None
    return feature_attention(
        q, k, v, query_weight, key_weight, feature_map=case.feature_map, log_decay=log_decay,
        initial_state=None if matrix is None else FeatureState(matrix, log_scale), normalize=case.normalize,
        layout=case.layout, chunk_size=chunk_size,
    )  # fmt: skip


def run(
    inputs: list[Tensor | None], case: Case, backend: str, dtype: torch.dtype = torch.float64, chunk_size: int = 64
) -> dict[str, Tensor]:
    """Outputs and the gradients of all inputs but log_scale, in float64, under random output gradients."""
    leaves = [None if x is None else x.clone().requires_grad_(x is not inputs[7]) for x in cast(inputs, dtype)]
    if leaves[7] is not None:
        leaves[7].requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    with seqmodels.backend(backend):
        y, state = call(leaves, case, chunk_size)
        grads = [torch.randn(out.shape, generator=generator).bfloat16().to(out.dtype) for out in (y, state.matrix)]
        present = [x for x in leaves[:7] if x is not None]
        found = iter(torch.autograd.grad([y, state.matrix], present, grads))
    result = {"y": y.detach().double(), "matrix": state.matrix.detach().double()}
    if state.log_scale is not None:
        result["log_scale"] = state.log_scale.double()
    return result | {f"d {name}": next(found).double() for name, x in zip(NAMES, leaves[:7]) if x is not None}  # noqa: B905


def error(found: Tensor, truth: Tensor) -> float:
    return ((found - truth).norm() / truth.norm().clamp_min(1e-30)).item()
