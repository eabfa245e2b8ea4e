"""A corpus as one memory-mapped array of token ids, written once.

The array is ``s d0 s d1 s ... dn s`` with one separator ``s`` before each document and one at
the end, so document i's inputs are ``tokens[offsets[i] : offsets[i+1]]`` and its targets are the
same slice moved by one: its first token is predicted from ``s`` and its end is the prediction
of the next ``s``. Summed over all targets, the loss is the length of a complete code for the
documents.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from seqmodels.tasks.corpus import Corpus, Document
from seqmodels.tasks.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenCache:
    """Tokens of a corpus.

    Attributes:
        tokens: (total,) memory map of uint8, uint16 or uint32.
        offsets: (documents + 1,) int64 positions of the separators.
        text_bytes: (documents,) int64 sizes of the texts in bytes.
        names: one a document.
        digest: hash of names, contents and tokenizer; runs refuse to go on with another one.
        separator: token id between documents.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    text_bytes: np.ndarray
    names: list[str]
    digest: str
    separator: int

    def document(self, index: int) -> np.ndarray:
        """Document ``index`` with its separators on both ends: inputs ``[:-1]``, targets ``[1:]``."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1] + 1]


def open_token_cache(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> TokenCache:
    """The tokens of ``corpus``: mapped when ``folder`` has them, tokenised into it otherwise.

    A corpus whose fingerprint (paths, sizes, modification times) is known is not read again.
    """
    key = f"{corpus.fingerprint}\0{tokenizer.name}\0{tokenizer.vocab_size}\0{tokenizer.separator}"
    pointer = folder / "sources" / hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    if pointer.exists() and (folder / pointer.read_text()).exists():
        return load_token_cache(folder / pointer.read_text())
    cache = build_token_cache(corpus, tokenizer, folder)
    pointer.parent.mkdir(exist_ok=True)
    temporary = pointer.with_name(f".writing-{pointer.name}-{os.getpid()}")
    temporary.write_text(cache.digest)
    os.replace(temporary, pointer)
    return cache


def build_token_cache(documents: Iterable[Document], tokenizer: Tokenizer, folder: Path) -> TokenCache:
    """Tokenises ``documents`` into ``folder`` and maps the result.

    The folder's name is the caller's; inside, one sub-folder per content digest. Written under a
    temporary name and renamed, so that a killed or concurrent writer leaves nothing half-written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype("u1" if tokenizer.vocab_size <= 1 << 8 else "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")
    hasher = hashlib.blake2b(f"{tokenizer.name}\0{tokenizer.vocab_size}".encode(), digest_size=16)
    temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=folder))
    try:
        names, sizes, offsets, position = [], [], [0], 0
        separator = np.array([tokenizer.separator], dtype=dtype).tobytes()
        with open(temporary / "tokens.bin", "wb") as file:
            for name, content in documents:
                tokens = tokenizer.encode(content)
                file.write(separator)
                file.write(tokens.astype(dtype, copy=False).tobytes())
                hasher.update(f"{name}\0{len(content)}\0".encode("utf-8", "surrogateescape"))
                hasher.update(content)
                position += 1 + len(tokens)
                names.append(name)
                sizes.append(len(content))
                offsets.append(position)
            file.write(separator)
        np.save(temporary / "offsets.npy", np.array(offsets, dtype=np.int64))
        np.save(temporary / "text_bytes.npy", np.array(sizes, dtype=np.int64))
        digest = hasher.hexdigest()
        meta = {"names": names, "digest": digest, "separator": tokenizer.separator, "dtype": dtype.str}
        (temporary / "meta.json").write_text(json.dumps(meta))
        final = folder / digest
        if not final.exists():
            try:
                os.replace(temporary, final)
            except OSError:
                if not final.exists():  # lost a race against an equal cache: use that one
                    raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return load_token_cache(final)


def load_token_cache(folder: Path) -> TokenCache:
    """Maps a cache that :func:`build_token_cache` wrote."""
    meta = json.loads((folder / "meta.json").read_text())
    return TokenCache(
        tokens=np.memmap(folder / "tokens.bin", dtype=np.dtype(meta["dtype"]), mode="r"),
        offsets=np.load(folder / "offsets.npy", allow_pickle=False),
        text_bytes=np.load(folder / "text_bytes.npy", allow_pickle=False),
        names=meta["names"],
        digest=meta["digest"],
        separator=meta["separator"],
    )
