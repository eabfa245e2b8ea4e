"""The whole model obeys the laws its layers obey."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from model_helpers import HYBRID, hybrid, tokens
from torch import Tensor

from seqmodels.layout import Layout
from seqmodels.models import LanguageModel, ModelConfig, next_token_targets

TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def gradients(model: LanguageModel) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    "changes", [{}, {"norm": "layer", "norm_place": "post"}, {"norm": "none"}, {"tie_head": False}]
)
def test_split_and_step_agree_with_the_whole(changes: dict) -> None:
    model, ids = hybrid(**changes), tokens(3, 17)
    whole = model(ids, model.init_state(3, max_length=17), return_state=True)
    close(model(ids).logits, whole.logits)
    for cuts in ([1, 16], [5, 6, 6], [16, 1]):
        state, pieces = model.init_state(3, max_length=17), []
        for piece in ids.split(cuts, dim=1):
            output = model(piece, state, return_state=True)
            state = output.state
            pieces.append(output.logits)
        close(torch.cat(pieces, 1), whole.logits)
        for (name, tensor), (_, expected) in zip(
            state.canonical().tensors(), whole.state.canonical().tensors(), strict=True
        ):
            torch.testing.assert_close(tensor, expected, **TOLERANCE, msg=name)
    state = model.init_state(3, max_length=17)
    pointers = [tensor.data_ptr() for _, tensor in state.tensors()]
    close(torch.stack([model.step(ids[:, t], state) for t in range(17)], 1), whole.logits)
    assert [tensor.data_ptr() for _, tensor in state.tensors()] == pointers
    for (name, tensor), (_, expected) in zip(
        state.canonical().tensors(), whole.state.canonical().tensors(), strict=True
    ):
        torch.testing.assert_close(tensor, expected, **TOLERANCE, msg=name)


def test_gradients_flow_through_a_carried_state() -> None:
    model, ids = hybrid(), tokens(2, 12)
    targets = next_token_targets(ids)
    model.loss(ids, targets).loss.backward()
    whole = gradients(model)
    state, total, count = model.init_state(2, max_length=12), 0.0, 0
    for piece, target in zip(ids.split(5, 1), targets.split(5, 1), strict=True):
        output = model(piece, state, return_state=True)
        state = output.state
        total = total + torch.nn.functional.cross_entropy(
            output.logits.flatten(0, 1), target.flatten(), reduction="sum"
        )
        count += int((target >= 0).sum())
    (total / count).backward()
    for name, gradient in gradients(model).items():
        close(gradient, whole[name])


def test_forward_does_not_touch_the_state_it_is_given() -> None:
    model, ids = hybrid(), tokens(2, 6)
    state = model(ids, model.init_state(2, max_length=20), return_state=True).state
    before = state.clone()
    model(ids, state, return_state=True)
    for (_, tensor), (_, expected) in zip(state.tensors(), before.tensors(), strict=True):
        assert torch.equal(tensor, expected)


def test_packed_documents_are_as_if_alone() -> None:
    model = hybrid()
    lengths = [[4, 1, 7], [9]]
    layout = Layout.packed(lengths, 13)
    ids = tokens(2, 13)
    packed = model(ids, layout=layout, return_state=True)
    model.loss(ids, layout=layout).loss.backward()
    together = gradients(model)
    total, count, slot = 0.0, 0, 0
    for row, entries in enumerate(lengths):
        column = 0
        for entry in entries:
            alone_ids = ids[row : row + 1, column : column + entry]
            alone = model(alone_ids, return_state=True)
            close(packed.logits[row, column : column + entry], alone.logits[0])
            if entry > 1:
                total = total + model.loss(alone_ids).loss * (entry - 1)
                count += entry - 1
            slot, column = slot + 1, column + entry
    (total / count).backward()
    for name, gradient in gradients(model).items():
        close(gradient, together[name])


def test_left_padding_leaks_nothing() -> None:
    model = hybrid()
    lengths = [3, 11, 1]
    layout = Layout.left_padded(lengths)
    ids = tokens(3, 11)
    padded = model(ids, model.init_state(3, max_length=20), layout=layout, return_state=True)
    following = tokens(3, seed=5)
    stepped = model.step(following, padded.state)
    for row, length in enumerate(lengths):
        alone = model(ids[row : row + 1, 11 - length :], model.init_state(1, max_length=20), return_state=True)
        close(padded.logits[row, 11 - length :], alone.logits[0])
        close(stepped[row], model.step(following[row : row + 1], alone.state)[0])


def test_causality() -> None:
    model, ids = hybrid(), tokens(1, 14)
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 50
    close(model(changed).logits[:, :9], model(ids).logits[:, :9])
    assert not torch.allclose(model(changed).logits[:, 9:], model(ids).logits[:, 9:])


def test_step_agrees_with_forward_in_float32_over_512_tokens() -> None:
    model, ids = hybrid(dtype=torch.float32), tokens(2, 512)
    whole = model(ids).logits
    state = model.init_state(2, max_length=512)
    stepped = torch.stack([model.step(ids[:, t], state) for t in range(512)], 1)
    assert (stepped - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_compiles_whole_and_once_for_all_lengths() -> None:
    model = hybrid(dtype=torch.float32)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda ids: model.loss(ids).loss, fullgraph=True, backend=counter)
    for length in (12, 19, 33, 40):
        ids = tokens(3, length)
        expected = model.loss(ids).loss
        expected.backward()
        wanted = gradients(model)
        loss = compiled(ids)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)
    assert counter.frame_count <= 2  # the first length, then any


def test_compiled_step_updates_the_state_in_place() -> None:
    model, ids = hybrid(dtype=torch.float32), tokens(2, 6)
    torch._dynamo.reset()
    step = torch.compile(model.step, fullgraph=True, backend="aot_eager")
    state, expected = model.init_state(2, max_length=8), model.init_state(2, max_length=8)
    for t in range(6):
        torch.testing.assert_close(step(ids[:, t], state), model.step(ids[:, t], expected))


def test_loss_is_the_mean_cross_entropy_of_the_logits() -> None:
    model, ids = hybrid(), tokens(3, 9)
    targets = next_token_targets(ids)
    targets[1, 2:5] = -100
    expected = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten())
    for chunk_size in (None, 1, 4, 1000):
        output = model.loss(ids, targets, chunk_size=chunk_size)
        close(output.loss, expected)
        close(output.cross_entropy / output.num_targets, expected)
    assert output.num_targets == (targets >= 0).sum() == 3 * 8 - 3


def test_no_scored_token_is_a_loss_of_zero() -> None:
    model = hybrid()
    output = model.loss(tokens(2, 1))
    output.loss.backward()
    assert output.loss == 0
    assert output.num_targets == 0
    assert all((gradient == 0).all() for gradient in gradients(model).values())


def test_targets_stay_inside_documents_and_after_prefixes() -> None:
    ids = tokens(2, 6)
    layout = Layout.packed([[2, 3], [6]], 6, prefix_lengths=[0, 2, 4])
    expected = torch.full((2, 6), -100)
    expected[0, 0] = ids[0, 1]
    expected[0, 4] = -100
    expected[1, 4] = ids[1, 5]
    assert torch.equal(next_token_targets(ids, layout), expected)
    layout = Layout.packed([[2, 3], [6]], 6)
    expected = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    expected[0, 1] = expected[0, 4] = -100
    assert torch.equal(next_token_targets(ids, layout), expected)


def test_auxiliary_losses_add_up_and_metrics_keep_their_block() -> None:
    model = hybrid(pattern="test_running_sum swiglu test_running_sum>test_running_sum")
    ids = tokens(2, 5)
    output = model.loss(ids)
    plain = torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), next_token_targets(ids).flatten())
    assert set(output.aux) == {"size_loss", "block0.size", "block2.0.size", "block2.1.size"}
    close(output.loss, plain + output.aux["size_loss"])
    parts = [hybrid(pattern="test_running_sum")(ids).aux["size_loss"]]
    assert output.aux["size_loss"] > parts[0] > 0


def test_shared_weights_have_one_set_and_a_state_a_site() -> None:
    layers = {**HYBRID["layers"], "again": {"layer": "attention", "num_heads": 2, "share": "a"}}
    model = hybrid(pattern="again swiglu again", layers=layers)
    assert model.num_parameters() == hybrid(pattern="again swiglu", layers=layers).num_parameters()
    state = model.init_state(2, max_length=9)
    assert len(state.layers) == 3
    assert state.layers[0].key.data_ptr() != state.layers[2].key.data_ptr()
    ids = tokens(2, 9)
    close(torch.stack([model.step(ids[:, t], state) for t in range(9)], 1), model(ids).logits)
    assert not torch.allclose(state.layers[0].key, state.layers[2].key)
    twin = copy.deepcopy(model)
    assert twin.backbone.blocks[0] is not model.backbone.blocks[0]
    close(twin(ids).logits, model(ids).logits)
    assert not any(
        left.data_ptr() == right.data_ptr()
        for name, left in model.state_dict().items()
        for other, right in model.state_dict().items()
        if name != other
    )


def test_residual_stream_in_float32_beside_bfloat16_weights() -> None:
    model = hybrid(residual_in_float32=True, pattern="8x swiglu").to(torch.bfloat16)
    seen = []
    for block in model.backbone.blocks:
        block.register_forward_hook(lambda _module, inputs, output: seen.append((inputs[0].dtype, output[0].dtype)))
        block.layer.register_forward_hook(
            lambda _module, inputs, output: seen.append((inputs[0].dtype, output.y.dtype))
        )
    ids = tokens(2, 7)
    logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    assert set(seen) == {(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)}
    outputs = []
    model.backbone.blocks[-1].register_forward_hook(lambda _module, _inputs, output: outputs.append(output[0]))
    model(ids)
    assert not torch.equal(outputs[0], outputs[0].to(torch.bfloat16).float())  # the sum was not rounded on the way


def test_activation_checkpointing_changes_no_number() -> None:
    model, ids = hybrid(dropout=0.3), tokens(2, 9)
    other = hybrid(dropout=0.3, activation_checkpointing=True)
    results = []
    for each in (model, other):
        torch.manual_seed(3)
        output = each.loss(ids)
        output.loss.backward()
        results.append((output.loss, gradients(each)))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        assert torch.equal(gradient, results[1][1][name]), name


def test_activation_checkpointing_stores_less() -> None:
    ids = tokens(4, 64)

    def stored(checkpointing: bool) -> int:
        model = hybrid(pattern="6x swiglu", activation_checkpointing=checkpointing)
        kept: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model.loss(ids).loss
        weights = {parameter.data_ptr() for parameter in model.parameters()}
        assert loss.requires_grad
        return sum(tensor.nbytes for pointer, tensor in kept.items() if pointer not in weights)

    assert stored(True) < 0.5 * stored(False)


def test_autocast_trains_with_float32_weights() -> None:
    model, ids = hybrid(dtype=torch.float32), tokens(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        output = model.loss(ids)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model).values())
    torch.testing.assert_close(output.loss, model.loss(ids).loss, rtol=0.03, atol=0)


@pytest.mark.parametrize("value", [-1, 50])
def test_token_ids_out_of_range_are_named(value: int) -> None:
    model, ids = hybrid(), tokens(2, 5)
    ids[1, 3] = value
    message = rf"tokens\[1, 3\] is {value}; expected 0 <= id < vocab_size=50"
    for call in (model, model.loss, model.encode):
        with pytest.raises(ValueError, match=message):
            call(ids)
    with pytest.raises(ValueError, match=rf"tokens_t\[1\] is {value}"):
        model.step(ids[:, 3], model.init_state(2, max_length=4))
    targets = tokens(2, 5)
    targets[0, 1] = -7
    with pytest.raises(ValueError, match=r"targets\[0, 1\] is -7; .*or -100"):
        model.loss(tokens(2, 5), targets)


def test_wrong_inputs_are_refused() -> None:
    model, ids = hybrid(), tokens(2, 5)
    with pytest.raises(TypeError, match=r"dtype torch\.float32; expected integers"):
        model(ids.float())
    with pytest.raises(ValueError, match=r"shape \(5,\); expected \(batch, length\)"):
        model(ids[0])
    with pytest.raises(ValueError, match=r"shape \(2, 0\)"):
        model(ids[:, :0])
    with pytest.raises(ValueError, match=r"layout is for a grid of \(2, 6\)"):
        model(ids, layout=Layout.full(2, 6))
    with pytest.raises(ValueError, match=r"targets is \(2, 4\)"):
        model.loss(ids, ids[:, 1:])
    with pytest.raises(ValueError, match=r"step takes tokens of shape \(batch,\)"):
        model.step(ids, model.init_state(2, max_length=5))
    with pytest.raises(TypeError, match="state is a tuple; expected a ModelState"):
        model(ids, ())
    with pytest.raises(ValueError, match="the state has 1 blocks, this model 7"):
        model(ids, hybrid(pattern="swiglu").init_state(2))


def test_causal_models_refuse_what_sees_the_future() -> None:
    with pytest.raises(ValueError, match=r"block 1 \(test_bidirectional\) is bidirectional"):
        hybrid(pattern="swiglu test_bidirectional")
    with pytest.raises(ValueError, match=r"block 0 \(test_bidirectional\)"):
        hybrid(pattern="swiglu>test_bidirectional")
    with pytest.raises(ValueError, match="norm 'batch' takes statistics over the length"):
        hybrid(norm="batch")
    with pytest.raises(ValueError, match=r"block 0 \(test_prefix\) reads a prefix.*objective: prefix"):
        hybrid(pattern="test_prefix")


def test_the_prefix_objective_scores_nothing_inside_the_prefix() -> None:
    model, ids = hybrid(pattern="test_prefix swiglu", objective="prefix"), tokens(2, 8)
    layout = Layout.full(2, 8, prefix_lengths=[3, 5])
    output = model.loss(ids, layout=layout)
    assert output.num_targets == (8 - 1 - 3) + (8 - 1 - 5)
    with pytest.raises(ValueError, match="needs a layout with prefix_lengths"):
        model.loss(ids)
    targets = next_token_targets(ids, layout)
    targets[1, 4] = 3
    with pytest.raises(ValueError, match=r"targets\[1, 4\] lies inside its document's prefix"):
        model.loss(ids, targets, layout=layout)


def test_unused_tensor_dtypes_and_devices() -> None:
    model = LanguageModel(ModelConfig(**HYBRID), device="meta", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.get_default_dtype() == torch.float32


def test_a_carried_state_recompiles_nothing() -> None:
    model = hybrid(dtype=torch.float32).eval()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        state, expected = model.init_state(2, max_length=99), model.init_state(2, max_length=99)
        for length in (12, 19, 33, 5):
            ids = tokens(2, length)
            output, wanted = (
                compiled(ids, state, return_state=True),
                model(ids, expected, return_state=True),
            )
            torch.testing.assert_close(output.logits, wanted.logits, rtol=1e-4, atol=1e-5)
            state, expected = output.state, wanted.state
    assert counter.frame_count <= 2


@pytest.mark.slow
def test_inductor_gives_the_same_loss_and_gradients() -> None:
    model = hybrid(dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda ids: model.loss(ids).loss, fullgraph=True)
    for length in (12, 33):
        ids = tokens(3, length)
        expected = model.loss(ids).loss
        expected.backward()
        wanted = gradients(model)
        loss = compiled(ids)
        loss.backward()
        torch.testing.assert_close(loss, expected)
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


def test_a_compiled_model_also_refuses_targets_inside_a_prefix() -> None:
    model, ids = hybrid(pattern="test_prefix swiglu", objective="prefix"), tokens(2, 8)
    layout = Layout.full(2, 8, prefix_lengths=[3, 5])
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda targets: model.loss(ids, targets, layout=layout).loss, fullgraph=True, backend="aot_eager"
    )
    targets = next_token_targets(ids, layout)
    close(compiled(targets), model.loss(ids, targets, layout=layout).loss)
    targets[1, 4] = 3
    with pytest.raises(RuntimeError, match="a next-token target lies inside a prefix"):
        compiled(targets)


def test_rows_of_a_state_can_be_picked_and_repeated() -> None:
    model, ids = hybrid(), tokens(3, 9)
    state = model(ids, model.init_state(3, max_length=12), return_state=True).state
    rows = torch.tensor([2, 0, 2, 1])
    following = tokens(4, seed=3)
    picked = model.step(following, state.select(rows))
    for index, row in enumerate(rows.tolist()):
        alone = model(ids[row : row + 1], model.init_state(1, max_length=12), return_state=True).state
        close(picked[index], model.step(following[index : index + 1], alone)[0])


def test_a_step_that_does_not_fit_changes_no_layer() -> None:
    config = ModelConfig(
        vocab_size=11,
        d_model=16,
        pattern="mamba3 attention swiglu",
        layers={"mamba3": {"d_state": 8, "head_dim": 8}, "attention": {"num_heads": 2}},
    )
    model = LanguageModel(config)
    state = model.init_state(2, max_length=3)
    for _ in range(3):
        model.step(torch.tensor([1, 2]), state)
    before = state.clone()
    with pytest.raises(ValueError, match=r"3 tokens are in a cache of 3.*larger max_length"):
        model.step(torch.tensor([1, 2]), state)
    for (name, left), (_, right) in zip(state.tensors(), before.tensors(), strict=True):
        assert torch.equal(left, right), name
