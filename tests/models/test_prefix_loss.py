"""The joint objective of the JRT-RNN: which positions are scored, against which tokens."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from seqmodels import Layout
from seqmodels.models import LanguageModel, ModelConfig
from seqmodels.models.prefix_loss import prefix_columns, prefix_loss
from seqmodels.tasks.masked_prefix import masked_positions

MASK = 30


def model(**changes) -> LanguageModel:
    torch.manual_seed(0)
    config = {
        "vocab_size": 31, "d_model": 16, "pattern": "gated_conv prefix_linear_attention swiglu", "objective": "prefix",
        "layers": {"prefix_linear_attention": {"num_heads": 2, "feature_dim": 4}},
    }  # fmt: skip
    return LanguageModel(ModelConfig(**{**config, **changes})).double()


def rows(batch=2, length=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, MASK, (batch, length), generator=generator)


def test_masked_tokens_are_unshifted_and_nothing_targets_the_first_token_after_the_prefix():
    network, t, prefix = model(), rows(), 5
    masked = torch.zeros(2, prefix, dtype=torch.bool)
    masked[0, [0, 4]] = masked[1, 2] = True
    x = t.clone()
    x[0, 0] = x[0, 4] = x[1, 2] = MASK
    logits = network(x, layout=Layout.full(2, 12, prefix_lengths=[prefix] * 2)).logits
    next_token = [cross_entropy(logits[b, i], t[b, i + 1]) for b in range(2) for i in range(prefix, 11)]
    restored = [cross_entropy(logits[b, i], t[b, i]) for b, i in ((0, 0), (0, 4), (1, 2))]
    found = prefix_loss(network, t, masked, mask_id=MASK)
    torch.testing.assert_close(found.next_token, torch.stack(next_token).mean().detach())
    torch.testing.assert_close(found.masked, torch.stack(restored).mean().detach())
    torch.testing.assert_close(found.loss, torch.stack(next_token).mean() + 0.25 * torch.stack(restored).mean())
    weighted = prefix_loss(network, t, masked, mask_id=MASK, next_token_weight=2.0, masked_weight=3.0)
    torch.testing.assert_close(weighted.loss.detach(), 2 * found.next_token + 3 * found.masked)


def test_targets_given_for_the_prefix_are_not_scored():
    network, t, prefix = model(), rows(), 5
    masked = torch.zeros(2, prefix, dtype=torch.bool)
    targets = rows().roll(-1, 1)
    expected = prefix_loss(network, t, masked, mask_id=MASK, targets=targets).loss
    other = targets.clone()
    other[:, :prefix] = 7
    assert torch.equal(prefix_loss(network, t, masked, mask_id=MASK, targets=other).loss, expected)
    other[:, prefix] = 7
    assert not torch.equal(prefix_loss(network, t, masked, mask_id=MASK, targets=other).loss, expected)


def test_padding_is_never_restored():
    network, t, prefix = model(), rows(), 5
    layout = Layout.left_padded([9, 12], 12)  # three pads in the first row
    masked = torch.zeros(2, prefix, dtype=torch.bool)
    masked[0, 4] = masked[1, 2] = True
    expected = prefix_loss(network, t, masked, mask_id=MASK, layout=layout)
    masked[0, :3] = True
    found = prefix_loss(network, t, masked, mask_id=MASK, layout=layout)
    assert torch.equal(found.masked, expected.masked)
    assert torch.equal(found.loss, expected.loss)


def test_no_masked_position_is_no_loss_and_no_gradient():
    network, t = model(), rows()
    found = prefix_loss(network, t, torch.zeros(2, 5, dtype=torch.bool), mask_id=MASK)
    assert found.masked == 0
    assert found.loss.detach() == found.next_token
    found.loss.backward()
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_a_masked_token_is_restored_from_what_stands_behind_it():
    """In the prefix, information flows backwards; from behind the prefix it does not."""
    network, t, masked = model(), rows(1), torch.zeros(1, 5, dtype=torch.bool)
    masked[0, 1] = True
    base = prefix_loss(network, t, masked, mask_id=MASK).masked
    for column, sees in ((4, True), (5, False), (11, False)):
        other = t.clone()
        other[0, column] = (t[0, column] + 1) % MASK
        assert bool(prefix_loss(network, other, masked, mask_id=MASK).masked != base) is sees


def test_packed_documents_have_prefixes_of_their_own():
    """The columns of the prefix, cut by documents: a document's tokens there are its prefix."""
    layout = Layout.packed([[3, 6, 3], [12]], 12, capacity=6)
    assert prefix_columns(layout, 5).tolist() == [3, 2, 0, 5, 0, 0]
    network, t = model(), rows()
    masked = torch.zeros(2, 5, dtype=torch.bool)
    masked[0, [1, 3]] = masked[1, 0] = True
    found = prefix_loss(network, t, masked, mask_id=MASK, layout=layout)
    x = t.clone()
    x[0, 1] = x[0, 3] = x[1, 0] = MASK
    logits = {}
    for row, begin, end, prefix in ((0, 0, 3, 3), (0, 3, 9, 2), (0, 9, 12, 0), (1, 0, 12, 5)):
        alone = network(x[row : row + 1, begin:end], layout=Layout.full(1, end - begin, prefix_lengths=[prefix]))
        logits.update({(row, begin + i): alone.logits[0, i] for i in range(end - begin)})
    scored = [(0, i) for i in (5, 6, 7, 9, 10)] + [(1, i) for i in range(5, 11)]
    next_token = torch.stack([cross_entropy(logits[b, i], t[b, i + 1]) for b, i in scored]).mean()
    restored = torch.stack([cross_entropy(logits[b, i], t[b, i]) for b, i in ((0, 1), (0, 3), (1, 0))]).mean()
    torch.testing.assert_close(found.next_token, next_token.detach())
    torch.testing.assert_close(found.masked, restored.detach())


def test_masked_positions_belong_to_the_row():
    whole = masked_positions(0, 40, 300, 0.15, seed=3, stream=(2, 0))
    assert torch.equal(whole[7:9], masked_positions(7, 2, 300, 0.15, seed=3, stream=(2, 0)))
    assert not torch.equal(whole, masked_positions(0, 40, 300, 0.15, seed=3, stream=(2, 1)))
    # 12,000 draws: 5 standard deviations of a share of 0.15.
    assert abs(whole.double().mean() - 0.15) < 5 * (0.15 * 0.85 / 12_000) ** 0.5
    assert not masked_positions(0, 3, 50, 0.0, seed=3).any()


def test_bad_input_is_named():
    t, masked = rows(), torch.zeros(2, 5, dtype=torch.bool)
    causal = LanguageModel(ModelConfig(vocab_size=31, d_model=8, pattern="gated_conv"))
    with pytest.raises(ValueError, match="objective is 'next_token'; set objective: prefix"):
        prefix_loss(causal, t, masked, mask_id=MASK)
    for wrong in (masked[:1], masked[:, :0], torch.zeros(2, 12, dtype=torch.bool), masked[0]):
        with pytest.raises(ValueError, match=r"masked is .*expected \(batch, M\) with 1 <= M < length"):
            prefix_loss(model(), t, wrong, mask_id=MASK)
    with pytest.raises(ValueError, match="prefix_length is 4, but objective is 'next_token'"):
        ModelConfig(vocab_size=8, d_model=8, pattern="gated_conv", prefix_length=4)
    with pytest.raises(ValueError, match="prefix_length is 0"):
        model(prefix_length=0)
