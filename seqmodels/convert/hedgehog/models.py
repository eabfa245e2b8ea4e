"""Converted models as transformers classes: built from an original one, saved and loaded like any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from seqmodels.convert.files import ConversionError
from seqmodels.convert.hedgehog.attention import IMPLEMENTATION
from seqmodels.convert.hedgehog.cache import HedgehogCache, check_cache
from seqmodels.convert.hedgehog.cores import Place, make_core
from seqmodels.convert.hedgehog.families import (
    PREFIX,
    attention_modules,
    base_model,
    check_convertible,
    family_of,
    head_shape,
)
from seqmodels.convert.hedgehog.masks import check_positions
from seqmodels.convert.hedgehog.runtime import Runtime
from seqmodels.convert.hedgehog.settings import AttentionSettings
from seqmodels.ops.registration import state_dtype


class HedgehogModel(PreTrainedModel):
    """What a converted model adds to its original: a core in every attention module, and its cache.

    Attributes:
        runtime: switches that all layers share (ablations, observation of the teacher).
    """

    runtime: Runtime

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.attach()

    def attach(self) -> None:
        """Gives every attention module its core and directs transformers to it."""
        settings = attention_settings(self)
        heads, key_heads, width = head_shape(self.config)
        self.runtime = Runtime()
        causal = family_of(self.config).causal
        for layer, (_, module) in enumerate(attention_modules(self)):
            if settings.kind != "softmax":
                module.linear_core = make_core(heads, key_heads, width, settings, causal=causal)
                module.hedgehog_place = Place(layer, causal, self.runtime)
        if settings.kind != "softmax":
            below: nn.Module = base_model(self)
            below.register_forward_pre_hook(_before_forward, with_kwargs=True)
            below.register_forward_hook(_after_forward, with_kwargs=True, always_call=True)
            below.hedgehog_runtime = self.runtime  # type: ignore[assignment] - not a module; the hooks' way to it
        self.set_attn_implementation(IMPLEMENTATION)

    def maps(self) -> dict[str, nn.Parameter]:
        """Parameters that conversion has added, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if ".linear_core." in name}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if hasattr(module, "reset_parameters") and type(module).__module__.startswith("seqmodels."):
            module.reset_parameters()  # type: ignore[operator]
        else:
            super()._init_weights(module)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, *args: Any, **kwargs: Any
    ) -> Any:
        """``generate`` makes caches of keys and values unless told otherwise."""
        linear = attention_settings(self).kind != "softmax"
        if linear and model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise ValueError(
                    f"cache_implementation={generation_config.cache_implementation!r} stores keys and values; a "
                    "converted model's state has a constant size already. Leave cache_implementation out"
                )
            model_kwargs["past_key_values"] = HedgehogCache(self.config.num_hidden_layers)
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]


class HedgehogGPT2Config(GPT2Config):
    model_type = PREFIX + "gpt2"
    hedgehog: dict | None = None


class HedgehogLlamaConfig(LlamaConfig):
    model_type = PREFIX + "llama"
    hedgehog: dict | None = None


class HedgehogMistralConfig(MistralConfig):
    model_type = PREFIX + "mistral"
    hedgehog: dict | None = None


class HedgehogBertConfig(BertConfig):
    model_type = PREFIX + "bert"
    hedgehog: dict | None = None


class HedgehogGPT2LMHeadModel(HedgehogModel, GPT2LMHeadModel):
    config_class = HedgehogGPT2Config


class HedgehogLlamaForCausalLM(HedgehogModel, LlamaForCausalLM):
    config_class = HedgehogLlamaConfig


class HedgehogMistralForCausalLM(HedgehogModel, MistralForCausalLM):
    config_class = HedgehogMistralConfig


class HedgehogBertForMaskedLM(HedgehogModel, BertForMaskedLM):
    config_class = HedgehogBertConfig


_CONVERTED: dict[str, Any] = {
    original.__name__: converted
    for original, converted in (
        (GPT2LMHeadModel, HedgehogGPT2LMHeadModel),
        (LlamaForCausalLM, HedgehogLlamaForCausalLM),
        (MistralForCausalLM, HedgehogMistralForCausalLM),
        (BertForMaskedLM, HedgehogBertForMaskedLM),
    )
}
for _model in _CONVERTED.values():
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    _auto = AutoModelForMaskedLM if _model is HedgehogBertForMaskedLM else AutoModelForCausalLM
    _auto.register(_model.config_class, _model, exist_ok=True)


def attention_settings(model: PreTrainedModel) -> AttentionSettings:
    """The settings in a converted model's configuration."""
    return msgspec.convert(model.config.hedgehog, AttentionSettings)


