"""Generated data on disk: shards made in parallel, each whole or not there, and a manifest of what they are.

::

    FOLDER/manifest.json      settings, counts, and at the end the digest of the content
    FOLDER/shard_00000.npz    values, offsets, labels (compressed), digest

A shard is a function of the settings and of its number, so that a generation that was killed goes on with the
shards that are missing, and any number of processes makes the same files. Where no example may occur twice in
the whole set, a shard that repeats one of an earlier shard is made again without it: it is then the first
examples of its own stream that no earlier shard has.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from seqmodels.configuration import differences
from seqmodels.tasks.lra.examples import Examples, join, row_key

MANIFEST, LOCK = "manifest.json", ".lock"
_FIELDS = ("values", "offsets", "labels")
# What numpy and zipfile raise on bytes that are not what they should be.
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, NotImplementedError, RuntimeError, struct.error, zlib.error,
               zipfile.BadZipFile)  # fmt: skip

# Settings, shard, examples in it, and the keys of rows that must not be in it.
Maker = Callable[[dict[str, Any], int, int, Collection[bytes]], Examples]


class DataError(ValueError):
    """Data that are missing, partial, damaged, or not what was asked for."""


def generate(
    folder: Path, maker: Maker, settings: dict[str, Any], count: int, shard_size: int, *,
    jobs: int = 1, distinct: bool = False, done: Callable[[int, int], None] = lambda finished, shards: None,
) -> str:  # fmt: skip
    """Makes the shards of ``folder`` that are missing; the digest of all.

    Args:
        maker: a module's function, so that another process can call it.
        settings: everything that decides the examples, as plain values.
        jobs: processes.
        distinct: no row occurs twice in the whole set; the maker must honour the keys that it is given.
        done: hears how many of the shards are there.

    Raises:
        DataError: the folder holds data of other settings or a damaged shard, another process generates into
            it, or it cannot be written.
    """
    about = {"settings": settings, "count": count, "shard_size": shard_size}
    sizes = _sizes(count, shard_size)
    with _locked(folder):
        before = _claim(folder, about)
        shards: dict[int, _Shard] = {}
        for shard in range(len(sizes)):
            if _path(folder, shard).exists():
                shards[shard] = _about(*_read(_path(folder, shard), sizes[shard]))
        done(len(shards), len(sizes))
        _make_missing(folder, maker, settings, sizes, shards, jobs, done)
        if distinct:
            _separate(folder, maker, settings, sizes, shards)
        digest = _digest_of_all(shards[shard].digest for shard in range(len(sizes)))
        if before not in (None, digest):
            raise DataError(
                f"{folder} was finished with digest {before}, but the shards that were made again have other content: "
                f"together {digest}. This version makes other data; give another folder"
            )
        _write_json(folder / MANIFEST, {**about, "digest": digest})
    return digest


class _Shard(NamedTuple):
    """What is known of a shard on disk: its digest, and the keys of its rows."""

    digest: str
    keys: frozenset[bytes]


def _make_missing(
    folder: Path, maker: Maker, settings: dict[str, Any], sizes: list[int], shards: dict[int, _Shard], jobs: int,
    done: Callable[[int, int], None],
) -> None:  # fmt: skip
    missing = [shard for shard in range(len(sizes)) if shard not in shards]
    if jobs == 1:
        for shard in missing:
            shards[shard] = _make(folder, maker, settings, shard, sizes[shard])
            done(len(shards), len(sizes))
    elif missing:
        # Not fork: the parent may have started threads, of which a forked child would wait for locks.
        with ProcessPoolExecutor(
            min(jobs, len(missing)), multiprocessing.get_context("spawn"), _end_with_parent
        ) as pool:
            waiting = {pool.submit(_make, folder, maker, settings, shard, sizes[shard]): shard for shard in missing}
            try:
                for future in as_completed(waiting):
                    shards[waiting[future]] = future.result()
                    done(len(shards), len(sizes))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _end_with_parent() -> None:
    """In a worker: without this, one whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _separate(
    folder: Path, maker: Maker, settings: dict[str, Any], sizes: list[int], shards: dict[int, _Shard]
) -> None:
    """Makes shards again, in their order, that hold a row of an earlier one. Killed half way, it ends the same."""
    seen: set[bytes] = set()
    for shard, size in enumerate(sizes):
        if not seen.isdisjoint(shards[shard].keys):
            shards[shard] = _make(folder, maker, settings, shard, size, seen)
        seen |= shards[shard].keys


