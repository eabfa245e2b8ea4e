"""What a configuration costs: parameters, state bytes, FLOPs, without making a weight."""

from __future__ import annotations

from typing import NamedTuple

import torch

from seqmodels.models.block import Parallel
from seqmodels.models.config import ModelConfig
from seqmodels.models.language_model import LanguageModel


class Account(NamedTuple):
    """One row: a kind of layer, the embedding, the head, the norms, or the total.

    Attributes:
        name: registry name, or what else it is.
        sites: how often it runs; blocks with shared weights run at several sites.
        parameters: distinct ones.
        state_bytes: for one sequence with a context of the account's length, behind the meta tokens.
        flops: multiply and add operations of a forward over one sequence of that length and the meta tokens.
    """

    name: str
    sites: int
    parameters: int
    state_bytes: int
    flops: int


def account(config: ModelConfig, *, length: int, dtype: torch.dtype = torch.float32) -> list[Account]:
    """Rows by kind of layer in order of first use, the total last. Built on the meta device.

    ``parameters`` of the rows sum to the total to the unit; so do the bytes and the FLOPs. A tied
    head has no parameters of its own, but its product is counted.
    """
    if length < 1:
        raise ValueError(f"length is {length}; expected at least 1")
    model = LanguageModel(config, device="meta", dtype=dtype)
    stack = model.backbone
    context = config.meta_tokens + length
    kinds: dict[str, list[int]] = {}
    counted: set[int] = set()
    for spec, layer, _ in stack.named_layers():
        row = kinds.setdefault(spec.name, [0, 0, 0, 0])
        row[0] += 1
        if id(layer) not in counted:
            counted.add(id(layer))
            row[1] += sum(parameter.numel() for parameter in layer.parameters())
        row[2] += layer.init_state(1, max_length=context, device="meta", dtype=dtype).nbytes
        row[3] += layer.flops(context)
    embedding = config.vocab_size * config.d_model
    norms = [*(block.norm for block in stack.blocks), stack.norm]
    norm_parameters = sum(parameter.numel() for norm in norms for parameter in norm.parameters())
    rows = [Account("embedding", 1, embedding, 0, 0)]
    if config.meta_tokens:
        rows.append(Account("meta tokens", 1, config.meta_tokens * config.d_model, 0, 0))
    rows += [Account(name, *values) for name, values in kinds.items()]
    rows.append(Account("norms", len(stack.order) + (config.norm_place == "pre"), norm_parameters, 0, 0))
    gates = [
        gate.numel() for module in stack.modules() if isinstance(module, Parallel) for gate in module.gates.values()
    ]
    if gates:
        rows.append(Account("gates", len(gates), sum(gates), 0, 0))
    head = 0 if config.tie_head else embedding
    rows.append(Account("head (tied)" if config.tie_head else "head", 1, head, 0, 2 * length * embedding))
    parameters, state_bytes, flops = (sum(values) for values in zip(*(row[2:] for row in rows), strict=True))
    return [*rows, Account("total", len(stack.order), parameters, state_bytes, flops)]
