"""Parallel paths of a block and their gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_helpers import hybrid, tokens

from seqmodels.configuration import convert, dump_yaml, parse_yaml
from seqmodels.layout import Layout
from seqmodels.models import LanguageModel, ModelConfig, account
from seqmodels.models.block import Parallel

WORDS = {
    "linear_attention": {"num_heads": 2, "decay": "data_dependent"},
    "window": {"layer": "attention", "num_heads": 2, "window": 5, "path_gate": 0.3},
    "swiglu": {"d_hidden": 24, "path_gate": 0.5},
    "mlp": {"d_hidden": 8},
}
PATTERN = "linear_attention|window|swiglu mlp gated_conv>swiglu|mlp swiglu"


def parallel(**changes: Any) -> LanguageModel:
    return hybrid(pattern=PATTERN, layers=WORDS, **changes)


def test_a_block_adds_its_gated_paths_on_one_normalised_input() -> None:
    stack, h = parallel().backbone, torch.randn(2, 7, 16, dtype=torch.float64)
    expected = h
    for block in stack.blocks:
        u = block.norm(expected)
        if not isinstance(block.layer, Parallel):
            expected = expected + block.layer(u).y
            continue
        for word, path in block.layer.named_paths():
            gate = block.layer.gate(word)
            expected = expected + (1 if gate is None else gate) * path(u).y
    torch.testing.assert_close(stack(h).hidden, stack.norm(expected))
    gated = [sorted(block.layer.gates) for block in stack.blocks if isinstance(block.layer, Parallel)]
    assert gated == [["swiglu", "window"], ["gated_conv_swiglu"], ["swiglu"]]


def test_gates_begin_at_their_configured_values_and_learn_without_decay() -> None:
    config = hybrid(pattern=PATTERN, layers=WORDS).config
    model = LanguageModel(config)
    gates = {name: gate.item() for name, gate in model.named_parameters() if ".gates." in name}
    assert sorted(gates.values()) == pytest.approx([0.3, 0.5, 0.5, 0.5])
    model.loss(tokens(2, 9)).loss.backward()
    assert all(dict(model.named_parameters())[name].grad.abs().item() > 0 for name in gates)
    assert all(dict(model.named_parameters())[name].dim() == 1 for name in gates)  # vectors are not decayed


def test_a_gate_of_zero_is_an_exact_no_op() -> None:
    model, ids = parallel(), tokens(2, 11)
    gate = model.backbone.blocks[0].layer.gates["window"]
    with torch.no_grad():
        gate.zero_()
    off = model(ids).logits
    model.backbone.blocks[0].layer.inactive.add("window")
    assert torch.equal(model(ids).logits, off)
    with torch.no_grad():
        gate.fill_(0.3)
    assert torch.equal(model(ids).logits, off)  # what does not run adds nothing whatever its gate


def test_sequence_pieces_and_tokens_agree() -> None:
    model, ids = parallel().eval(), tokens(2, 13)
    whole = model(ids, return_state=True)
    state = model.init_state(2, max_length=13)
    first = model(ids[:, :6], state, return_state=True)
    second = model(ids[:, 6:], first.state, return_state=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole.logits)
    stepped = torch.stack([model.step(ids[:, t], state) for t in range(13)], 1)
    torch.testing.assert_close(stepped, whole.logits)
    for (name, ours), (_, theirs) in zip(state.canonical().tensors(), second.state.canonical().tensors(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)


def test_packed_documents_are_documents_alone() -> None:
    model, ids = parallel().eval(), tokens(1, 12)
    packed = model(ids, layout=Layout.packed([[5, 7]], 12), return_state=True)
    alone = [model(ids[:, :5], return_state=True), model(ids[:, 5:], return_state=True)]
    torch.testing.assert_close(packed.logits, torch.cat([output.logits for output in alone], 1))


@pytest.mark.parametrize("where", ["path", "block"])
def test_what_does_not_run_keeps_its_state_and_has_no_gradient(where: str) -> None:
    model, ids = parallel(dropout=0.0), tokens(2, 8)
    if where == "path":
        model.backbone.blocks[0].layer.inactive.add("linear_attention")
        name, place = "backbone.blocks.0.layer.paths.0.", 0
    else:
        model.backbone.blocks[2].inactive = True
        name, place = "backbone.blocks.2.", 2
    model.loss(ids).loss.backward()
    silent = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    assert silent
    assert all(key.startswith(name) for key in silent)
    state = model.init_state(2, max_length=16)
    before = state.layers[place].clone()
    after = model(ids, state, return_state=True).state.layers[place]
    stepped = state.clone()
    model.step(ids[:, 0], stepped)
    parts = (before, after, stepped.layers[place])
    for part in zip(*(part.paths[0].tensors() if where == "path" else part.tensors() for part in parts), strict=True):
        assert all(torch.equal(tensor, part[0][1]) for _, tensor in part)
    whole, pieces = model(ids).logits, []
    for t in range(8):
        pieces.append(model.step(ids[:, t], state))
    torch.testing.assert_close(torch.stack(pieces, 1), whole)


def test_metrics_name_the_path_and_losses_add_up() -> None:
    layers = {"test_running_sum": {"path_gate": 0.1}, "again": {"layer": "test_running_sum", "path_gate": 0.2}}
    model = hybrid(pattern="test_running_sum|again|gated_conv", layers=layers)
    aux = model(tokens(2, 6)).aux
    assert set(aux) == {
        "size_loss", "block0.test_running_sum.size", "block0.again.size", "block0.test_running_sum.gate",
        "block0.again.gate",
    }  # fmt: skip
    u = model.backbone.blocks[0].norm(model.embedding(tokens(2, 6)))
    torch.testing.assert_close(aux["size_loss"], 2 * u.square().mean())
    model.backbone.blocks[0].layer.inactive.add("again")
    torch.testing.assert_close(model(tokens(2, 6)).aux["size_loss"], u.square().mean())


def test_round_trip_and_account() -> None:
    model = parallel()
    assert convert(parse_yaml(dump_yaml(model.config)), ModelConfig) == model.config
    rows = account(model.config, length=9, dtype=torch.float64)
    assert rows[-1].parameters == model.num_parameters() == sum(row.parameters for row in rows[:-1])
    assert rows[-1].state_bytes == model.init_state(1, max_length=9).nbytes
    assert {row.name: row.parameters for row in rows}["gates"] == 4


def test_compiles_whole() -> None:
    model, ids = parallel().eval(), tokens(2, 7)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("pattern", "layers", "message"),
    [
        ("mlp|mlp", {}, "a path appears twice in 'mlp|mlp'"),
        ("mlp>swiglu", {"mlp": {"path_gate": 1.0}}, "'mlp' has a gate, but in 'mlp>swiglu'"),
        ("mlp", {"mlp": {"path_gate": "wide"}}, "'path_gate' is 'wide'; expected the first value"),
        ("mlp", {"mlp": {"path_gate": True}}, "'path_gate' is True"),
        ("mlp", {"mlp": {"path_gate": float("nan")}}, "'path_gate' is nan"),
        ("mlp|swiglu", {"mlp": {"share": "a"}}, "'mlp|swiglu' is a branch of several layers; 'share'"),
    ],
)
def test_refusals(pattern: str, layers: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        ModelConfig(vocab_size=9, d_model=8, pattern=pattern, layers=layers)


def test_a_gate_of_one_block_alone() -> None:
    config = ModelConfig(vocab_size=9, d_model=8, blocks=("mlp", {"layer": "mlp", "path_gate": 0.25}))
    assert [block.paths[0].gate for block in config.block_specs()] == [None, 0.25]
