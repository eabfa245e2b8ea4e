"""Memory beyond the window: a value is named once, and asked for where no window can see it.

``... NAME value ... filler ... ASK ... ASK``: the answer is due at every ASK and never stands in the row. Attention
has its window alone (G = 0). With a gated convolution as the state-space path nothing but the workspace reaches back
to the value from the last question, where accuracy is measured: the attention layer sees a window, each of two
convolutions two tokens, the router the chunk before (a test holds the whole model to it). With ``hydra_diag`` the
recurrence can carry it too. Models without a workspace have wider experts instead, for as many parameters.

``signal`` is taken before training: how much the workspace's output at the last question changes with the value,
relative to its norm. Addresses of deviation 1 (slots begin as means over a segment) are an arm, to show what the
layer's default is for.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from evals.hydra.training import Say, generator, train
from seqmodels.mixers import MixerOutput, Workspace
from seqmodels.models import HydraConfig, LanguageModel
from seqmodels.models.config import Initialization

VALUES, WINDOW, BLOCKS, KERNEL, ASKED = 8, 32, 2, 3, 6
FILLER, NAME, ASK, VOCABULARY = VALUES, VALUES + 1, VALUES + 2, VALUES + 3
LENGTH, D_MODEL = 96, 64
REACH = WINDOW - 1 + BLOCKS * (KERNEL - 1)  # of the window and the convolutions together
HIDDEN = {True: 64, False: 110}  # of the experts: the same number of parameters with and without a workspace


def measure(seed: int, options: dict[str, Any], say: Say) -> list[dict[str, Any]]:
    torch.manual_seed(seed)
    model = build(options)
    tokens, targets = rows(generator(seed, -1), options["rows"])
    found = [{"metric": "signal", "value": signal(model, tokens), "unit": ""}] if options["workspace"] else []
    train(model, lambda step: rows(generator(seed, step), options["batch_size"]), options, say)
    with torch.no_grad():
        output = model(tokens)
    right = (output.logits[:, -1, :VALUES].argmax(-1) == targets[:, -1]).float().mean()
    about = {"chance": 1 / VALUES, "parameters": model.num_parameters()}
    found.append({"metric": "accuracy", "value": float(right), "unit": "", "about": about})
    for name in ("read_gate", "write_gate", "update"):
        values = [float(value) for key, value in output.aux.items() if key.endswith(f".{name}")]
        if values:
            found.append({"metric": name, "value": sum(values) / len(values), "unit": ""})
    return found


def build(options: dict[str, Any]) -> LanguageModel:
    """The model of an arm. Embeddings begin at 1/sqrt(d_model): at the default deviation of 0.02 tokens of so narrow
    a model are nearly one vector behind two blocks (cosine 0.7), and nothing could tell which one to write."""
    workspace = None
    if options["workspace"]:
        workspace = {
            "num_slots": 32,
            "rank": 32,
            "active": 16,
            "segment": WINDOW,
            "address_std": options["address_std"],
        }
    config = HydraConfig(
        vocab_size=VOCABULARY, d_model=D_MODEL, num_blocks=BLOCKS, mixer=options["mixer"], attention_every=2,
        attention={"num_heads": 4, "window": WINDOW, "num_globals": 0, "block": WINDOW},
        experts={"num_experts": 2, "d_hidden": HIDDEN[options["workspace"]], "chunk_size": WINDOW},
        workspace=workspace, memory=None, initialization=Initialization(embedding_std=D_MODEL**-0.5),
        state_space={"kernel_size": KERNEL} if options["mixer"] == "gated_conv" else {},
    )  # fmt: skip
    return LanguageModel(config.model_config())


@torch.no_grad()
def signal(model: LanguageModel, tokens: Tensor) -> float:
    """Mean over rows of |y(value) - y(other value)| / |y(value)|, y the workspace's output at the last token."""
    seen: list[Tensor] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: MixerOutput) -> None:
        seen.append(output.y[:, -1])

    layer = next(layer for layer in model.backbone.layers() if isinstance(layer, Workspace))
    hook = layer.register_forward_hook(cast(Any, keep))
    model(tokens)
    model(torch.where(tokens < VALUES, (tokens + 1) % VALUES, tokens))
    hook.remove()
    one, other = seen
    return float(((one - other).norm(dim=-1) / one.norm(dim=-1)).mean())


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
