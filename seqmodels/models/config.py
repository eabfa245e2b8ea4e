"""What a model is, as typed, frozen, strict configuration (see :mod:`seqmodels.configuration`).

A stack of residual blocks is written as a pattern of words, or as an explicit list::

    d_model: 256
    pattern: "3x(gated_conv swiglu) window swiglu 2x(shared swiglu)"
    layers:
      gated_conv: {kernel_size: 3}                       # arguments of every gated_conv
      window: {layer: attention, num_heads: 8, window: 256}   # a word of one's own
      shared: {layer: attention, num_heads: 8, share: a}      # one set of weights, a state a site

    blocks:                                              # instead of pattern
      - 3x(gated_conv swiglu)
      - {layer: attention, window: 512}                  # this block alone

``a|b`` is one block with two parallel paths, and ``path_gate`` a learned factor on what a path adds::

    pattern: "6x(mamba3|window swiglu)"
    layers:
      mamba3: {path_gate: 0.8}                           # h + 0.8 mamba3(norm(h)) + window(norm(h)) at first
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

from seqmodels.configuration import ConfigError, apply_overrides, convert, load_yaml, nearest
from seqmodels.models.arguments import convert_arguments, layer_names
from seqmodels.models.block_spec import BlockSpec, LayerSpec, PathSpec
from seqmodels.models.pattern import Words, parse_pattern

RESERVED = ("layer", "share", "path_gate")  # keys of a layer's entry that are not its arguments


class Initialization(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Initial weights.

    Attributes:
        embedding_std: the embedding (and an untied head) is N(0, embedding_std^2).
        linear_std: weights of the layers' ``nn.Linear`` become N(0, linear_std^2); null leaves each
            layer's own initialisation. A layer's ``own_initialization`` is never touched.
        residual_scale: factor on the weights that write to the residual stream; "depth" is
            1/sqrt(number of blocks), null is 1.
    """

    embedding_std: float = 0.02
    linear_std: float | None = None
    residual_scale: float | Literal["depth"] | None = "depth"

    def __post_init__(self) -> None:
        _check_number("embedding_std", self.embedding_std, 0.0)
        if self.linear_std is not None:
            _check_number("linear_std", self.linear_std, 0.0)
        if isinstance(self.residual_scale, float):
            _check_number("residual_scale", self.residual_scale, 0.0)


class StackConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Residual blocks: h = h + layer(norm(h)) (pre), or h = norm(h + layer(h)) (post).

    Attributes:
        d_model: width of the residual stream.
        pattern: blocks in words (:mod:`seqmodels.models.pattern`).
        blocks: blocks as a list of patterns and of mappings
            ``{layer: word, share: id, path_gate: g, argument: value}``.
            Exactly one of ``pattern`` and ``blocks`` is given.
        layers: arguments by word. ``layer`` in an entry makes the word another name of that layer, which
            starts from that layer's own entry; ``share`` makes all blocks of that id one set of weights;
            ``path_gate: g`` multiplies what the layer's path adds by a learned scalar that begins at g.
        norm: "rms", "layer", "batch" (over batch and length: classifiers only) or "none".
        norm_place: "pre" (plus a norm after the last block) or "post".
        norm_epsilon: added to the mean square or variance.
        residual_in_float32: keep the residual stream in float32 whatever the parameters' dtype.
        dropout: probability, on what a block adds and between the layers of one branch.
        dropout_tied: one dropout mask for all positions of a sequence.
        activation_checkpointing: recompute each block in the backward instead of storing it.
        initialization: see :class:`Initialization`.
    """

    d_model: int
    pattern: str | None = None
    blocks: tuple[str | dict[str, Any], ...] | None = None
    layers: dict[str, dict[str, Any]] = {}
    norm: Literal["rms", "layer", "batch", "none"] = "rms"
    norm_place: Literal["pre", "post"] = "pre"
    norm_epsilon: float = 1e-5
    residual_in_float32: bool = False
    dropout: float = 0.0
    dropout_tied: bool = False
    activation_checkpointing: bool = False
    initialization: Initialization = msgspec.field(default_factory=Initialization)

    def __post_init__(self) -> None:
        _check_size("d_model", self.d_model)
        _check_number("norm_epsilon", self.norm_epsilon, 0.0)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout!r}; expected 0 <= dropout < 1")
        if (self.pattern is None) == (self.blocks is None):
            raise ValueError("give exactly one of 'pattern' (words) and 'blocks' (a list)")
        if self.norm == "none" and self.norm_place == "post":
            raise ValueError("norm_place 'post' places a norm, but norm is 'none'")
        self.block_specs()

    def block_specs(self) -> list[BlockSpec]:
        """Every block in order, arguments merged; unknown words are refused with the nearest names."""
        for word in self.layers:
            self._resolve(word, f"layers.{word}")
        specs = []
        if self.pattern is not None:
            for paths in parse_pattern(self.pattern):
                specs.append(self._block(paths, f"block {len(specs)}"))
            return specs
        for index, entry in enumerate(self.blocks or ()):
            if isinstance(entry, str):
                for paths in parse_pattern(entry):
                    specs.append(self._block(paths, f"block {len(specs)}"))
                continue
            if not isinstance(entry.get("layer"), str):
                raise ValueError(f"blocks.{index}: a mapping needs the key 'layer' with a layer's name; got {entry}")
            where = f"block {len(specs)}"
            spec, share, gate = self._resolve(entry["layer"], where)
            own = {key: value for key, value in entry.items() if key not in RESERVED}
            share = _share_id(entry, where) or share
            gate = _gate(entry, where) if "path_gate" in entry else gate
            layer = LayerSpec(spec.name, {**spec.arguments, **own})
            specs.append(BlockSpec((PathSpec(entry["layer"], (layer,), gate),), share, where))
        if not specs:
            raise ValueError("blocks is empty; name at least one layer")
        return specs

    def check_layers(self) -> None:
        """Checks every layer's arguments against its constructor, without building anything."""
        for word in self.layers:
            spec, _, _ = self._resolve(word, f"layers.{word}")
            if word not in self._bases():
                convert_arguments(spec.name, spec.arguments, f"layers.{word}")
        for block in self.block_specs():
            for layer in block.layers:
                convert_arguments(layer.name, layer.arguments, block.where)

    def _bases(self) -> set[str]:
        """Words that only lend their arguments to others: they need not be complete themselves."""
        return {entry["layer"] for entry in self.layers.values() if "layer" in entry}

    def _block(self, words: Words, where: str) -> BlockSpec:
        paths = []
        shares = set()
        for path in words:
            resolved = [self._resolve(word, where) for word in path]
            for word, (_, _, gate) in zip(path[:-1], resolved[:-1], strict=True):
                if gate is not None:
                    raise ValueError(
                        f"{where}: {word!r} has a gate, but in {'>'.join(path)!r} other layers work on what it "
                        "returns; a gate multiplies what a path adds, so give it to the last layer"
                    )
            shares.update(share for _, share, _ in resolved if share is not None)
            paths.append(PathSpec(">".join(path), tuple(spec for spec, _, _ in resolved), resolved[-1][2]))
        text = "|".join(path.word for path in paths)
        if shares and len(paths) + len(words[0]) > 2:
            raise ValueError(f"{where}: {text!r} is a branch of several layers; 'share' is for blocks of one layer")
        if len({path.word for path in paths}) < len(paths):
            raise ValueError(f"{where}: a path appears twice in {text!r}; name one of them anew under 'layers'")
        return BlockSpec(tuple(paths), shares.pop() if shares else None, where)

    def _resolve(self, word: str, where: str) -> tuple[LayerSpec, str | None, float | None]:
        """The layer behind a word, its arguments merged from the base on, its share id and its gate."""
        chain = list(self._chain(word, where))
        arguments: dict[str, Any] = {}
        for name in reversed(chain):
            arguments.update({key: value for key, value in self.layers.get(name, {}).items() if key not in RESERVED})
        entry = self.layers.get(word, {})
        return LayerSpec(chain[-1], arguments), _share_id(entry, where), _gate(entry, where)

    def _chain(self, word: str, where: str) -> Iterator[str]:
        seen: list[str] = []
        while True:
            if word in seen:
                raise ValueError(
                    f"{where}: {' -> '.join([*seen, word])} is a circle of names; end it in a registered layer"
                )
            seen.append(word)
            yield word
            base = self.layers.get(word, {}).get("layer")
            if base is None:
                break
            if not isinstance(base, str):
                raise ValueError(f"layers.{word}: 'layer' is {base!r}; expected a layer's name")
            word = base
        known = {*layer_names(), *self.layers} - {word}
        if word not in layer_names():
            raise ValueError(
                f"{where}: unknown layer {word!r}.{nearest(word, known)} Known: {', '.join(sorted(known))}. "
                "Register your own with seqmodels.register_mixer first."
            )


