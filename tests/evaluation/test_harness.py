"""The adapter against the real lm-eval: tiny local tasks, and what its requests must give."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from seqmodels.models import LanguageModel, ModelConfig, save_model
from seqmodels.tasks.real_text import TASKS as REAL_TEXT

lm_eval = pytest.importorskip("lm_eval", reason="the adapter needs lm-eval: pip install 'seqmodels[eval]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from seqmodels.evaluation import harness  # noqa: E402

CONTEXTS = ["", "a", "the quick brown ", "lazy dogs, " * 7, "x\n"]
RESTS = ["fox", " b", "fox jumps", "over", "y"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    torch.manual_seed(1)
    layers = {"linear_attention": {"num_heads": 2}, "attention": {"num_heads": 2}}
    config = ModelConfig(vocab_size=256, d_model=16, pattern="gated_conv linear_attention attention", layers=layers)
    model = LanguageModel(config, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return save_model(model, tmp_path_factory.mktemp("run") / "model")


@pytest.fixture
def lm(run):
    return harness.SeqmodelsLM.create_from_arg_string(f"pretrained={run}", {"batch_size": 3, "device": None})


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=item, idx=0) for item in arguments]


def log_probs(lm, text):
    tokens = torch.tensor([[0, *text.encode()]])
    with torch.no_grad():
        logits = lm.model.model(tokens[:, :-1]).logits[0]
    return logits.log_softmax(1).gather(1, tokens[0, 1:, None])[:, 0].numpy(), logits.argmax(1) == tokens[0, 1:]


def test_log_likelihoods(lm):
    found = lm.loglikelihood(requests("loglikelihood", list(zip(CONTEXTS, RESTS, strict=True))))
    for context, rest, (total, greedy) in zip(CONTEXTS, RESTS, found, strict=True):
        # White space at the end of a context is scored with the continuation.
        first = len(context.rstrip())
        expected, best = log_probs(lm, context + rest)
        assert total == pytest.approx(expected[first:].sum(), rel=1e-9)
        assert greedy is bool(best[first:].all())


def test_rolling_log_likelihoods_cut_nothing(lm):
    texts = ["", "a", "some longer text, " * 20]
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in texts]))
    assert found[0] == 0
    np.testing.assert_allclose(found[1:], [log_probs(lm, text)[0].sum() for text in texts[1:]], rtol=1e-9)


def test_generation_in_batches_of_unequal_prompts(lm):
    settings = {"until": ["\n"], "max_gen_toks": 10}
    prompts = [context or "?" for context in CONTEXTS]
    found = lm.generate_until(requests("generate_until", [(prompt, settings) for prompt in prompts]))
    for prompt, text in zip(prompts, found, strict=True):
        assert [text] == lm.model.generate([prompt], max_new_tokens=10, stop=("\n",))
    whole = lm.generate_until(requests("generate_until", [(prompts[2], {"max_gen_toks": 10})]))[0]
    stop = whole[3]
    assert lm.generate_until(requests("generate_until", [(prompts[2], {"until": stop, "max_gen_toks": 10})])) == [
        whole.partition(stop)[0]
    ]


def test_prompts_keep_their_last_tokens(run):
    short = harness.SeqmodelsLM(str(run), max_length=20)
    settings = {"max_gen_toks": 12}
    long, end = short.generate_until(requests("generate_until", [("0123456789", settings), ("3456789", settings)]))
    assert long == end


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"num_beams": 4}, {"repetition_penalty": 2.0}])
def test_what_is_not_greedy_is_refused(lm, settings):
    with pytest.raises(ValueError, match="takes the most likely token"):
        lm.generate_until(requests("generate_until", [("a", settings)]))


def test_batch_sizes_are_numbers(run):
    with pytest.raises(ValueError, match="batch_size is 'auto'"):
        harness.SeqmodelsLM(str(run), batch_size="auto")


def test_hugging_face_windows_predict_every_token_once(lm, monkeypatch):
    monkeypatch.setattr(lm.model, "max_length", 7)
    tokens = list(range(1, 31))
    windows = lm._windows(tokens)
    assert [token for _, rest in windows for token in rest] == tokens
    assert all(len(context) + len(rest) - 1 <= 7 for context, rest in windows)
    context, rest = lm._pair("0123456789", "ab")
    assert (context, rest) == (list(b"456789"), list(b"ab"))


def test_no_token_for_an_empty_context(lm, monkeypatch):
    monkeypatch.setattr(lm.model, "prefix_token", None)
    monkeypatch.setattr(lm.model, "front", [])
    with pytest.raises(ValueError, match="neither bos nor eos"):
        lm.loglikelihood(requests("loglikelihood", [("", "a")]))


# Tasks


def fixture_data(folder):
    folder.mkdir()
    page = {"text": "Device X. Made in (a+b).", "key": "year", "value": "zzzz"}
    cloze = {"context": "Rome is old.", "question": "Rome is", "orig_question": "what is Rome", "answers": ["q", "zz"]}
    squad = {"text": "Oslo lies in", "context": "Oslo. Question: where", "question": "Where?", "value": "Norway"}
    for task in REAL_TEXT:
        row = page if task in ("fda", "swde") else squad if task == "squad" else cloze
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, [row] * 3)))
    return folder


def test_every_task_file_runs_under_lm_eval(run, tmp_path, monkeypatch):
    data = fixture_data(tmp_path / "data")
    names = sorted(path.stem for path in harness.TASKS.glob("*.yaml"))
    assert len(names) == 16
    manager = TaskManager(include_path=str(harness.TASKS), metadata={"data": str(data)}, include_defaults=False)
    lm = harness.SeqmodelsLM(str(run), batch_size=4)
    seen = []

    def generate(prompts, *, max_new_tokens, stop, window):
        assert (max_new_tokens, stop, window) == (48, ("\n",), 2048)
        seen.extend(prompts)
        return ["a ZZ b" if "Rome" in prompt else "" for prompt in prompts]

    monkeypatch.setattr(lm.model, "generate", generate)
    found = lm_eval.simple_evaluate(
        model=lm, tasks=[f"real_text_{name}" for name in names], task_manager=manager, bootstrap_iters=0
    )["results"]
    for name in names:
        right = name.partition("_")[0] in ("nq", "triviaqa", "drop")
        assert found[f"real_text_{name}"]["contains,none"] == float(right), name
    assert "Device X. Made in (a+b). Year:" in seen
    assert "Information about Year. Device X. Made in (a+b).\nDevice X. Made in (a+b). Year:" in seen
    assert "what is Rome Rome is old.\nRome is old. Rome is" in seen


def test_arguments_that_are_added():
    assert harness.arguments([]) == []
    assert harness.arguments(["run", "--help"]) == ["run", "--help"]
    assert harness.arguments(["ls", "tasks"]) == ["ls", "tasks", "--include_path", str(harness.TASKS)]
    own = ["run", "--include_path=mine", "--device", "cuda:1"]
    assert harness.arguments(own) == own


@pytest.mark.slow  # lm-eval indexes its thousands of task files
def test_the_command_line(run, tmp_path):
    data = fixture_data(tmp_path / "data")
    command = [
        sys.executable, "-m", "seqmodels.evaluation.harness", "run", "--model", "seqmodels",
        "--model_args", f"pretrained={run}", "--tasks", "real_text_drop_twice", "--batch_size", "2",
        "--metadata", json.dumps({"data": str(data)}), "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    (path,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(path.read_text())["results"]["real_text_drop_twice"]
    assert results["sample_len"] == 3
    assert 0 <= results["contains,none"] <= 1
