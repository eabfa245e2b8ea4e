from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from model_helpers import tokens

from seqmodels.configuration import convert
from seqmodels.layout import Layout
from seqmodels.models import ClassifierConfig, SequenceClassifier


def classifier(**values: Any) -> SequenceClassifier:
    torch.manual_seed(0)
    defaults = {"d_model": 8, "pattern": "gated_conv swiglu", "num_classes": 3}
    if "input_size" not in values:
        defaults["vocab_size"] = 256
    model = SequenceClassifier(convert({**defaults, **values}, ClassifierConfig)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
def test_pooling_is_what_its_name_says(pooling: str) -> None:
    model, ids = classifier(pooling=pooling), tokens(4, 7, vocab_size=256)
    hidden = model.backbone(model.input(ids)).hidden
    pooled = {"mean": hidden.mean(1), "last": hidden[:, 6], "first": hidden[:, 0]}[pooling]
    torch.testing.assert_close(model(ids).logits, model.head(pooled))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "last", "first"])
@pytest.mark.parametrize("real", [False, True])
def test_padded_sequences_are_as_if_alone(pooling: str, side: str, real: bool) -> None:
    model = classifier(pooling=pooling, **({"input_size": 2} if real else {}))
    lengths = [3, 9, 1, 8]
    layout = Layout.left_padded(lengths, 10) if side == "left" else Layout.packed([[n] for n in lengths], 10)
    inputs = torch.randn(4, 10, 2, dtype=torch.float64) if real else tokens(4, 10, vocab_size=256)
    together = model(inputs, layout=layout).logits
    for row in range(4):
        torch.testing.assert_close(together[row], model(inputs[row : row + 1, layout.valid[row]]).logits[0])


def test_pairs_share_the_stack_and_meet_in_the_head() -> None:
    model, ids = classifier(sequences=2), tokens(3, 2, 6, vocab_size=256)
    a, b = (model.backbone(model.input(ids[:, side])).hidden.mean(1) for side in (0, 1))
    expected = model.head(torch.cat([a, b, a - b, a * b], -1))
    torch.testing.assert_close(model(ids).logits, expected)
    lengths = [6, 2, 5, 1, 3, 4]
    layout = Layout.packed([[n] for n in lengths], 6)
    padded = model(ids, layout=layout).logits
    a, b = (
        torch.stack(
            [model.backbone(model.input(ids[i, s, : lengths[2 * i + s]][None])).hidden[0].mean(0) for i in range(3)]
        )
        for s in (0, 1)
    )
    torch.testing.assert_close(padded, model.head(torch.cat([a, b, a - b, a * b], -1)))


def test_bidirectional_layers_and_batch_norm_are_welcome() -> None:
    model = classifier(pattern="test_bidirectional swiglu", norm="batch", norm_place="pre")
    loss, output = model.loss(tokens(4, 6, vocab_size=256), torch.tensor([0, 1, 2, 1]))
    loss.backward()
    torch.testing.assert_close(loss, F.cross_entropy(output.logits.float(), torch.tensor([0, 1, 2, 1])))
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


def test_auxiliary_losses_count() -> None:
    model = classifier(pattern="test_running_sum")
    loss, output = model.loss(tokens(4, 6, vocab_size=256), torch.tensor([0, 1, 2, 1]))
    plain = F.cross_entropy(output.logits.float(), torch.tensor([0, 1, 2, 1]))
    torch.testing.assert_close(loss, plain + output.aux["size_loss"], check_dtype=False)


def test_learns_a_rule_that_needs_the_order() -> None:
    model = classifier(num_classes=2, vocab_size=4, d_model=16, pooling="last").float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(120):
        ids = tokens(64, 12, vocab_size=4, seed=step)
        labels = (ids[:, -1] > ids[:, -3]).long()
        loss, _ = model.loss(ids, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids = tokens(256, 12, vocab_size=4, seed=10**6)
    assert (model(ids).logits.argmax(1) == (ids[:, -1] > ids[:, -3]).long()).float().mean() > 0.97


def test_wrong_inputs_are_refused() -> None:
    model, ids = classifier(), tokens(4, 6, vocab_size=256)
    with pytest.raises(ValueError, match=r"shape \(4, 6, 1\); expected \(batch, length\)"):
        model(ids[..., None])
    with pytest.raises(ValueError, match=r"inputs\[0, 0\] is 256; expected 0 <= id < vocab_size=256"):
        model(torch.full((1, 1), 256))
    with pytest.raises(ValueError, match=r"expected \(batch, length, 2\)"):
        classifier(input_size=2)(torch.randn(4, 6, 3))
    with pytest.raises(ValueError, match=r"expected \(batch, 2, length\)"):
        classifier(sequences=2)(tokens(4, 3, 6, vocab_size=256))
    with pytest.raises(ValueError, match=r"labels\[2\] is 3; expected 0 <= class < num_classes=3"):
        model.loss(ids, torch.tensor([0, 1, 3, 1]))
    with pytest.raises(ValueError, match=r"labels has shape \(3,\)"):
        model.loss(ids, torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="each row is one sequence"):
        model(ids, layout=Layout.packed([[2, 3], [6], [6], [6]], 6))
    with pytest.raises(ValueError, match=r"documents lie in rows \[0, 0, 1, 2\]"):
        model(ids, layout=Layout.packed([[2, 3], [6], [6], []], 6))
    with pytest.raises(ValueError, match=r"block 0 \(test_prefix\) is a prefix layer"):
        classifier(pattern="test_prefix")
