"""Released Mamba-3 checkpoints (``state-spaces/mamba3-*``) to this library's model folders, and back.

A released folder has ``config.json`` and ``pytorch_model.bin`` (or ``model.safetensors``, or shards) with

    backbone.embedding.weight, backbone.layers.<i>.{norm, norm2}.weight, backbone.layers.<i>.mixer.*,
    backbone.layers.<i>.mlp.{fc1, fc2}.weight, backbone.norm_f.weight, lm_head.weight

Mixers are copied by name. fc1 holds (value, gate), this library's in_proj (gate, value). Two things
change a model's outputs and stand in no released file: the activation of A and the pairing of
rotated lanes. They are asked for, and written to ``seqmodels.json`` beside a checkpoint made here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from seqmodels.convert.files import ConversionError, check_new, new_folder, read_json, read_weights
from seqmodels.convert.mamba3_config import config_from_released, config_to_released, uniform_stack
from seqmodels.mixers import Mamba3
from seqmodels.models import LanguageModel, ModelConfig
from seqmodels.models.loading import load_model, save_model
from seqmodels.ops.mamba3 import A_ACTIVATIONS, PAIRINGS

SIDECAR = "seqmodels.json"
TOKENIZER = "meta-llama/Llama-3.1-8B"


class Moved(NamedTuple):
    """One line of the report: a tensor's name on both sides, its shape, and what was done to it."""

    source: str
    target: str
    shape: tuple[int, ...]
    change: str


def from_released(
    path: str | Path,
    out: str | Path,
    *,
    pairing: str | None = None,
    a_activation: str | None = None,
    tokenizer: str = TOKENIZER,
) -> list[Moved]:
    """Reads a released folder and writes a model folder that :func:`seqmodels.models.load_model` reads.

    Args:
        path: the folder with ``config.json`` and the weights (in one file, or in shards with an index).
        out: the folder to write; new or empty. It appears whole, or not at all.
        pairing: "adjacent" (released SISO models) or "half" (released MIMO models); read from
            ``seqmodels.json`` where that is there, otherwise required.
        a_activation: "heavy_tail" (released code since June 2026) or "softplus" (before); likewise.
        tokenizer: name to write into the configuration.

    Returns:
        One entry for each tensor.

    Raises:
        ConversionError: an unknown option in config.json, a missing, unexpected or misshapen
            tensor, a damaged file, a choice that nobody made, an ``out`` that holds something.
    """
    check_new(out)
    folder = Path(path)
    known = read_json(folder / SIDECAR) if (folder / SIDECAR).is_file() else {}
    chosen = {
        "pairing": _choice("pairing", pairing, known.get("pairing"), PAIRINGS,
                           "released SISO models use 'adjacent', released MIMO models 'half'"),
        "a_activation": _choice("a_activation", a_activation, known.get("a_activation"), A_ACTIVATIONS,
                                "code released since June 2026 computes 'heavy_tail', before that 'softplus'"),
    }  # fmt: skip
    config = config_from_released(read_json(folder / "config.json"), chosen)
    found = read_weights(folder)
    with torch.device("meta"):
        model = LanguageModel(config)
    names = _names(config)
    tensors: dict[str, Tensor] = {}
    report = []
    head = found.pop("lm_head.weight", None) if config.tie_head else None
    _check_tensors({released: tuple(model.state_dict()[ours].shape) for released, ours in names.items()}, found)
    if head is not None:
        if not torch.equal(head, found["backbone.embedding.weight"]):
            raise ConversionError(
                "lm_head.weight differs from backbone.embedding.weight, but config.json says tie_embeddings; "
                "set it to false to keep both"
            )
        report.append(Moved("lm_head.weight", "embedding.weight", tuple(head.shape), "tied"))
    for released, ours in names.items():
        tensors[ours], change = _swapped(released, found[released])
        report.append(Moved(released, ours, tuple(found[released].shape), change))
    model.load_state_dict(tensors, strict=True, assign=True)
    with new_folder(out) as target:
        save_model(model, target, tokenizer=tokenizer)
    return report


def to_released(path: str | Path, out: str | Path) -> list[Moved]:
    """Reads a model folder of this library and writes a released one, with ``seqmodels.json`` beside it.

    Released code knows one pairing for SISO and another for MIMO; where the model has the other
    one, the state's lanes are permuted, which changes no output.

    Raises:
        ConversionError: the model is not a stack of equal Mamba-3 (and SwiGLU) blocks that released code can
            build, or ``out`` holds something.
    """
    check_new(out)
    model, _, _ = load_model(path)
    arguments, d_intermediate = uniform_stack(model.config)
    released_pairing = "adjacent" if arguments["mimo_rank"] is None else "half"
    tensors: dict[str, Tensor] = {}
    report = []
    state = model.state_dict()
    mixers = {f"backbone.layers.{i}.mixer": layer for i, layer in enumerate(_mixers(model))}
    for released, ours in _names(model.config).items():
        tensors[released], change = _swapped(released, state[ours])
        prefix, _, name = released.partition(".mixer.")
        if name and arguments["pairing"] != released_pairing:
            tensors[released], permuted = _permuted(
                mixers[f"{prefix}.mixer"], name, tensors[released], released_pairing
            )
            change = "lanes permuted" if permuted else change
        report.append(Moved(ours, released, tuple(state[ours].shape), change))
    if model.config.tie_head:
        tensors["lm_head.weight"] = tensors["backbone.embedding.weight"]
        shape = tuple(tensors["lm_head.weight"].shape)
        report.append(Moved("embedding.weight", "lm_head.weight", shape, "tied"))
    config = config_to_released(model.config, arguments, d_intermediate)
    sidecar = {"pairing": released_pairing, "a_activation": arguments["a_activation"]}
    with new_folder(out) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / SIDECAR).write_text(json.dumps(sidecar, indent=2) + "\n", encoding="utf-8")
        torch.save(tensors, folder / "pytorch_model.bin")
    return report


