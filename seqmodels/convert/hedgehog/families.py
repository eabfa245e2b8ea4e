"""Which transformers models can be converted, and where their attention modules are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from seqmodels.convert.files import ConversionError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class Family(NamedTuple):
    """One model type of transformers.

    Attributes:
        attention: class name of its self-attention module.
        projections: regular expression of the q, k, v and o projections' full names.
        causal: False for encoders.
        objective: what its head is trained on.
    """

    attention: str
    projections: str
    causal: bool
    objective: str


FAMILIES = {
    "gpt2": Family("GPT2Attention", r".*\.attn\.(c_attn|c_proj)", True, "next_token"),
    "llama": Family("LlamaAttention", r".*\.self_attn\.(q|k|v|o)_proj", True, "next_token"),
    "mistral": Family("MistralAttention", r".*\.self_attn\.(q|k|v|o)_proj", True, "next_token"),
    "bert": Family(
        "BertSelfAttention", r".*\.attention\.(self\.(query|key|value)|output\.dense)", False, "masked_tokens"
    ),
}
ARCHITECTURES = ("GPT2LMHeadModel", "LlamaForCausalLM", "MistralForCausalLM", "BertForMaskedLM")
PREFIX = "hedgehog_"  # of the converted model types


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a plain or converted configuration.

    Raises:
        ConversionError: another model type, named, with those that can be converted.
    """
    found = FAMILIES.get(config.model_type.removeprefix(PREFIX))
    if found is None:
        raise ConversionError(f"a model of type {config.model_type!r} cannot be converted; {_known()}")
    return found


def check_convertible(config: PreTrainedConfig, architecture: str, context_length: int | None = None) -> None:
    """Refuses what the converted attention cannot express.

    Raises:
        ConversionError: an architecture that is not in the list, cross-attention, BERT as a decoder, or
            a sliding window of Mistral shorter than ``context_length``.
    """
    family = family_of(config)
    if config.model_type.startswith(PREFIX):
        raise ConversionError(f"{architecture} is converted already; start from the original model")
    if architecture not in ARCHITECTURES:
        raise ConversionError(f"{architecture} cannot be converted; {_known()}")
    if getattr(config, "add_cross_attention", False):
        raise ConversionError(f"{architecture} has cross-attention (add_cross_attention); only self-attention converts")
    if not family.causal and getattr(config, "is_decoder", False):
        raise ConversionError(f"{architecture} is set up as a decoder (is_decoder); only the encoder form converts")
    window = getattr(config, "sliding_window", None)
    if window is not None and context_length is not None and context_length > window:
        raise ConversionError(
            f"the model attends to the last {window} tokens only (sliding_window) and the context is {context_length}; "
            f"convert with data.sequence_length={window} or less"
        )


def attention_modules(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """Names and self-attention modules of ``model``, from the first layer to the last."""
    wanted = family_of(model.config).attention
    for name, module in model.named_modules():
        if type(module).__name__ == wanted:
            yield name, module


def head_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Query heads, key heads, and their width."""
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return heads, key_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def base_model(model: PreTrainedModel) -> nn.Module:
    """The transformer below the head."""
    return getattr(model, model.base_model_prefix)


def _known() -> str:
    return f"those that can be: {', '.join(ARCHITECTURES)}"
