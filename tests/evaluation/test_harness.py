"""The adapter against the real lm-eval: tiny local tasks, and what its requests must give."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from seqmodels.evaluation.real_text import evaluate_recall
from seqmodels.models import LanguageModel, ModelConfig, save_model
from seqmodels.tasks.real_text import TASKS as REAL_TEXT
from seqmodels.tasks.real_text import load_examples
from seqmodels.tasks.recall.examples import below
from seqmodels.tasks.shuffle import raw_draws

lm_eval = pytest.importorskip("lm_eval", reason="the adapter needs lm-eval: pip install 'seqmodels[eval]'")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import model_registry  # noqa: E402
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


def test_prompts_keep_their_last_tokens(run, caplog):
    short = harness.SeqmodelsLM(str(run), max_length=20)
    settings = {"max_gen_toks": 12}
    long, end = short.generate_until(requests("generate_until", [("0123456789", settings), ("3456789", settings)]))
    assert long == end
    assert "1 of 2 prompts lose their beginning: max_length=20 less 12 new tokens" in caplog.text


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
    context, rest = lm._pair("0123456789", "abcdefghijkl")  # too long by itself: refused by its length, never empty
    assert (context, rest) == (list(b"9"), list(b"abcdefghijkl"))


def test_no_token_for_an_empty_context(lm, monkeypatch):
    monkeypatch.setattr(lm.model, "prefix_token", None)
    monkeypatch.setattr(lm.model, "front", [])
    with pytest.raises(ValueError, match="neither bos nor eos"):
        lm.loglikelihood(requests("loglikelihood", [("", "a")]))


# Tasks


SIZES = (512, 1024, 2048)
TAILS = {"default": "", "twice": "_twice"}


def task_file(task, layout, limit):
    """Name and content of a task file; the issue's six tasks, both layouts, whole documents and three limits."""
    size = "" if limit is None else f"_{limit}"
    tail = TAILS[layout]
    tags = [f"real_text{size}{tail}"]
    if task == "squad":  # never cut, so a member of every table
        tags = [f"real_text{each}{tail}" for each in ("", *(f"_{bound}" for bound in SIZES))]
    return f"{task}{size}{tail}", {
        "include": "_real_text_yaml",
        "task": f"real_text_{task}{size}{tail}",
        "tag": tags if len(tags) > 1 else tags[0],
        "dataset_kwargs": {
            "task": task, "layout": layout, **({"limit": limit} if limit else {}),
            **({"nq_size": limit} if limit and task == "nq" else {}),
        },
    }  # fmt: skip


TASK_FILES = dict(
    task_file(task, layout, limit)
    for task in REAL_TEXT
    for layout in TAILS
    for limit in ((None,) if task == "squad" else (None, *SIZES))
)


def test_task_files():
    found = {path.stem: yaml.safe_load(path.read_text()) for path in harness.TASKS.glob("*.yaml")}
    assert len(found) == 42
    assert found == TASK_FILES


def long_text(seed, *marks, words=400):
    """Words, with each mark at its place."""
    found = [WORDS[number] for number in below(raw_draws(seed, count=words), len(WORDS)).tolist()]
    for place, mark in marks:
        found[place] = mark
    return " ".join(found)


WORDS = ["lorem", "ipsum", "dolor", "sit", "amet", "consectetur", "Ünïcode", "elit"]


