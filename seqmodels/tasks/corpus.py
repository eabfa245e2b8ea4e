"""Where text comes from: a file, a folder, Python's own standard library, or a Hugging Face data set."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
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


class Corpus:
    """Documents in a fixed order, empty ones left out; iterate to read them.

    Attributes:
        source: how the user named it.
        fingerprint: changes when the text may have changed: paths, sizes and modification times of
            files, or the data set's own fingerprint. Cheap: nothing is read.
    """

    def __init__(self, source: str, fingerprint: str, documents: Callable[[], Iterator[Document]]) -> None:
        self.source = source
        self.fingerprint = fingerprint
        self._documents = documents

    def __iter__(self) -> Iterator[Document]:
        """Raises CorpusError when every document is empty."""
        found = False
        for document in self._documents():
            if document.content:
                found = True
                yield document
        if not found:
            raise CorpusError(f"corpus {self.source!r} holds no text; check the path and `data.suffixes`")


def open_corpus(
    source: str, *, suffixes: tuple[str, ...] = (), text_column: str = "text", split: str = "train"
) -> Corpus:
    """The corpus that ``source`` names.

    Args:
        source: ``"stdlib"`` for the running Python's library source; ``"hf:NAME"`` or
            ``"hf:NAME:CONFIG"`` for a Hugging Face data set (a hub name, or a folder written by
            ``save_to_disk``); otherwise the path of a file or a folder.
        suffixes: endings of the files taken from a folder, such as ``(".py",)``; all when empty.
        text_column, split: which column and split of a Hugging Face data set.

    Raises:
        CorpusError: nothing there, or no file that matches.
    """
    if source.startswith("hf:"):
        return _hugging_face(source, text_column, split)
    if source == "stdlib":
        return _files(source, Path(sysconfig.get_paths()["stdlib"]), (".py",), STDLIB_EXCLUDED)
    path = Path(source).expanduser()
    if not path.exists():
        raise CorpusError(f"corpus {source!r} does not exist; give a file, a folder, 'stdlib' or 'hf:NAME'")
    return _files(source, path, suffixes, frozenset())


def _files(source: str, root: Path, suffixes: tuple[str, ...], excluded: frozenset[str]) -> Corpus:
    """A file, or the files below a folder in the order of their relative paths; hidden ones left out."""
    if root.is_file():
        files = [(root.name, root)]
    else:
        files = []
        for folder, inner, names in os.walk(root):
            # Hidden and excluded folders are not entered: site-packages may be large.
            inner[:] = [name for name in inner if not name.startswith(".") and name not in excluded]
            for name in names:
                if not name.startswith(".") and (not suffixes or name.endswith(suffixes)):
                    path = Path(folder, name)
                    files.append((path.relative_to(root).as_posix(), path))
        files.sort()
    if not files:
        narrowed = f" in files that end with {', '.join(suffixes)}" if suffixes else ""
        raise CorpusError(f"corpus {source!r} holds no text{narrowed}; check the path and `data.suffixes`")
    hasher = hashlib.blake2b(digest_size=16)
    for name, path in files:
        status = path.stat()
        hasher.update(f"{name}\0{path}\0{status.st_size}\0{status.st_mtime_ns}\0".encode("utf-8", "surrogateescape"))
    return Corpus(source, hasher.hexdigest(), lambda: (Document(name, path.read_bytes()) for name, path in files))


def _hugging_face(source: str, text_column: str, split: str) -> Corpus:
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(f"corpus {source!r} needs the datasets package: pip install 'datasets>=2.19'") from error
    table: Any
    path, _, config = source.removeprefix("hf:").partition(":")
    if Path(path).is_dir():
        loaded = datasets.load_from_disk(path)
        table = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
    else:
        table = datasets.load_dataset(path, config or None, split=split)
    if text_column not in table.column_names:
        raise CorpusError(
            f"data set {path!r} has no column {text_column!r}; set data.text_column to one of "
            + ", ".join(table.column_names)
        )

    def documents() -> Iterator[Document]:
        for index, row in enumerate(table):
            yield Document(f"{split}/{index}", row[text_column].encode())

    return Corpus(source, f"{table._fingerprint}/{split}/{text_column}", documents)
