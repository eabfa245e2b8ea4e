"""Recall in real text, zero-shot: FDA, SWDE, SQuAD, NQ, TriviaQA and Drop as Based and JRT ask them.

An example is a document that contains its answer, a question behind it, and gold answers (arXiv:2402.18668,
arXiv:2407.05483). Prompts are in :mod:`seqmodels.tasks.prompts`, the metric in
:mod:`seqmodels.tasks.recall_scoring`. Models read documents of at most ``limit`` tokens::

    want = limit - 50                                   # room for the answer
    p    = tokens before the earliest anchor            # FDA, SWDE: key or value; NQ: first answer
    keep = tokens [max(0, p - want // 2), + want)

TriviaQA and Drop have no anchor (p = 0: the beginning is kept). SQuAD's documents are short and end with the
question, so they are never cut. As in the released code, an example whose anchor has at most one character is
dropped when documents are cut, and where no anchor occurs p is the document's end, which keeps want // 2 tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from seqmodels.configuration import nearest
from seqmodels.tasks.corpus import CorpusError
from seqmodels.tasks.prompts import default_prompt, read_twice

SPLIT = "validation"
ANSWER_ROOM = 50  # tokens that a cut document leaves free
MAX_NEW_TOKENS = 48
WINDOW = 2048  # tokens of prompt and answer
STOP = ("\n",)
LAYOUTS = ("default", "twice")


class RealTextTask(NamedTuple):
    """One data set.

    Attributes:
        source: its name on the Hugging Face hub; ``{size}`` is 512, 1024 or 2048.
        fields: that both prompts and the score need.
        document: field that is cut; None: never.
        anchors: fields whose earliest match decides what is kept.
    """

    source: str
    fields: tuple[str, ...]
    document: str | None
    anchors: tuple[str, ...] = ()


_PAGE = ("text", "key", "value")
_CLOZE = ("context", "question", "orig_question", "answers")
TASKS: dict[str, RealTextTask] = {
    "fda": RealTextTask("hazyresearch/based-fda", _PAGE, "text", ("key", "value")),
    "swde": RealTextTask("hazyresearch/based-swde-v2", _PAGE, "text", ("key", "value")),
    "squad": RealTextTask("hazyresearch/based-squad", ("text", "context", "question", "value"), None),
    "nq": RealTextTask("hazyresearch/based_nq_{size}", _CLOZE, "context", ("answers",)),
    "triviaqa": RealTextTask("hazyresearch/based_triviaqa", _CLOZE, "context"),
    "drop": RealTextTask("hazyresearch/based_drop", _CLOZE, "context"),
}
NQ_SIZES = (512, 1024, 2048)


class Codec(Protocol):
    """Text to token ids and back, without special tokens."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, tokens: Sequence[int]) -> str: ...


class Question(NamedTuple):
    """A prompt and its gold answers; ``index`` is the example's place in the data set."""

    index: int
    prompt: str
    answers: tuple[str, ...]


def task_named(name: str) -> RealTextTask:
    """The data set ``name``; ValueError with the nearest names for any other."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}.{nearest(name, TASKS)} Known: {', '.join(TASKS)}")
    return TASKS[name]


def load_examples(task: str, source: str | Path | None = None, *, nq_size: int = 2048) -> list[dict[str, Any]]:
    """The examples of ``task``, each with the fields that it needs.

    Args:
        source: the data set's name on the hub (the published one when absent), a ``.jsonl`` file, a folder of
            ``save_to_disk``, or a folder that has either of them under the task's name.
        nq_size: NQ exists with documents of 512, 1024 and 2048 tokens.

    Raises:
        CorpusError: nothing there, no example, or an example without a field; the message names the published
            source and the fields.
    """
    wanted = task_named(task)
    if nq_size not in NQ_SIZES:
        raise ValueError(f"nq_size is {nq_size}; expected one of {', '.join(map(str, NQ_SIZES))}")
    published = wanted.source.format(size=nq_size)
    needs = (
        f"{task} is the data set {published!r} on the Hugging Face hub, split {SPLIT!r}; give a copy of it as "
        f"{task}.jsonl or a save_to_disk folder with the fields {', '.join(wanted.fields)}"
    )
    rows = [dict(row) for row in _rows(task, published if source is None else str(source), needs)]
    if not rows:
        raise CorpusError(f"{source or published} holds no example; {needs}")
    for index, row in enumerate(rows):
        missing = [name for name in wanted.fields if not _filled(row.get(name))]
        if missing:
            raise CorpusError(
                f"example {index} of {source or published} lacks {', '.join(missing)} (as text that is not empty); it "
                f"has {', '.join(row) or 'no field'}; {needs}"
            )
    return rows


def answers(task: str, example: Mapping[str, Any]) -> tuple[str, ...]:
    """Gold answers: the value, or all of NQ's, TriviaQA's and Drop's, empty ones left out."""
    found = example["answers"] if "answers" in task_named(task).fields else example["value"]
    return tuple(text for text in (_texts(found)) if text.strip())


