"""Meta tokens: learned vectors at the beginning of every document."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from model_helpers import hybrid, tokens
from torch import Tensor, nn

import seqmodels
from seqmodels import backends
from seqmodels.channel import CHANNELS
from seqmodels.configuration import convert, dump_yaml, parse_yaml
from seqmodels.layout import Layout
from seqmodels.mixers import MIXERS, MixerOutput
from seqmodels.models import LanguageModel, ModelConfig, account, generate, load_model, save_model
from seqmodels.models.arguments import default_arguments, layer_class
from seqmodels.ops.rotary import rotary, rotary_tables
from seqmodels.testing import LAWS, check_law

COUNT = 5
LAYERS = {
    "mamba2": {"d_state": 4, "head_dim": 8},
    "attention": {"num_heads": 2},
    "window": {"layer": "attention", "num_heads": 2, "window": 3},
    "kv_shift_attention": {"num_heads": 2, "window": 4},
    "chunk_moe": {"num_experts": 3, "d_hidden": 8, "chunk_size": 4},
    "linear_attention": {"num_heads": 2},
}
SMALL = {
    "sparse_global_attention": {"block": 4, "num_globals": 3},
    "s4_dplr": {"d_state": 4},
    "product_key_memory": {"num_heads": 2, "top_k": 3, "query_dim": 8, "num_subkeys": 6, "value_dim": 5},
}
PATTERN = "mamba2|window chunk_moe attention gated_conv>mlp kv_shift_attention"


def meta_model(**changes: Any) -> LanguageModel:
    return hybrid(**{"pattern": PATTERN, "layers": LAYERS, "meta_tokens": COUNT, **changes})


def prepended(model: LanguageModel, ids: Tensor) -> Tensor:
    """Logits of one document a row, the meta tokens written before it as ordinary positions."""
    assert model.meta_tokens is not None
    h = torch.cat([model.meta_tokens.expand(len(ids), -1, -1), model.embedding(ids)], dim=1)
    return model.logits(model.backbone(h).hidden[:, model.config.meta_tokens :])


def gradients(model: LanguageModel, logits: Tensor) -> dict[str, Tensor]:
    weight = torch.linspace(-3, 3, logits.numel(), dtype=logits.dtype).cos().view(logits.shape)
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad((logits * weight).sum(), parameters, allow_unused=True)
    return {name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None}


def one_layer(name: str, dtype: torch.dtype) -> LanguageModel:
    arguments = {key: 2 for key, default in default_arguments(layer_class(name)).items() if default is ...}
    if "window" in default_arguments(layer_class(name)):
        arguments["window"] = 6
    arguments |= SMALL.get(name, {})
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=31, d_model=64, pattern=f"{name} gated_conv", layers={name: arguments}, meta_tokens=4
    )
    return LanguageModel(config, dtype=dtype).eval()


def carries_meta_tokens(name: str) -> bool:
    return name != "hedgehog_window" and layer_class(name).causality == "causal"


@pytest.mark.parametrize("name", list(filter(carries_meta_tokens, (*MIXERS.shipped(), *CHANNELS.shipped()))))
def test_every_layer_equals_prepending(name: str) -> None:
    """Every layer passes on outputs and gradients through the state that all documents begin from."""
    model = one_layer(name, torch.float64)
    ids = tokens(2, 19, vocab_size=31)
    layout = Layout.packed([[7, 1, 11], [18]], 19, capacity=5)
    alone = [prepended(model, ids[0:1, :7]), prepended(model, ids[0:1, 7:8]), prepended(model, ids[0:1, 8:])]
    expected = torch.cat([*(part[0] for part in alone), prepended(model, ids[1:, :18])[0]])
    found = model(ids, layout=layout).logits[layout.valid]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    wanted = gradients(model, expected)
    assert wanted["meta_tokens"].abs().amax() > 1e-6
    torch.testing.assert_close(gradients(model, found), wanted, rtol=1e-8, atol=1e-9)
    stepped, state = [], model.init_state(2, max_length=19)
    assert state.nbytes == model.state_bytes(19, batch_size=2)
    for t in range(19):
        stepped.append(model.step(ids[:, t], state))
    torch.testing.assert_close(torch.stack(stepped, 1), model(ids).logits, rtol=1e-8, atol=1e-9)


@pytest.mark.skipif(backends.missing("cpu") is not None, reason=str(backends.missing("cpu")))
@pytest.mark.parametrize("name", list(filter(carries_meta_tokens, (*MIXERS.shipped(), *CHANNELS.shipped()))))
def test_gradient_through_the_kernels_that_take_float32(name: str) -> None:
    """The C++ kernels pass the gradient on to the state that documents begin from."""
    exact, model = one_layer(name, torch.float64), one_layer(name, torch.float32)
    model.load_state_dict(exact.state_dict())
    ids = tokens(2, 19, vocab_size=31)
    wanted, found = (gradients(part, part(ids).logits)["meta_tokens"].double() for part in (exact, model))
    with seqmodels.backend("reference"):
        plain = gradients(model, prepended(model, ids))["meta_tokens"].double()
    # Other orders of the same sums, whose rounding the definition shows in float32: 8 times that and a floor.
    bound = 8 * (plain - wanted).norm() + 64 * torch.finfo(torch.float32).eps * wanted.norm()
    assert (found - wanted).norm() <= bound
    assert (plain - wanted).norm() <= 1e-3 * wanted.norm()


class Backbone(nn.Module):
    """A language model with meta tokens between its embedding and its head, with a layer's signature."""

    causality = "causal"

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.model = LanguageModel(
            ModelConfig(
                vocab_size=8, d_model=d_model, pattern="mamba2|window attention>mlp", layers=LAYERS, meta_tokens=COUNT
            )
        )

    def forward(self, x, state=None, *, layout=None, return_state=False):
        if state is None:
            documents = len(x) if layout is None else layout.num_documents
            state = self.model._after_meta_tokens(documents, x.shape[1] if return_state else 0)
        return MixerOutput(*self.model.backbone(x, state, layout=layout, return_state=return_state))

    def step(self, x_t, state):
        return self.model.backbone.step(x_t, state)

    def init_state(self, batch_size, **options):
        return self.model.init_state(batch_size, **options)

    def state_bytes(self, context_length, *, batch_size=1, dtype=None):
        return self.model.state_bytes(context_length, batch_size=batch_size, dtype=dtype)


