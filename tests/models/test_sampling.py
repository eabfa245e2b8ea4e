from __future__ import annotations

import pytest
import torch

from seqmodels.models import Sampling
from seqmodels.models.sampling import draw, token_probabilities

LOGITS = torch.tensor([[2.0, -1.0, 0.5, 0.0], [0.0, 3.0, 3.0, -2.0]])


def probabilities(**options: float) -> torch.Tensor:
    return token_probabilities(LOGITS, Sampling(**options))


def test_temperature() -> None:
    torch.testing.assert_close(probabilities(), LOGITS.softmax(1))
    torch.testing.assert_close(probabilities(temperature=0.5), (2 * LOGITS).softmax(1))
    assert probabilities(temperature=0.0).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0]]


def test_top_k_keeps_exactly_k_also_among_equals() -> None:
    kept = probabilities(top_k=2)
    assert (kept > 0).sum(1).tolist() == [2, 2]
    torch.testing.assert_close(kept[0, [0, 2]], LOGITS[0, [0, 2]].softmax(0))
    assert (probabilities(top_k=1) > 0).sum(1).tolist() == [1, 1]
    torch.testing.assert_close(probabilities(top_k=99), LOGITS.softmax(1))


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    full = LOGITS.softmax(1)  # row 0: 0.70, 0.03, 0.16, 0.10; row 1: 0.02, 0.49, 0.49, 0.003
    assert (probabilities(top_p=0.5) > 0).tolist() == [[True, False, False, False], [False, True, True, False]]
    assert (probabilities(top_p=0.8) > 0).tolist() == [[True, False, True, False], [False, True, True, False]]
    assert (probabilities(top_p=1e-6) > 0).sum(1).tolist() == [1, 1]
    torch.testing.assert_close(probabilities(top_p=1.0), full)
    torch.testing.assert_close(probabilities(top_p=0.8).sum(1), torch.ones(2))


def test_repetition_penalty_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    seen = torch.tensor([[True, True, False, False], [False] * 4])
    found = token_probabilities(LOGITS, Sampling(repetition_penalty=2.0), seen)
    expected = LOGITS.clone()
    expected[0, 0], expected[0, 1] = 1.0, -2.0
    torch.testing.assert_close(found, expected.softmax(1))


def test_draws_follow_the_probabilities() -> None:
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    counts = draw(p.expand(40_000, 4), uniform).bincount(minlength=4)
    assert counts[1] == 0
    torch.testing.assert_close(counts / 40_000, p, atol=0.01, rtol=0)
    edge = torch.tensor([0.0, 1 - 2**-24])
    assert draw(torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]]), edge).tolist() == [1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def test_a_temperature_near_zero_is_greedy() -> None:
    logits = torch.tensor([[3.0, 100.0, 1.0]])
    for temperature in (1e-30, 1e-40, 1e-60):
        assert token_probabilities(logits, Sampling(temperature=temperature)).tolist() == [[0.0, 1.0, 0.0]]