def questions(
    task: str,
    examples: Sequence[Mapping[str, Any]],
    codec: Codec | None,
    *,
    layout: str = "default",
    limit: int | None = 2048,
) -> list[Question]:
    """Prompts of the examples, documents cut to ``limit - 50`` tokens before they are laid out.

    Args:
        codec: of the model that will read them; not needed where nothing is cut.
        layout: ``"default"`` or ``"twice"``.
        limit: tokens of a document and its answer; None cuts nothing and drops nothing.

    Raises:
        ValueError: an unknown layout, a limit that leaves no token, a limit without a codec, no example left.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}.{nearest(layout, LAYOUTS)} Known: {', '.join(LAYOUTS)}")
    write = default_prompt if layout == "default" else read_twice
    found = []
    for index, example in enumerate(examples):
        cut: Mapping[str, Any] | None = example
        if limit is not None:
            if codec is None:
                raise ValueError(f"limit is {limit} and codec None; a cut needs the tokenizer of the model that reads")
            cut = truncated(task, example, codec, limit)
        if cut is not None:
            found.append(Question(index, write(task, cut), answers(task, example)))
    if not found:
        raise ValueError(
            f"{task}: none of {len(examples)} examples is left at limit={limit}: an example whose key, value or first "
            "answer has at most one character is dropped; limit none drops nothing"
        )
    return found


def check_limit(limit: int) -> None:
    """ValueError for a limit that leaves a document no token."""
    if limit <= ANSWER_ROOM:
        raise ValueError(f"limit is {limit}; expected more than the {ANSWER_ROOM} tokens that an answer is left")


def truncated(task: str, example: Mapping[str, Any], codec: Codec, limit: int) -> Mapping[str, Any] | None:
    """The example with its document cut as the module says; None for one that is dropped."""
    wanted = task_named(task)
    check_limit(limit)
    if wanted.document is None:
        return example
    want = limit - ANSWER_ROOM
    document = str(example[wanted.document]).strip()
    anchors = [_texts(example[name])[0] for name in wanted.anchors]
    if any(len(anchor) <= 1 for anchor in anchors):
        return None
    tokens = codec.encode(document)
    if not anchors:
        before = 0
    else:
        matches = (re.search(re.escape(anchor), document, re.IGNORECASE) for anchor in anchors)
        found = [match.start() for match in matches if match]
        before = len(codec.encode(document[: min(found)])) if found else len(tokens)
    start = max(0, before - want // 2)
    if start == 0 and len(tokens) <= want:
        return example
    return {**example, wanted.document: codec.decode(tokens[start : start + want])}


def _rows(task: str, source: str, needs: str) -> Iterable[Any]:
    path = Path(source).expanduser()
    if path.is_dir() and not _is_saved(path):
        inside = [path / f"{task}.jsonl", path / task]
        path = next((candidate for candidate in inside if candidate.exists()), path)
    if path.is_file():
        return _read_lines(path)
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(f"{needs}. Data sets need a package: pip install datasets") from error
    if path.is_dir():
        if not _is_saved(path):
            raise CorpusError(f"{path} has neither {task}.jsonl nor a data set folder; {needs}")
        loaded: Any = datasets.load_from_disk(str(path))
        if not isinstance(loaded, datasets.DatasetDict):
            return loaded
        if SPLIT not in loaded:
            raise CorpusError(f"{path} has no split {SPLIT!r}, only {', '.join(map(str, loaded))}; {needs}")
        return loaded[SPLIT]
    if source.startswith((".", "/", "~")) or source.endswith(".jsonl"):
        raise CorpusError(f"{source} does not exist; {needs}")
    try:
        return datasets.load_dataset(source, split=SPLIT)
    except (OSError, ValueError, RuntimeError) as error:  # unreachable, unknown, or not a data set
        raise CorpusError(f"cannot load {source!r} ({type(error).__name__}: {error}); {needs}") from error


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists()


def _read_lines(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is no UTF-8 text: {error}; expected JSON lines") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise CorpusError(f"{path}:{number} is not JSON: {error}") from error
            if _halved(row):
                raise CorpusError(
                    f"{path}:{number} holds half of a surrogate pair (one of \\ud800 to \\udfff alone), which no "
                    "tokenizer reads; write the character whole, or leave it out"
                )
            if not isinstance(row, dict):
                raise CorpusError(f"{path}:{number} is {type(row).__name__}; expected an object with the fields")
            yield row


def _halved(row: object) -> bool:
    """Whether JSON's escapes named half a character, which UTF-8 cannot write."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _filled(value: object) -> bool:
    return any(text.strip() for text in _texts(value))


def _texts(value: object) -> list[str]:
    """A text, or texts, as a list; anything else is no text."""
    if isinstance(value, str):
        return [value]
    return [text for text in value if isinstance(text, str)] if isinstance(value, (list, tuple)) else []