def check_swap(model: PreTrainedModel, settings: AttentionSettings) -> None:
    """Refuses what :func:`swap_attention` would refuse, before anything is measured."""
    architecture, family = type(model).__name__, family_of(model.config)
    check_convertible(model.config, architecture)
    if settings.kind == "hedgehog_window" and not family.causal:
        raise ConversionError(
            f"kind 'hedgehog_window' is causal and {architecture} reads in both directions; use kind 'hedgehog'"
        )
    if settings.kind != "softmax":
        make_core(*head_shape(model.config), settings, causal=family.causal)


def swap_attention(model: PreTrainedModel, settings: AttentionSettings) -> HedgehogModel:
    """Turns ``model`` itself into a converted one: same weights, new attention, maps at their start values.

    Raises:
        ConversionError: an architecture that cannot be converted, or a kind that does not fit it.
    """
    check_swap(model, settings)
    converted = _CONVERTED[type(model).__name__]
    old = model.config
    values = {**old.to_dict(), "hedgehog": msgspec.to_builtins(settings), "architectures": [converted.__name__]}
    del values["model_type"]
    config = converted.config_class(**values)
    if settings.kind != "softmax" and getattr(config, "sliding_window", None) is not None:
        config.sliding_window = None  # a linear layer sees everything; check_convertible has compared it with the data
    for module in model.modules():
        if getattr(module, "config", None) is old:
            setattr(module, "config", config)  # noqa: B010 - not a submodule, whatever pyright makes of it
    model.__class__ = converted
    assert isinstance(model, HedgehogModel)  # now
    model.attach()
    like = next(model.parameters())
    for _, module in attention_modules(model):
        if settings.kind != "softmax":  # float32 beside half precision: maps are trained
            module.linear_core.to(like.device, state_dtype(like.dtype))
    return model


def load_original(model: str) -> PreTrainedModel:
    """The model in a folder or on the hub, in float32.

    Raises:
        ConversionError: nothing there, or an architecture that cannot be converted.
    """
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        kind = "folder" if Path(model).is_dir() else "hub name, since there is no such folder"
        raise ConversionError(f"cannot read a model from the {kind}, {model!r}: {error}") from error
    architectures = config.architectures or ["a model without architectures in its config.json"]
    check_convertible(config, architectures[0])
    auto = AutoModelForCausalLM if family_of(config).causal else AutoModelForMaskedLM
    try:
        return auto.from_pretrained(model, dtype=torch.float32)
    except (OSError, ValueError, RuntimeError) as error:
        raise ConversionError(f"cannot read the weights of {model!r}: {error}") from error


def load(folder: str | Path, **options: Any) -> HedgehogModel:
    """The converted model in ``folder``, ready to evaluate and to ``generate``.

    After ``import seqmodels.convert.hedgehog``, ``AutoModelForCausalLM.from_pretrained(folder)`` is the same.

    Args:
        options: for transformers' ``from_pretrained``: ``dtype``, ``device_map``, ...

    Raises:
        ConversionError: no converted model there, or weights that are missing.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise ConversionError(f"{path} holds no config.json; give the folder that seqmodels convert hedgehog wrote")
    config = AutoConfig.from_pretrained(path)
    name = (config.architectures or [""])[0]
    found = {converted.__name__: converted for converted in _CONVERTED.values()}.get(name)
    if found is None:
        raise ConversionError(f"{path} holds {name or config.model_type}, which is not a converted model")
    loaded: Any = found.from_pretrained(path, config=config, output_loading_info=True, **options)
    model, info = loaded
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    if wrong:
        raise ConversionError(f"{path}: weights that are missing or not of this model: {', '.join(sorted(wrong))}")
    return model


# transformers' own implementations: they would run softmax past the cores and say nothing.
_SOFTMAX = ("eager", "sdpa", "flex_attention", "flash_attention", "paged")


def _before_forward(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    config, runtime = module.config, module.hedgehog_runtime
    if config._attn_implementation.startswith(_SOFTMAX):
        raise ValueError(
            f"the attention implementation is {config._attn_implementation!r}; a converted model runs its own: "
            f"set_attn_implementation({IMPLEMENTATION!r}), or load the original model for softmax attention"
        )
    # transformers looks for packed sequences only where there is neither a mask nor a cache, and here there is a cache.
    check_positions(kwargs.get("position_ids"), kwargs.get("attention_mask"))
    use_cache = kwargs.get("use_cache")
    use_cache = config.use_cache if use_cache is None else use_cache
    cache = kwargs.get("past_key_values")
    if cache is not None:
        check_cache(cache, config.num_hidden_layers)
    elif use_cache and family_of(config).causal and runtime.observer is None:
        kwargs["past_key_values"] = HedgehogCache(config.num_hidden_layers)
    weights = kwargs.get("output_attentions")
    runtime.return_weights = bool(config.output_attentions if weights is None else weights)
    return args, kwargs


def _after_forward(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
    module.hedgehog_runtime.return_weights = False