@pytest.mark.parametrize("law", [law for law in LAWS if law not in ("registration", "backend_agreement")])
def test_law(law: str) -> None:
    check_law(law, Backbone, d_model=16)


def dense_reference(model: LanguageModel, ids: Tensor, window: int) -> Tensor:
    """One attention layer over [meta tokens; document] with a mask, from nothing but the weights."""
    layer, block = model.backbone.blocks[0].layer, model.backbone.blocks[0]
    h = torch.cat([model.meta_tokens, model.embedding(ids)])
    length, count = len(h), model.config.meta_tokens
    x = h * (h.square().mean(-1, keepdim=True) + model.config.norm_epsilon).rsqrt() * block.norm.weight
    q, k, v = (x @ layer.in_proj.weight.T).view(length, 3, layer.num_heads, layer.head_dim).unbind(1)
    tables = rotary_tables(torch.arange(length), layer.rotary_dim, base=layer.rotary_base, dtype=h.dtype)
    q, k = (rotary(part[None], *tables)[0] for part in (q, k))
    i, j = torch.arange(length)[:, None], torch.arange(length)
    visible = (j <= i) & ((i - j < window) | (j < count))
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(layer.head_dim)
    y = torch.einsum("hij,jhd->ihd", scores.masked_fill(~visible, -math.inf).softmax(-1), v)
    h = (h + y.flatten(1) @ layer.out_proj.weight.T)[count:]
    norm = model.backbone.norm
    return model.logits(h * (h.square().mean(-1, keepdim=True) + model.config.norm_epsilon).rsqrt() * norm.weight)


def test_a_window_keeps_them_in_sight() -> None:
    """A window of 3 over texts of up to 40 tokens, against masks: outputs and every gradient."""
    window = 3
    model = hybrid(
        pattern="attention", layers={"attention": {"num_heads": 2, "window": window}}, meta_tokens=COUNT, norm="rms"
    )
    ids = tokens(2, 40)
    layout = Layout.packed([[13, 27], [2, 30]], 40)
    texts = [ids[0, :13], ids[0, 13:], ids[1, :2], ids[1, 2:32]]
    expected = torch.cat([dense_reference(model, text, window) for text in texts])
    found = model(ids, layout=layout).logits[layout.valid]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients(model, found), gradients(model, expected), rtol=1e-9, atol=1e-10)
    # The last token of 27, four windows away from the first, still depends on them.
    assert torch.autograd.grad(model(ids).logits[0, -1].square().sum(), model.meta_tokens)[0].abs().min() > 0


def test_decoding_never_evicts_them() -> None:
    model = meta_model().eval()
    state = model.init_state(2, max_length=60)
    held = [layer.paths[1] for layer in state.layers[:1]] + [state.layers[4]]
    before = [(layer.key[:, :, :COUNT].clone(), layer.value[:, :, :COUNT].clone()) for layer in held]
    ids = tokens(2, 60)
    stepped = torch.stack([model.step(ids[:, t], state) for t in range(60)], 1)
    torch.testing.assert_close(stepped, prepended(model, ids))
    for layer, (key, value), window in zip(held, before, (3, 4), strict=True):
        assert layer.key.shape[2] == COUNT + window
        assert key.abs().amin((0, 2, 3)).min() > 0
        assert torch.equal(layer.key[:, :, :COUNT], key)
        assert torch.equal(layer.value[:, :, :COUNT], value)
        assert layer.position.tolist() == [COUNT + 60] * 2