def _digest_of_all(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def load(folder: Path, settings: dict[str, Any], how: str) -> Examples:
    """All examples of a finished generation.

    Args:
        settings: what the data must have been generated with.
        how: the command that makes them, for the error.

    Raises:
        DataError: not there, not finished, damaged, or of other settings.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise DataError(f"no data in {folder}; make them with: {how}")
    changed = differences(manifest["settings"], settings)
    if changed:
        raise DataError(
            f"{folder} holds data of other settings ({'; '.join(changed)}, there against wanted); give another folder"
        )
    sizes = _sizes(manifest["count"], manifest["shard_size"])
    absent = [shard for shard in range(len(sizes)) if not _path(folder, shard).exists()]
    if absent or "digest" not in manifest:
        raise DataError(
            f"{folder} is not finished: {len(absent)} of {len(sizes)} shards are missing; go on with: {how}"
        )
    found = [_read(_path(folder, shard), size) for shard, size in enumerate(sizes)]
    digest = _digest_of_all(digest for _, digest in found)
    if digest != manifest["digest"]:
        raise DataError(
            f"the shards of {folder} have digest {digest}, its {MANIFEST} says {manifest['digest']}: they are not of "
            f"one generation. Delete the folder and make the data with: {how}"
        )
    return join([examples for examples, _ in found])


def read_shard(folder: Path, shard: int) -> Examples:
    """One shard of a generation, finished or not.

    Raises:
        DataError: not there, or damaged.
    """
    manifest = read_manifest(folder)
    if manifest is None or not _path(folder, shard).exists():
        raise DataError(f"{folder} has no {_path(folder, shard).name}")
    return _read(_path(folder, shard), _sizes(manifest["count"], manifest["shard_size"])[shard])[0]


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of ``folder``; None where there is none."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text())
        if not {"settings", "count", "shard_size"} <= set(manifest):
            raise ValueError("it lacks settings, count or shard_size")
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is damaged ({error}); delete {folder} and generate it again") from None
    return manifest


def digest_of(examples: Examples) -> str:
    """SHA-256 over the content, in little-endian bytes: the same whatever compresses or stores it."""
    digest = hashlib.sha256()
    for name in _FIELDS:
        array = getattr(examples, name)
        digest.update(f"{name} {array.dtype.str} {array.shape};".encode())
        digest.update(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def _sizes(count: int, shard_size: int) -> list[int]:
    return [min(shard_size, count - at) for at in range(0, count, shard_size)]


def _path(folder: Path, shard: int) -> Path:
    return folder / f"shard_{shard:05d}.npz"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from generating into ``folder``; the system lets go of it when this one dies."""
    import fcntl  # not on Windows, where only generation is missing then

    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "w")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"cannot write into {folder} ({error}); give a folder that you may write into") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(
                f"another process generates into {folder}; wait for it to end, or give another folder"
            ) from None
        yield


def _claim(folder: Path, about: dict[str, Any]) -> str | None:
    """Writes the manifest of a new folder; nothing of another generation is overwritten.

    Returns:
        The digest of a generation that was finished before.
    """
    found = read_manifest(folder)
    if found is None:
        if any(folder.glob("shard_*.npz")):
            raise DataError(f"{folder} holds shards but no {MANIFEST}; choose another folder, or delete it")
        _write_json(folder / MANIFEST, about)
        return None
    changed = differences({name: found[name] for name in about}, about)
    if changed:
        raise DataError(
            f"{folder} holds data of other settings ({'; '.join(changed)}, there against wanted); nothing was "
            "overwritten. Choose another folder, or delete that one"
        )
    for left in folder.glob(".writing-*"):
        left.unlink()
    return found.get("digest")


def _make(
    folder: Path, maker: Maker, settings: dict[str, Any], shard: int, size: int, refused: Collection[bytes] = ()
) -> _Shard:
    examples = maker(settings, shard, size, refused)
    about = _about(examples, digest_of(examples))
    final = _path(folder, shard)
    # By process: a worker whose parent was killed may still write the shard that another one makes again.
    temporary = folder / f".writing-{os.getpid()}-{final.name}"
    try:
        with open(temporary, "wb") as file:
            arrays = {name: getattr(examples, name) for name in _FIELDS}
            np.savez_compressed(file, digest=np.array(about.digest), **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(
            f"cannot write {final} ({error}); nothing else was lost: make room and run the same command again"
        ) from None
    return about


def _about(examples: Examples, digest: str) -> _Shard:
    return _Shard(digest, frozenset(row_key(examples.row(row)) for row in range(len(examples.lengths))))


def _read(path: Path, size: int) -> tuple[Examples, str]:
    """A shard's examples, and their digest."""
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no .npz file, or the end of one is cut off")
        with np.load(path, allow_pickle=False) as file:
            examples = Examples(*(file[name] for name in _FIELDS))
            stored = str(file["digest"])
    except _UNREADABLE as error:
        raise DataError(f"{path} is damaged ({error}); delete it and generate again: the others are kept") from None
    if examples.labels.shape != (size,) or digest_of(examples) != stored:
        raise DataError(f"{path} is damaged (its content has another digest); delete it and generate again")
    return examples, stored


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".writing-{path.name}")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, path)