def fixture_data(folder):
    """Examples of each task's fields, of about 2,400 bytes; the second of a cut task is dropped where it is cut."""
    folder.mkdir()
    page = {"text": "Device X. Made in (a+b).", "key": "year", "value": "zzzz"}
    cloze = {"context": "Rome is old.", "question": "Rome is", "orig_question": "what is Rome", "answers": ["qq", "zz"]}
    squad = {"text": "Oslo lies in", "context": "Oslo. Question: where", "question": "Where?", "value": "Norway"}
    pages = [
        page, {**page, "value": "z"}, {**page, "text": long_text(1, (210, "(A+b)*"), (300, "Year")), "value": "(a+b)*"},
        {**page, "text": long_text(2, (390, "Year:"))}, {**page, "text": long_text(3)},
    ]  # fmt: skip
    clozes = [
        cloze, {**cloze, "answers": ["z", "zz"]}, {**cloze, "context": long_text(4, (50, "zz"), (200, "QQ"))},
        {**cloze, "context": long_text(5, (399, "zz"))},
    ]  # fmt: skip
    for task in REAL_TEXT:
        rows = pages if task in ("fda", "swde") else [squad, {**squad, "text": long_text(6)}]
        rows = clozes if task in ("nq", "triviaqa", "drop") else rows
        (folder / f"{task}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def manager_for(data, **metadata):
    metadata = {"data": str(data), **metadata}
    return TaskManager(include_path=str(harness.TASKS), metadata=metadata, include_defaults=False)


class Generated(list):
    """In place of ``generate``: keeps the prompts that it is given."""

    def __call__(self, prompts, *, max_new_tokens, stop, window):
        assert (max_new_tokens, stop, window) == (48, ("\n",), 2048)
        self.extend(prompts)
        return ["a ZZ b" if "Rome" in prompt else "" for prompt in prompts]


def test_every_task_runs_under_lm_eval_with_the_prompts_of_recall_text(run, tmp_path, monkeypatch):
    data = fixture_data(tmp_path / "data")
    lm = harness.SeqmodelsLM(str(run), batch_size=4)
    manager = manager_for(data, pretrained=str(run))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # asks pip and the compiler: slow
    seen = Generated()
    monkeypatch.setattr(lm.model, "generate", seen)
    names = [settings["task"] for settings in TASK_FILES.values()]
    found = lm_eval.simple_evaluate(model=lm, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True)
    assert found is not None
    cut = 0
    for settings in TASK_FILES.values():
        name, about = settings["task"], settings["dataset_kwargs"]
        task, layout, limit = about["task"], about["layout"], about.get("limit")
        own = Generated()
        monkeypatch.setattr(lm.model, "generate", own)
        score = evaluate_recall(lm.model, task, load_examples(task, data), tmp_path, layout=layout, limit=limit)
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        prompts = [sample["arguments"][0][0] for sample in samples]
        assert sorted(prompts) == sorted(own), name
        assert found["results"][name]["contains,none"] == score.accuracy, name
        cut += sum(len(prompt) < 1500 for prompt in prompts)
    assert cut > 100  # of the documents of 2,400 bytes
    assert "Device X. Made in (a+b). Year:" in seen
    assert "Information about Year. Device X. Made in (a+b).\nDevice X. Made in (a+b). Year:" in seen
    assert "what is Rome Rome is old.\nRome is old. Rome is" in seen


def test_cuts_count_the_tokens_of_the_model_that_reads(run, tmp_path):
    transformers = pytest.importorskip("transformers", reason="the other tokenizer is one of transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "?", "</s>"])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", eos_token="</s>")
    fast.save_pretrained(tmp_path / "words")
    data = fixture_data(tmp_path / "data")

    def prompt(**metadata):
        tasks = manager_for(data, **metadata).load(["real_text_drop_512"])["tasks"]
        return tasks["real_text_drop_512"].dataset["validation"]["prompt"][2]

    text = long_text(4, (50, "zz"), (200, "QQ"))
    assert prompt(pretrained=str(run)) == text.encode()[:462].decode(errors="replace").strip() + ". Rome is"
    for name in (str(tmp_path / "words"), f"hf:{tmp_path / 'words'}"):  # 400 words: nothing to cut
        assert prompt(pretrained=name) == text + ". Rome is"
    assert prompt(pretrained=str(run), tokenizer=str(tmp_path / "words")) == text + ". Rome is"
    with pytest.raises(ValueError, match=r"real_text_drop_512 cuts .* no model is named; expected pretrained=MODEL"):
        prompt()
    with pytest.raises(ValueError, match="cannot load the tokenizer"):
        prompt(pretrained=str(tmp_path / "absent"))


def test_tags_are_tables(tmp_path):
    index = manager_for(fixture_data(tmp_path / "data"))
    for size in ("", *(f"_{bound}" for bound in SIZES)):
        for tail in TAILS.values():
            members = index._index[f"real_text{size}{tail}"].tags
            assert members == {f"real_text_{task}{'' if task == 'squad' else size}{tail}" for task in REAL_TEXT}


def test_models_of_lm_eval_stay_beside_ours():
    # lm-eval registers its own at the first look-up of any, if none is there.
    assert {"seqmodels", "hf", "dummy"} <= set(model_registry.keys())


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
        "--model_args", f"pretrained={run}", "--tasks", "real_text_drop_512_twice", "--batch_size", "2",
        "--metadata", json.dumps({"data": str(data)}), "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    (path,) = (tmp_path / "out").rglob("results*.json")
    results = json.loads(path.read_text())["results"]["real_text_drop_512_twice"]
    assert results["sample_len"] == 4
    assert 0 <= results["contains,none"] <= 1