def test_sequence_pieces_and_left_padding() -> None:
    model, ids = meta_model().eval(), tokens(3, 17)
    expected = prepended(model, ids)
    whole = model(ids, return_state=True)
    torch.testing.assert_close(whole.logits, expected)
    first = model(ids[:, :6], model.init_state(3, max_length=17), return_state=True)
    second = model(ids[:, 6:], first.state, return_state=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), expected)
    for (name, ours), (_, theirs) in zip(
        whole.state.canonical().tensors(), second.state.canonical().tensors(), strict=True
    ):
        torch.testing.assert_close(ours, theirs, msg=name)
    padded = model(ids, layout=Layout.left_padded([17, 4, 9])).logits
    for row, length in enumerate((17, 4, 9)):
        torch.testing.assert_close(padded[row, 17 - length :], prepended(model, ids[row : row + 1, 17 - length :])[0])


def test_a_returned_state_keeps_whole_windows() -> None:
    """Layers with windows alone go on without end behind a short text, as they do without meta tokens."""
    pattern = "mamba2|window kv_shift_attention>mlp sparse_global_attention"
    layers = {**LAYERS, "sparse_global_attention": {"num_heads": 2, "window": 4, "block": 4, "num_globals": 2}}
    model, ids = meta_model(pattern=pattern, layers=layers).eval(), tokens(2, 30)
    state = model(ids[:, :1], return_state=True).state
    like = model.init_state(2)
    assert [tensor.shape for _, tensor in state.tensors()] == [tensor.shape for _, tensor in like.tensors()]
    stepped = torch.stack([model.step(ids[:, t], state) for t in range(1, 30)], 1)
    torch.testing.assert_close(stepped, prepended(model, ids)[:, 1:])


def test_generation_of_unequal_prompts() -> None:
    model = meta_model().eval()
    prompts = [tokens(1, 9)[0].tolist(), [3], tokens(1, 4, seed=5)[0].tolist()]
    together = generate(model, prompts, max_new_tokens=8)
    for prompt, new in zip(prompts, together, strict=True):
        text = list(prompt)
        for token in new:
            assert int(prepended(model, torch.tensor([text]))[0, -1].argmax()) == token
            text.append(token)


def test_a_state_to_decode_with_holds_no_graph() -> None:
    model = meta_model()
    states = {True: model.train().init_state(2, max_length=9), False: model.eval().init_state(2, max_length=9)}
    for training, state in states.items():
        assert any(tensor.requires_grad for _, tensor in state.tensors()) == training
    found = gradients(model, model(tokens(2, 9), states[True]).logits)["meta_tokens"]
    expected = gradients(model, prepended(model, tokens(2, 9)))["meta_tokens"]
    torch.testing.assert_close(found, expected)


def test_loss_is_of_the_tokens_alone() -> None:
    model, ids = meta_model(), tokens(2, 12)
    output = model.loss(ids)
    assert int(output.num_targets) == 2 * 11
    log_p = prepended(model, ids)[:, :-1].log_softmax(-1)
    expected = -log_p.gather(-1, ids[:, 1:, None]).sum()
    torch.testing.assert_close(output.cross_entropy, expected.detach())


@pytest.mark.parametrize("changes", [{"activation_checkpointing": True}, {"residual_in_float32": True}])
def test_options_of_the_stack(changes: dict[str, Any]) -> None:
    model, ids = meta_model(**changes).train(), tokens(2, 9)
    torch.testing.assert_close(gradients(model, model(ids).logits), gradients(model, prepended(model, ids)))


def test_bfloat16_and_autocast_keep_the_states_dtypes() -> None:
    model = meta_model(dtype=torch.bfloat16).eval()
    ids = tokens(2, 9)
    expected = {name: tensor.dtype for name, tensor in model.backbone.init_state(2, max_length=9).tensors()}
    for state in (model.init_state(2, max_length=9), model(ids, return_state=True).state):
        assert {name: tensor.dtype for name, tensor in state.tensors()} == expected
    model = meta_model(dtype=torch.float32, pattern=f"{PATTERN} linear_attention").eval()
    narrow = model.init_state(2, max_length=9, dtype=torch.bfloat16)
    like = model.backbone.init_state(2, max_length=9 + COUNT, dtype=torch.bfloat16)
    for (name, tensor), (_, wanted) in zip(narrow.tensors(), like.tensors(), strict=True):
        assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape), name
    assert narrow.nbytes == model.state_bytes(9, batch_size=2, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        whole = model(ids, return_state=True)
    exact = model(ids).logits
    assert all(tensor.dtype != torch.bfloat16 for _, tensor in whole.state.tensors())
    assert (whole.logits - exact).norm() < 0.05 * exact.norm()  # 8 bits, through five blocks


def test_compiles_whole() -> None:
    model, ids = meta_model(pattern="window|attention").eval(), tokens(2, 9)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, return_state=True).logits, model(ids).logits)


