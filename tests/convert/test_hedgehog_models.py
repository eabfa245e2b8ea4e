"""Converted transformers models: their logits, masks, caches and generation, in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, GPT2Model, OPTConfig, OPTForCausalLM

from seqmodels.convert.files import ConversionError
from seqmodels.convert.hedgehog import AttentionSettings, HedgehogCache, load, swap_attention
from seqmodels.convert.hedgehog.models import load_original
from seqmodels.mixers.hedgehog import HedgehogCore
from tests.convert.hedgehog_models import naive_attention, perturb, tiny, tokens

DECODERS = ("gpt2", "llama", "mistral")
FAMILIES = (*DECODERS, "bert")
# Two orders of summation of float64 numbers below 100, over some hundred operations a layer.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def converted(family: str, kind: str = "hedgehog", **options: Any) -> Any:
    model = swap_attention(tiny(family, **options), AttentionSettings(kind=kind, window=5))
    return perturb(model).double().eval()


def left_padded(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tokens(batch, length), torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch):
        mask[row, : 2 * row] = 0
    return ids * mask, mask


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_softmax_kept_gives_the_original_logits(family: str) -> None:
    model = tiny(family)
    ids, mask = left_padded(3, 20)
    expected = model(ids).logits, model(ids, attention_mask=mask).logits
    kept = swap_attention(model, AttentionSettings(kind="softmax"))
    assert torch.equal(kept(ids).logits, expected[0])
    assert torch.equal(kept(ids, attention_mask=mask).logits, expected[1])


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "kind", "options"),
    [
        ("gpt2", "hedgehog", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", "hedgehog_window", {"scale_attn_by_inverse_layer_idx": True}),
        ("llama", "hedgehog", {}),
        ("llama", "hedgehog_window", {}),
        ("mistral", "hedgehog", {}),
        ("mistral", "hedgehog_window", {"sliding_window": None}),
        ("bert", "hedgehog", {}),
    ],
)
def test_logits_are_those_of_the_definition(family: str, kind: str, options: dict[str, Any]) -> None:
    model, ids = converted(family, kind, **options), tokens(2, 12)
    found = model(ids, use_cache=False).logits
    AttentionInterface.register("naive_hedgehog", naive_attention)
    for module in model.modules():
        if hasattr(module, "linear_core"):
            module.naive = AttentionSettings(kind=kind, window=5)
            module.naive_causal = family != "bert"
    model.set_attn_implementation("naive_hedgehog")
    torch.testing.assert_close(found, model(ids, use_cache=False).logits, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hedgehog", "hedgehog_window"])
@pytest.mark.parametrize("family", DECODERS)
def test_padding_is_as_if_it_were_not_there(family: str, kind: str) -> None:
    model = converted(family, kind)
    ids, mask = left_padded(3, 14)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    left = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    for row in range(3):
        skipped = 2 * row
        alone = model(ids[row : row + 1, skipped:], use_cache=False).logits
        torch.testing.assert_close(left[row : row + 1, skipped:], alone, **CLOSE)
        kept = 14 - skipped
        right_ids = torch.zeros(1, 14, dtype=torch.int64)
        right_ids[:, :kept] = ids[row, skipped:]
        right_mask = torch.zeros(1, 14, dtype=torch.int64)
        right_mask[:, :kept] = 1
        right = model(right_ids, attention_mask=right_mask, use_cache=False).logits
        torch.testing.assert_close(right[:, :kept], alone, **CLOSE)


@torch.no_grad()
def test_padding_of_an_encoder() -> None:
    model, ids = converted("bert"), tokens(2, 12)
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[1, 8:] = 0
    both = model(ids, attention_mask=mask).logits
    torch.testing.assert_close(both[1:, :8], model(ids[1:, :8]).logits, **CLOSE)
    torch.testing.assert_close(both[:1], model(ids[:1]).logits, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hedgehog", "hedgehog_window"])
@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("beams", [1, 3])
def test_generate_equals_a_full_forward_at_every_step(family: str, kind: str, beams: int) -> None:
    model = converted(family, kind)
    ids, mask = left_padded(2, 7)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=9, min_new_tokens=9, do_sample=False, num_beams=beams,
        return_dict_in_generate=True, output_logits=True, output_scores=True, pad_token_id=0,
    )  # fmt: skip
    sequences = out.sequences

    def full(length: int) -> torch.Tensor:
        seen = torch.cat([mask, mask.new_ones(2, length - 7)], 1)
        positions = (seen.cumsum(-1) - 1).clamp_min(0)
        return model(sequences[:, :length], attention_mask=seen, position_ids=positions, use_cache=False).logits

    # generate keeps what it returns in float32: half a unit in its last place, 6e-8, times a few terms.
    rounding = {"rtol": 1e-6, "atol": 1e-6, "check_dtype": False}
    if beams == 1:
        for step, logits in enumerate(out.logits):
            torch.testing.assert_close(logits, full(7 + step)[:, -1], **rounding)
    else:  # a beam's score is the mean log probability of its tokens, each given the reordered state of its past
        chosen = full(16).log_softmax(-1)[:, 6:-1].gather(-1, sequences[:, 7:, None])[..., 0]
        torch.testing.assert_close(out.sequences_scores, chosen.mean(1), **rounding)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hedgehog", "hedgehog_window"])
def test_the_cache(kind: str) -> None:
    model, ids = converted("llama", kind), tokens(3, 21)
    whole = model(ids, use_cache=False).logits
    cache = HedgehogCache(model.config.num_hidden_layers)
    sizes, begin = [], 0
    for length in (6, 1, 1, 8, 2, 1):
        out = model(ids[:, begin : begin + length], past_key_values=cache)
        torch.testing.assert_close(out.logits, whole[:, begin : begin + length], **CLOSE)
        begin += length
        sizes.append(cache.nbytes)
        assert cache.get_seq_length() == begin
    assert len(set(sizes)) == 1, "the state grew"
    order = torch.tensor([2, 0, 0, 1])
    moved = copy.deepcopy(cache)
    moved.reorder_cache(order)
    out = model(ids[order, begin : begin + 1], past_key_values=moved)
    torch.testing.assert_close(out.logits[:, 0], whole[order, begin], **CLOSE)
    repeated = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(2)
    out = model(ids.repeat_interleave(2, 0)[:, begin : begin + 1], past_key_values=repeated)
    torch.testing.assert_close(out.logits[:, 0], whole.repeat_interleave(2, 0)[:, begin], **CLOSE)
    selected = copy.deepcopy(cache)
    selected.batch_select_indices(torch.tensor([1]))
    out = model(ids[1:2, begin : begin + 1], past_key_values=selected)
    torch.testing.assert_close(out.logits[:, 0], whole[1:2, begin], **CLOSE)
    with pytest.raises(NotImplementedError, match="cannot be taken back"):
        cache.crop(-1)
    with pytest.raises(NotImplementedError, match="rollback"):
        cache.activate_past_recording()
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    torch.testing.assert_close(model(ids[:, :5], past_key_values=cache).logits, whole[:, :5], **CLOSE)


@torch.no_grad()
def test_a_forward_makes_its_own_cache() -> None:
    model, ids = converted("gpt2"), tokens(2, 8)
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :5])
    assert isinstance(first.past_key_values, HedgehogCache)
    second = model(ids[:, 5:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, whole[:, 5:], **CLOSE)
    with pytest.raises(TypeError, match="DynamicCache; a converted model keeps sums"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ConversionError, match="has 5 layers; this model has 2"):
        model(ids, past_key_values=HedgehogCache(5))
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static", pad_token_id=0)


@torch.no_grad()
def test_masks_that_cannot_be_expressed_are_refused() -> None:
    model, ids = converted("llama"), tokens(2, 8)
    hole = torch.tensor([[1] * 8, [1, 1, 0, 1, 1, 1, 0, 1]])
    with pytest.raises(ValueError, match="row 1 is 11011101: neither left padding"):
        model(ids, attention_mask=hole)
    with pytest.raises(ValueError, match="4 dimensions"):
        model(ids, attention_mask=torch.ones(2, 1, 8, 8, dtype=torch.bool).tril())
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 5\); expected"):
        model(ids, attention_mask=torch.ones(2, 5, dtype=torch.int64))
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    for use_cache in (False, True):
        for mask in (None, torch.ones(2, 8, dtype=torch.int64)):
            with pytest.raises(ValueError, match="row 0 is 0, 1, 2, 3, 0, 1, 2, 3: packed sequences"):
                model(ids, position_ids=packed, attention_mask=mask, use_cache=use_cache)
    right = torch.ones(2, 8, dtype=torch.int64)
    right[0, 6:] = 0
    cache = model(ids, attention_mask=right).past_key_values
    with pytest.raises(ValueError, match="neither left padding"):
        model(ids[:, :1], attention_mask=torch.cat([right, right.new_ones(2, 1)], 1), past_key_values=cache)


@torch.no_grad()
def test_another_attention_implementation_is_refused() -> None:
    model, ids = converted("llama"), tokens(2, 8)
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="attention implementation is 'sdpa'"):
        model(ids)


@torch.no_grad()
def test_decoding_behind_padding_takes_single_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = converted("llama"), tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = model(ids, attention_mask=mask).past_key_values
    monkeypatch.setattr(HedgehogCore, "forward", None)
    model(ids[:, :1], attention_mask=torch.cat([mask, mask[:, -1:]], 1), past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["hedgehog", "hedgehog_window"])
def test_attention_weights_on_request(kind: str) -> None:
    model, ids = converted("gpt2", kind), tokens(2, 11)
    out = model(ids, output_attentions=True)
    assert len(out.attentions) == 2
    torch.testing.assert_close(out.logits, model(ids).logits, **CLOSE)
    for weights in out.attentions:
        assert weights.shape == (2, 4, 11, 11)
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), **CLOSE)
        assert not weights.triu(1).any()
    assert model(ids, output_attentions=False).attentions is None
    with pytest.raises(ValueError, match="a linear state no longer holds"):
        model(ids[:, :1], past_key_values=out.past_key_values, output_attentions=True)
    assert model(ids).attentions is None, "the request outlived the call that failed"


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family: str, tmp_path: Any) -> None:
    model, ids = converted(family), tokens(2, 9)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again) is type(model)
    assert again.config.hedgehog == model.config.hedgehog
    torch.testing.assert_close(again(ids).logits, model(ids).logits, **CLOSE)
    if family != "bert":
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is type(model)
    torch.testing.assert_close(copy.deepcopy(model)(ids).logits, model(ids).logits, **CLOSE)
    assert load(tmp_path, dtype=torch.bfloat16)(ids).logits.isfinite().all()


def test_what_cannot_be_converted_is_named(tmp_path: Any) -> None:
    other = OPTForCausalLM(OPTConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, ffn_dim=8,
                                     num_attention_heads=1, word_embed_proj_dim=8))  # fmt: skip
    other.save_pretrained(tmp_path / "opt")
    with pytest.raises(ConversionError, match=r"'opt' cannot be converted; those that can be: GPT2LMHeadModel, Llama"):
        load_original(str(tmp_path / "opt"))
    with pytest.raises(ConversionError, match=r"GPT2Model cannot be converted; those that can be"):
        swap_attention(GPT2Model(tiny("gpt2").config), AttentionSettings())
    with pytest.raises(ConversionError, match="cross-attention"):
        swap_attention(tiny("gpt2", add_cross_attention=True), AttentionSettings())
    with pytest.raises(ConversionError, match="is_decoder"):
        swap_attention(tiny("bert", is_decoder=True), AttentionSettings())
    with pytest.raises(ConversionError, match="use kind 'hedgehog'"):
        swap_attention(tiny("bert"), AttentionSettings(kind="hedgehog_window"))
    with pytest.raises(ConversionError, match="feature_map='identity'"):
        swap_attention(tiny("gpt2"), AttentionSettings(feature_map="identity"))
    with pytest.raises(ConversionError, match="converted already"):
        swap_attention(converted("gpt2"), AttentionSettings())
    with pytest.raises(ConversionError, match=r"holds no config\.json"):
        load(tmp_path)
    tiny("gpt2").save_pretrained(tmp_path / "plain")
    with pytest.raises(ConversionError, match="not a converted model"):
        load(tmp_path / "plain")