def is_released(path: str | Path) -> bool:
    """True for a released folder, False for one of this library."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return True
    if (folder / "config.yaml").is_file():
        return False
    raise ConversionError(
        f"{folder} holds neither config.json (a released checkpoint) nor config.yaml (a model of this library)"
    )


# ---- names and tensors


def _names(config: ModelConfig) -> dict[str, str]:
    """Released name to ours, for every tensor of the model."""
    with torch.device("meta"):
        model = LanguageModel(config)
    names = {"backbone.embedding.weight": "embedding.weight"}
    layer = -1
    for site, mixer in enumerate(model.backbone.layers()):
        ours = f"backbone.blocks.{site}"
        if isinstance(mixer, Mamba3):
            layer += 1
            prefix = f"backbone.layers.{layer}"
            names[f"{prefix}.norm.weight"] = f"{ours}.norm.weight"
            names |= {f"{prefix}.mixer.{name}": f"{ours}.layer.{name}" for name in mixer.state_dict()}
        else:
            prefix = f"backbone.layers.{layer}"
            names[f"{prefix}.norm2.weight"] = f"{ours}.norm.weight"
            names[f"{prefix}.mlp.fc1.weight"] = f"{ours}.layer.in_proj.weight"
            names[f"{prefix}.mlp.fc2.weight"] = f"{ours}.layer.out_proj.weight"
    names["backbone.norm_f.weight"] = "backbone.norm.weight"
    if not config.tie_head:
        names["lm_head.weight"] = "head.weight"
    return names


def _mixers(model: LanguageModel) -> list[Mamba3]:
    return [layer for layer in model.backbone.layers() if isinstance(layer, Mamba3)]


def _swapped(released: str, tensor: Tensor) -> tuple[Tensor, str]:
    """fc1's (value, gate) to (gate, value); its own inverse."""
    if not released.endswith("mlp.fc1.weight"):
        return tensor, "copied"
    first, second = tensor.chunk(2)
    return torch.cat((second, first)), "halves swapped"


def _permuted(layer: Mamba3, name: str, tensor: Tensor, pairing: str) -> tuple[Tensor, bool]:
    """``tensor`` with the state's lanes in the order of ``pairing``, from the layer's other one."""
    p = layer.projection
    pairs = torch.arange(p.d_state // 2 * 2).view(-1, 2).T.flatten()  # lane i of "half" is adjacent's lanes[i]
    lanes = torch.cat((pairs, torch.arange(pairs.numel(), p.d_state)))
    if pairing == "adjacent":
        lanes = lanes.argsort()
    if name in ("B_bias", "C_bias", "B_norm.weight", "C_norm.weight"):
        return tensor[..., lanes].contiguous(), True
    if name != "in_proj.weight":
        return tensor, False
    parts = list(tensor.split(p.widths))
    for index in (2, 3):  # B and C
        parts[index] = parts[index].view(-1, p.d_state, tensor.shape[1])[:, lanes].flatten(0, 1)
    return torch.cat(parts), True


def _check_tensors(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]) -> None:
    wrong = [f"{name} is missing; expected {shape}" for name, shape in wanted.items() if name not in found]
    wrong += [f"{name} {tuple(found[name].shape)} is not known" for name in found if name not in wanted]
    wrong += [
        f"{name} is {tuple(found[name].shape)}; expected {shape}"
        for name, shape in wanted.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    if wrong:
        raise ConversionError("the tensors do not fit config.json:\n  " + "\n  ".join(wrong))


def _choice(name: str, given: str | None, stored: str | None, known: tuple[str, ...], hint: str) -> str:
    option = f"--{name.replace('_', '-')}"
    value = given or stored
    if value is None:
        raise ConversionError(
            f"the checkpoint does not say its {name}, which changes every output; give {option} {' or '.join(known)} "
            f"({hint})"
        )
    if value not in known:
        raise ConversionError(f"{name} is {value!r}; expected {' or '.join(map(repr, known))}")
    if given and stored and given != stored:
        raise ConversionError(f"{option} {given} was asked for, but {SIDECAR} says {stored!r}; leave the option out")
    return value