def test_round_trips_and_account(tmp_path) -> None:
    model = meta_model(dtype=torch.float32).eval()
    assert convert(parse_yaml(dump_yaml(model.config)), ModelConfig) == model.config
    loaded = load_model(save_model(model, tmp_path / "model")).model
    assert torch.equal(loaded.meta_tokens, model.meta_tokens)
    assert torch.equal(loaded(tokens(1, 7)).logits, model(tokens(1, 7)).logits)
    without = LanguageModel(convert({**parse_yaml(dump_yaml(model.config)), "meta_tokens": 0}, ModelConfig))
    assert model.num_parameters() == without.num_parameters() + COUNT * 16
    rows = account(model.config, length=30)
    assert {row.name: row.parameters for row in rows}["meta tokens"] == COUNT * 16
    assert rows[-1].parameters == model.num_parameters()
    assert rows[-1].state_bytes == model.state_bytes(30) == model.init_state(1, max_length=30).nbytes
    head = 2 * 30 * 16 * 50
    assert rows[-1].flops == model.flops(30) == without.backbone.flops(30 + COUNT) + head + pinned_pairs(30 + COUNT)


def pinned_pairs(length: int) -> int:
    """What the two windows read beyond themselves: 4 operations for each pair and unit of width (16)."""
    pairs = 0
    for window in (3, 4):
        pairs += sum(min(COUNT, max(0, t - window + 1)) for t in range(length))
    return 4 * 16 * pairs


def test_none_means_nothing_changes() -> None:
    model = meta_model(meta_tokens=0)
    assert model.meta_tokens is None
    assert "meta_tokens" not in model.state_dict()
    assert not any(getattr(layer, "pinned_tokens", 0) for layer in model.backbone.layers())


def test_pinned_tokens_of_a_layer_stay_beside_them() -> None:
    layers = {"attention": {"num_heads": 2, "window": 4, "pinned_tokens": 2, "share": "a"}}
    model = hybrid(pattern="attention swiglu attention", layers=layers, meta_tokens=COUNT)
    assert [layer.pinned_tokens for layer in model.backbone.layers() if hasattr(layer, "pinned_tokens")] == [COUNT + 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta_tokens": -1}, "meta_tokens is -1; expected a number of learned vectors"),
        ({"meta_tokens": 1.5}, "meta_tokens is 1.5; expected a number of learned vectors"),
        ({"meta_tokens": True}, "meta_tokens is True; expected a number of learned vectors"),
        ({"meta_tokens": 2, "pattern": "mlp swiglu"}, "every layer treats each token alone.* set meta_tokens: 0"),
        (
            {"meta_tokens": 2, "pattern": "mlp chunk_moe", "layers": {"chunk_moe": {"router_input": "paper_mean"}}},
            r"block 1 \(chunk_moe\) cannot be used with meta tokens.*averages a whole chunk.*router_input='past'",
        ),
        ({"meta_tokens": 2, "objective": "prefix"}, "meta_tokens is 2, but with objective 'prefix'"),
        (
            {"meta_tokens": 2, "pattern": "mlp hedgehog_window", "layers": {"hedgehog_window": {"num_heads": 2}}},
            r"block 1 \(hedgehog_window\) cannot be used with meta tokens.*joins the linear sums",
        ),
    ],
)
def test_refusals(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LanguageModel(ModelConfig(**{"vocab_size": 9, "d_model": 8, "pattern": "mlp", **changes}))


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; expected a positive integer"),
        ({"batch_size": -1}, "batch_size is -1; expected a positive integer"),
        ({"batch_size": 1, "max_length": -2}, "max_length is -2; expected a number of tokens"),
    ],
)
def test_states_of_no_size_are_refused(count: int, options: dict[str, int], message: str) -> None:
    model = meta_model(pattern="attention", meta_tokens=count)
    with pytest.raises(ValueError, match=message):
        model.init_state(**{"max_length": 4, **options})


def test_backends_agree() -> None:
    model, ids = meta_model(dtype=torch.float32).eval(), tokens(2, 12)
    with seqmodels.backend("reference"):
        expected = model(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)
