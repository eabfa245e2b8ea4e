"""Where text comes from: a file, a folder, Python's own standard library, or a Hugging Face data set."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Left out of the standard library's source: tests, installed packages, generated tables
# (encodings, pydoc_data) and bundled applications. What remains is about 9 MB of library code.
STDLIB_EXCLUDED = frozenset(
    (
        *("site-packages", "dist-packages", "test", "tests", "idle_test"),
        *("encodings", "pydoc_data", "lib2to3", "idlelib", "turtledemo"),
    )
)


class CorpusError(ValueError):
    """A corpus that is missing, empty, unreadable or too small."""


class Document(NamedTuple):
    """A name that is unique in its corpus (the relative path, or the row number) and the text's bytes."""

    name: str
    content: bytes


def read_documents(
    source: str, *, suffixes: tuple[str, ...] = (), text_column: str = "text", split: str = "train"
) -> Iterator[Document]:
    """Documents of ``source`` in a fixed order, empty ones left out.

    Args:
        source: ``"stdlib"`` for the running Python's library source; ``"hf:NAME"`` or
            ``"hf:NAME:CONFIG"`` for a Hugging Face data set (a hub name, or a folder written by
            ``save_to_disk``); otherwise the path of a file or a folder.
        suffixes: endings of the files taken from a folder, such as ``(".py",)``; all when empty.
        text_column, split: which column and split of a Hugging Face data set.

    Raises:
        CorpusError: nothing there, or nothing in it.
    """
    if source == "stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        yield from _nonempty(_folder(root, (".py",), STDLIB_EXCLUDED), source)
    elif source.startswith("hf:"):
        yield from _nonempty(_hugging_face(source[3:], text_column, split), source)
    else:
        path = Path(source).expanduser()
        if path.is_file():
            yield from _nonempty(iter([Document(path.name, path.read_bytes())]), source)
        elif path.is_dir():
            yield from _nonempty(_folder(path, suffixes, frozenset()), source, suffixes)
        else:
            raise CorpusError(f"corpus {source!r} does not exist; give a file, a folder, 'stdlib' or 'hf:NAME'")


def _nonempty(documents: Iterator[Document], source: str, suffixes: tuple[str, ...] = ()) -> Iterator[Document]:
    found = False
    for document in documents:
        if document.content:
            found = True
            yield document
    if not found:
        narrowed = f" in files that end with {', '.join(suffixes)}" if suffixes else ""
        raise CorpusError(f"corpus {source!r} holds no text{narrowed}; check the path and `data.suffixes`")


def _folder(root: Path, suffixes: tuple[str, ...], excluded: frozenset[str]) -> Iterator[Document]:
    paths = sorted(root.rglob("*"), key=lambda path: path.relative_to(root).as_posix())
    for path in paths:
        relative = path.relative_to(root)
        hidden = any(part.startswith(".") for part in relative.parts)
        if hidden or excluded.intersection(relative.parts) or not path.is_file():
            continue
        if not suffixes or path.name.endswith(suffixes):
            yield Document(relative.as_posix(), path.read_bytes())


def _hugging_face(name: str, text_column: str, split: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(f"corpus 'hf:{name}' needs the datasets package: pip install 'datasets>=2.19'") from error
    table: Any
    path, _, config = name.partition(":")
    if Path(path).is_dir():
        loaded = datasets.load_from_disk(path)
        table = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
    else:
        table = datasets.load_dataset(path, config or None, split=split)
    if text_column not in table.column_names:
        raise CorpusError(
            f"data set {name!r} has no column {text_column!r}; set data.text_column to one of "
            + ", ".join(table.column_names)
        )
    for index, row in enumerate(table):
        yield Document(f"{split}/{index}", row[text_column].encode())
