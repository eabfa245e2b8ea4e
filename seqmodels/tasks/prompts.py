"""Prompts that ask for something in a text: once (C, Q), or read twice (C, Q, C, Q).

A recurrent model must choose what to keep of a context C before it has seen the question Q.
JRT-Prompt gives it the whole prompt twice, so that the second reading knows the question
(arXiv:2407.05483, section 3.1). No training is needed; a prompt has twice the tokens.

The six tasks of the paper have layouts of their own, which published numbers were measured with::

    task                    fields                                      default        read twice
    fda, swde               text, key                                   d. K:          Information about K. d.\\nd. K:
    squad                   text, context, question                     text           question context\\ntext
    nq, triviaqa, drop      context, question, orig_question            c. cloze       orig_question c.\\nc. cloze

d and c are the document and the context without the question at their end, K the key with its
first letter in upper case; ``question`` is a cloze sentence in the last row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from seqmodels.configuration import nearest

_SWDE_TAIL = "Summary of information above..."  # what stands between a page and its cloze in the data set
_SQUAD_TAIL = "Question:"


def repeat_prompt(context: str, question: str = "", *, separator: str = "\n") -> str:
    """(C, Q, C, Q): context and question, ``separator``, context and question again.

    Args:
        context: what is read. With the question already in it, leave ``question`` out.
        question: what is asked, put behind the context with a space.
        separator: between the two readings.

    Raises:
        ValueError: an empty context.
    """
    if not context:
        raise ValueError("context is empty; expected the text that is read twice")
    once = f"{context} {question}" if question else context
    return once + separator + once


def default_prompt(task: str, fields: Mapping[str, object]) -> str:
    """The prompt (C, Q) of one example.

    Args:
        task: "fda", "swde", "squad", "nq", "triviaqa" or "drop".
        fields: the example as the data set has it; see the module's table for the fields that are read.

    Raises:
        ValueError: an unknown task, a missing field or an empty one.
    """
    layout = _layout(task)
    return layout.default(_fields(task, fields, layout.default_fields))


def read_twice(task: str, fields: Mapping[str, object]) -> str:
    """The prompt (C, Q, C, Q) of one example; arguments and errors of :func:`default_prompt`."""
    layout = _layout(task)
    return layout.twice(_fields(task, fields, layout.twice_fields))


class _Layout(NamedTuple):
    default_fields: tuple[str, ...]
    default: Callable[[dict[str, str]], str]
    twice_fields: tuple[str, ...]
    twice: Callable[[dict[str, str]], str]


def _key_default(fields: dict[str, str]) -> str:
    return f"{_document(fields)} {_upper(fields['key'])}:"


def _key_twice(fields: dict[str, str]) -> str:
    document, key = _document(fields), _upper(fields["key"])
    return f"Information about {key}. {document}\n{document} {key}:"


def _squad_twice(fields: dict[str, str]) -> str:
    context = fields["context"].partition(_SQUAD_TAIL)[0]
    return f"{fields['question']} {context}\n{fields['text'].strip()}"


def _cloze_default(fields: dict[str, str]) -> str:
    return f"{_context(fields)} {fields['question'].strip()}"


def _cloze_twice(fields: dict[str, str]) -> str:
    context = _context(fields)
    return f"{fields['orig_question'].strip(':')} {context}\n{context} {fields['question'].strip()}"


def _document(fields: dict[str, str]) -> str:
    """The page, one full stop at its end, without the data set's own question behind it."""
    text = fields["text"].partition(_SWDE_TAIL)[0]
    return _sentence(_without_end(text, fields["key"] + ":"))


def _context(fields: dict[str, str]) -> str:
    return _sentence(_without_end(fields["context"].strip(), fields["question"].strip()))


def _without_end(text: str, question: str) -> str:
    while text.lower().endswith(question.lower()):
        text = text[: len(text) - len(question)]
    return text


def _sentence(text: str) -> str:
    """Stripped, with exactly one full stop at its end."""
    return text.strip().strip(".").strip() + "."


def _upper(key: str) -> str:
    return key[0].upper() + key[1:]


_KEY = _Layout(("text", "key"), _key_default, ("text", "key"), _key_twice)
_SQUAD = _Layout(("text",), lambda fields: fields["text"].strip(), ("text", "context", "question"), _squad_twice)
_CLOZE = _Layout(("context", "question"), _cloze_default, ("context", "question", "orig_question"), _cloze_twice)
TASKS: dict[str, _Layout] = {
    "fda": _KEY, "swde": _KEY, "squad": _SQUAD, "nq": _CLOZE, "triviaqa": _CLOZE, "drop": _CLOZE,
}  # fmt: skip


def _layout(task: str) -> _Layout:
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}.{nearest(task, TASKS)} Known: {', '.join(TASKS)}")
    return TASKS[task]


def _fields(task: str, fields: Mapping[str, object], wanted: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in wanted:
        value = fields.get(name)
        if not isinstance(value, str) or not value.strip():
            raise ValueError(
                f"{task}: field {name!r} is {value!r}; expected a non-empty text (needs {', '.join(wanted)})"
            )
        found[name] = value
    return found