class ModelConfig(StackConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A language model: embedding, stack, head.

    Attributes:
        vocab_size: number of token ids.
        tie_head: the head is the embedding matrix.
        meta_tokens: learned vectors that every document begins with (Hymba, arXiv:2411.13676, section 2.2). They
            are never targets, positions count on after them, and windows of softmax attention keep them in sight.
        objective: "next_token", or "prefix": next-token prediction after a prefix that prefix layers
            read in both directions. Only "prefix" admits prefix layers.
        prefix_length: "prefix" only: tokens of the prefix that the model is trained with. Generation reads so
            many tokens of a prompt in both directions; all of them when null.
    """

    vocab_size: int
    tie_head: bool = True
    meta_tokens: int = 0
    objective: Literal["next_token", "prefix"] = "next_token"
    prefix_length: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_size("vocab_size", self.vocab_size)
        if isinstance(self.meta_tokens, bool) or not isinstance(self.meta_tokens, int) or self.meta_tokens < 0:
            raise ValueError(f"meta_tokens is {self.meta_tokens!r}; expected a number of learned vectors, 0 for none")
        if self.meta_tokens and self.objective == "prefix":
            raise ValueError(
                f"meta_tokens is {self.meta_tokens}, but with objective 'prefix' a document's first call must begin "
                "with its prefix; set meta_tokens: 0"
            )
        if self.prefix_length is not None:
            _check_size("prefix_length", self.prefix_length)
            if self.objective != "prefix":
                raise ValueError(
                    f"prefix_length is {self.prefix_length}, but objective is {self.objective!r}, which has no prefix; "
                    "set objective: prefix or leave prefix_length out"
                )


class ClassifierConfig(StackConfig, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A sequence classifier: input map, stack, pooling, head.

    Attributes:
        num_classes: outputs.
        vocab_size: token ids come in (bytes: 256); exactly one of this and ``input_size``.
        input_size: real vectors of this width come in, through a linear map.
        pooling: "mean", "last" or "first" token of each document.
        sequences: 2 encodes a pair with the shared stack and classifies [a, b, a - b, a * b]
            through Linear(4 d_model, d_model), GELU, Linear (LRA's retrieval).
    """

    num_classes: int
    vocab_size: int | None = None
    input_size: int | None = None
    pooling: Literal["mean", "last", "first"] = "mean"
    sequences: Literal[1, 2] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_size("num_classes", self.num_classes)
        if (self.vocab_size is None) == (self.input_size is None):
            raise ValueError("give exactly one of 'vocab_size' (token ids) and 'input_size' (real-valued inputs)")
        _check_size(
            *(("vocab_size", self.vocab_size) if self.vocab_size is not None else ("input_size", self.input_size))
        )


C = TypeVar("C", bound=StackConfig)


def load_config(path: str | Path, overrides: Iterable[str] = (), kind: type[C] = ModelConfig) -> C:  # type: ignore[assignment]
    """Reads a model's YAML file and checks it down to its layers' arguments."""
    data = apply_overrides(load_yaml(path), overrides)
    config = convert(write_out(data) if kind is ModelConfig else data, kind)
    config.check_layers()
    return config


def read_model_config(path: str | Path, overrides: Iterable[str] = ()) -> ModelConfig:
    """The language model in a model's file, or in a training configuration's key ``model``
    (a mapping, or the path of a model's file beside it); overrides are dotted keys of the model."""
    data = load_yaml(path)
    if "model" not in data:
        return load_config(path, overrides)
    if isinstance(data["model"], str):
        return load_config(Path(path).parent / data["model"], overrides)
    config = convert(write_out(apply_overrides(data["model"], overrides), "model"), ModelConfig, "model")
    config.check_layers()
    return config


def write_out(data: Any, path: str = "") -> Any:
    """Plain values of a model with a key ``architecture`` (``hydra``) as those of the stack that it stands for;
    others as they are."""
    if not isinstance(data, dict) or "architecture" not in data:
        return data
    from seqmodels.models.hydra import HydraConfig  # it is made of this module's parts

    if data["architecture"] != "hydra":
        raise ConfigError(f"architecture is {data['architecture']!r}; expected 'hydra', or a pattern in its place")
    own = {key: value for key, value in data.items() if key != "architecture"}
    return msgspec.to_builtins(convert(own, HydraConfig, path).model_config())


def _share_id(entry: dict[str, Any], where: str) -> str | None:
    share = entry.get("share")
    if share is not None and not (isinstance(share, str) and share):
        raise ValueError(f"{where}: 'share' is {share!r}; expected a non-empty id (a string)")
    return share


def _gate(entry: dict[str, Any], where: str) -> float | None:
    gate = entry.get("path_gate")
    if gate is None:
        return None
    if isinstance(gate, bool) or not isinstance(gate, (int, float)) or not math.isfinite(gate):
        raise ValueError(
            f"{where}: 'path_gate' is {gate!r}; expected the first value of a learned factor, or null for none"
        )
    return float(gate)


def _check_size(name: str, value: int | None) -> None:
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; expected a positive integer")


def _check_number(name: str, value: float, above: float) -> None:
    if not (math.isfinite(value) and value > above):
        raise ValueError(f"{name} is {value!r}; expected a number above {above:g}")
