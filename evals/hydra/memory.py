"""Memory beyond the window: a value is named once, and asked for where no window can see it.

``... NAME value ... filler ... ASK ... ASK``: the answer is due at every ASK and never stands in the row. Attention
has its window alone (G = 0). With a gated convolution as the state-space path nothing but the workspace reaches back
to the value: the attention layer sees a window, each of two convolutions two tokens. With ``hydra_diag`` the
recurrence can carry it too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evals.hydra.training import Say, generator, train
from seqmodels.models import HydraConfig, LanguageModel

VALUES, WINDOW, BLOCKS, KERNEL, ASKED = 8, 32, 2, 3, 6
FILLER, NAME, ASK, VOCABULARY = VALUES, VALUES + 1, VALUES + 2, VALUES + 3
LENGTH = 96
REACH = WINDOW - 1 + BLOCKS * (KERNEL - 1)  # of the window and the convolutions together


def measure(seed: int, options: dict[str, Any], say: Say) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    workspace = {"num_slots": 16, "rank": 32, "active": 8, "segment": WINDOW} if options["workspace"] else None
    config = HydraConfig(
        vocab_size=VOCABULARY, d_model=64, num_blocks=BLOCKS, mixer=options["mixer"], attention_every=2,
        attention={"num_heads": 4, "window": WINDOW, "num_globals": 0, "block": WINDOW},
        experts={"num_experts": 2, "d_hidden": 64, "chunk_size": WINDOW}, workspace=workspace, memory=None,
        state_space={"kernel_size": KERNEL} if options["mixer"] == "gated_conv" else {},
    )  # fmt: skip
    model = LanguageModel(config.model_config())
    train(model, lambda step: rows(generator(seed, step), options["batch_size"]), options, say)
    tokens, targets = rows(generator(seed, -1), options["rows"])
    with torch.no_grad():
        output = model(tokens)
    right = (output.logits[:, -1, :VALUES].argmax(-1) == targets[:, -1]).float().mean()
    found = [{"metric": "accuracy", "value": float(right), "unit": "", "about": {"chance": 1 / VALUES}}]
    for name in ("read_gate", "write_gate", "update"):
        values = [float(value) for key, value in output.aux.items() if key.endswith(f".{name}")]
        if values:
            found.append({"metric": name, "value": sum(values) / len(values), "unit": ""})
    return found


def rows(source: torch.Generator, count: int) -> tuple[Tensor, Tensor]:
    """(count, LENGTH) tokens; ASKED questions in the last quarter, one of them at the end. The value stands among the
    first WINDOW tokens."""
    tokens = torch.full((count, LENGTH), FILLER)
    value = torch.randint(VALUES, (count,), generator=source)
    place = torch.randint(WINDOW - 1, (count,), generator=source)
    each = torch.arange(count)
    tokens[each, place] = NAME
    tokens[each, place + 1] = value
    late = torch.rand(count, LENGTH // 4, generator=source)
    late[:, -1] = 2.0
    asks = LENGTH - LENGTH // 4 + late.topk(ASKED, dim=1).indices
    tokens.scatter_(1, asks, ASK)
    targets = torch.full_like(tokens, -100)
    return tokens, targets.scatter_(1, asks, value[:, None].expand_as(asks))
