from __future__ import annotations

import time

import pytest
import torch
from model_helpers import hybrid, tokens

from seqmodels.layout import Layout
from seqmodels.models import Decoder, LanguageModel, Sampling, generate

PROMPTS = [[1, 2, 3], [4] * 20, [5], [7, 8, 9, 10, 11]]
SAMPLING = Sampling(temperature=1.0, top_k=20, top_p=0.95, repetition_penalty=1.3)


def greedy_by_definition(model: LanguageModel, prompt: list[int], steps: int, penalty: float = 1.0) -> list[int]:
    ids = list(prompt)
    for _ in range(steps):
        logits = model(torch.tensor([ids])).logits[0, -1]
        for token in set(ids):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("prefill_chunk", [1, 7, 8192])
def test_greedy_is_the_most_likely_token_of_a_whole_forward(prefill_chunk: int) -> None:
    model = hybrid().eval()
    found = Decoder(model, prefill_chunk=prefill_chunk).generate(PROMPTS, max_new_tokens=9)
    assert found == [greedy_by_definition(model, prompt, 9) for prompt in PROMPTS]


def test_a_row_is_the_same_alone_and_in_a_batch() -> None:
    model = hybrid()
    together = generate(model, PROMPTS, max_new_tokens=12, sampling=SAMPLING, seed=7)
    for row, prompt in enumerate(PROMPTS):
        assert generate(model, [prompt], max_new_tokens=12, sampling=SAMPLING, seed=7 + row) == [together[row]]
    assert generate(model, PROMPTS, max_new_tokens=12, sampling=SAMPLING, seed=7) == together
    assert generate(model, PROMPTS, max_new_tokens=12, sampling=SAMPLING, seed=8) != together


def test_generation_leaves_the_global_generator_and_the_mode_alone() -> None:
    model = hybrid(dropout=0.5)
    before = torch.get_rng_state()
    first = generate(model, PROMPTS, max_new_tokens=5, sampling=SAMPLING)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert first == generate(model.eval(), PROMPTS, max_new_tokens=5, sampling=SAMPLING)


def test_repetition_penalty_sees_prompt_and_continuation() -> None:
    model = hybrid().eval()
    sampling = Sampling(temperature=0.0, repetition_penalty=1.5)
    with torch.no_grad():
        expected = greedy_by_definition(model, [3, 4, 5], 30, penalty=1.5)
        assert expected != greedy_by_definition(model, [3, 4, 5], 30)
    assert generate(model, [[3, 4, 5]], max_new_tokens=30, sampling=sampling) == [expected]


def test_rows_end_on_their_own() -> None:
    model = hybrid().eval()
    plain = generate(model, PROMPTS, max_new_tokens=10, sampling=SAMPLING)
    stop = plain[1][4]
    stopped = generate(model, PROMPTS, max_new_tokens=10, sampling=SAMPLING, stop_ids=(stop,))
    for row, expected in enumerate(plain):
        end = expected.index(stop) + 1 if stop in expected else 10
        assert stopped[row] == expected[:end]
    finished = [False] * 4
    seen = []
    for step in Decoder(model).stream(PROMPTS, max_new_tokens=10, sampling=SAMPLING, finished=finished):
        seen.append(step)
        finished[0] = True
        if len(seen) == 3:
            finished[:] = [True] * 4
    assert len(seen) == 3
    assert [step[0] for step in seen] == [plain[0][0], None, None]
    assert [step[1] for step in seen] == plain[1][:3]


def test_far_out_is_as_fast_and_as_small_as_near() -> None:
    """Position 20,000 against position 20, with recurrent layers and a window."""
    model = hybrid(pattern="gated_conv swiglu linear_attention swiglu window", dtype=torch.float32).eval()
    decoder = Decoder(model, prefill_chunk=4096)
    near = decoder.prefill(tokens(1, 20).tolist(), max_length=20_100)[1]
    far = decoder.prefill(tokens(1, 20_000).tolist(), max_length=20_100)[1]
    assert near.nbytes == far.nbytes == model.state_bytes(20_100) == model.state_bytes(20)
    ids = tokens(1)

    def seconds(state) -> float:
        start = time.perf_counter()
        for _ in range(20):
            model.step(ids, state)
        return time.perf_counter() - start

    seconds(near), seconds(far)
    times = [(seconds(near), seconds(far)) for _ in range(15)]
    assert min(far_time for _, far_time in times) < 1.5 * min(near_time for near_time, _ in times)
    assert near.nbytes == far.nbytes


def test_prefix_models_read_the_prompt_as_their_prefix() -> None:
    model = hybrid(pattern="swiglu test_prefix", objective="prefix").eval()
    decoder = Decoder(model, prefill_chunk=2)
    ids = tokens(1, 9)
    logits, _ = decoder.prefill(ids.tolist(), max_length=10)
    expected = model(ids, layout=Layout.full(1, 9, prefix_lengths=[9])).logits[:, -1]
    torch.testing.assert_close(logits, expected)


def test_wrong_requests_are_refused() -> None:
    model = hybrid()
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(model, [[1], []], max_new_tokens=3)
    with pytest.raises(ValueError, match="there are no prompts"):
        generate(model, [], max_new_tokens=3)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        generate(model, [[1]], max_new_tokens=0)
    with pytest.raises(ValueError, match=r"tokens\[0, 1\] is 50; expected 0 <= id < vocab_size=50"):
        generate(model, [[1, 50]], max_new_tokens=3)
    with pytest.raises(ValueError, match="capture=True needs the model on CUDA"):
        Decoder(model, capture=True)
    with pytest.raises(ValueError, match="prefill_chunk is 0"):
        Decoder(model, prefill_chunk=0)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), SAMPLING])
def test_logits_that_are_not_finite_are_refused(sampling: Sampling) -> None:
    model = hybrid()
    with torch.no_grad():
        model.head_weight[3] = torch.nan
    with pytest.raises(ValueError, match="the logits of prompt 0 are NaN or infinite at new token 0"):
        generate(model, [[1, 2]], max_new_tokens=3, sampling=sampling)


@pytest.mark.gpu
def test_a_captured_step_is_the_step() -> None:
    model = hybrid(dtype=torch.float32).cuda().eval()
    plain = Decoder(model, capture=False).generate(PROMPTS, max_new_tokens=20, sampling=SAMPLING)
    decoder = Decoder(model)
    for _ in range(2):
        assert decoder.generate(PROMPTS, max_new_tokens=20, sampling=SAMPLING) == plain
    assert len(decoder._captured) == 1
    assert decoder.generate(PROMPTS[:1], max_new_tokens=20) == Decoder(model, capture=False).generate(
        PROMPTS[:1], max_new_tokens=20
    )
