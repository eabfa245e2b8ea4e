"""Generated data on disk: shards made in parallel, each whole or not there, and a manifest of what they are.

::

    FOLDER/manifest.json      settings, counts, and at the end the digest of the content
    FOLDER/shard_00000.npz    values, offsets, labels (compressed), digest

A shard is a function of the settings and of its number alone, so that a generation that was killed goes
on with the shards that are missing, and any number of processes makes the same files.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from seqmodels.configuration import differences
from seqmodels.tasks.lra.examples import Examples, join

MANIFEST = "manifest.json"
_FIELDS = ("values", "offsets", "labels")

Maker = Callable[[dict[str, Any], int, int], Examples]  # settings, shard, examples in it


class DataError(ValueError):
    """Data that are missing, partial, damaged, or not what was asked for."""


def generate(
    folder: Path, maker: Maker, settings: dict[str, Any], count: int, shard_size: int, *,
    jobs: int = 1, done: Callable[[int, int], None] = lambda finished, shards: None,
) -> str:  # fmt: skip
    """Makes the shards of ``folder`` that are missing; the digest of all.

    Args:
        maker: a module's function, so that another process can call it.
        settings: everything that decides the examples, as plain values.
        jobs: processes.
        done: hears how many of the shards are there.

    Raises:
        DataError: the folder holds data of other settings, or a damaged shard.
    """
    about = {"settings": settings, "count": count, "shard_size": shard_size}
    _claim(folder, about)
    sizes = _sizes(count, shard_size)
    digests: dict[int, str] = {}
    for shard in range(len(sizes)):
        if _path(folder, shard).exists():
            digests[shard] = digest_of(_read(_path(folder, shard), sizes[shard]))
    done(len(digests), len(sizes))
    missing = [shard for shard in range(len(sizes)) if shard not in digests]
    if missing and jobs == 1:
        for shard in missing:
            digests[shard] = _make(folder, maker, settings, shard, sizes[shard])
            done(len(digests), len(sizes))
    elif missing:
        # Not fork: the parent may have started threads, of which a forked child would wait for locks.
        with ProcessPoolExecutor(min(jobs, len(missing)), multiprocessing.get_context("spawn")) as pool:
            waiting = {pool.submit(_make, folder, maker, settings, shard, sizes[shard]): shard for shard in missing}
            try:
                for future in as_completed(waiting):
                    digests[waiting[future]] = future.result()
                    done(len(digests), len(sizes))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    digest = hashlib.sha256("".join(digests[shard] for shard in range(len(sizes))).encode()).hexdigest()
    _write_json(folder / MANIFEST, {**about, "digest": digest})
    return digest


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
    return join([_read(_path(folder, shard), size) for shard, size in enumerate(sizes)])


def read_shard(folder: Path, shard: int) -> Examples:
    """One shard of a generation, finished or not.

    Raises:
        DataError: not there, or damaged.
    """
    manifest = read_manifest(folder)
    if manifest is None or not _path(folder, shard).exists():
        raise DataError(f"{folder} has no {_path(folder, shard).name}")
    return _read(_path(folder, shard), _sizes(manifest["count"], manifest["shard_size"])[shard])


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


def _claim(folder: Path, about: dict[str, Any]) -> None:
    """Writes the manifest of a new folder; nothing of another generation is overwritten."""
    found = read_manifest(folder)
    if found is None:
        if folder.is_dir() and any(folder.glob("shard_*.npz")):
            raise DataError(f"{folder} holds shards but no {MANIFEST}; choose another folder, or delete it")
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / MANIFEST, about)
        return
    changed = differences({name: found[name] for name in about}, about)
    if changed:
        raise DataError(
            f"{folder} holds data of other settings ({'; '.join(changed)}, there against wanted); nothing was "
            "overwritten. Choose another folder, or delete that one"
        )
    for left in folder.glob(".writing-*"):
        left.unlink()


def _make(folder: Path, maker: Maker, settings: dict[str, Any], shard: int, size: int) -> str:
    examples = maker(settings, shard, size)
    digest = digest_of(examples)
    final = _path(folder, shard)
    temporary = folder / f".writing-{final.name}"
    with open(temporary, "wb") as file:
        arrays = {name: getattr(examples, name) for name in _FIELDS}
        np.savez_compressed(file, digest=np.array(digest), **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, final)
    return digest


def _read(path: Path, size: int) -> Examples:
    try:
        with np.load(path, allow_pickle=False) as file:
            examples = Examples(*(file[name] for name in _FIELDS))
            stored = str(file["digest"])
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged ({error}); delete it and generate again: the others are kept") from None
    if len(examples) != size or digest_of(examples) != stored:
        raise DataError(f"{path} is damaged (its content has another digest); delete it and generate again")
    return examples


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(f".writing-{path.name}")
    temporary.write_text(json.dumps(content, indent=1))
    os.replace(temporary, path)
