"""Weights of a foreign folder, whole or in shards; and a folder that is written whole or not at all."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

WEIGHTS = ("model.safetensors", "pytorch_model.bin")


class ConversionError(ValueError):
    """A checkpoint that cannot be converted as it is: what is wrong, by name, and the way out."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConversionError(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict):
        raise ConversionError(f"{path} holds a {type(found).__name__}; expected an object with names and values")
    return found


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of ``model.safetensors`` or ``pytorch_model.bin``, or of the shards that an index beside them names.

    Raises:
        ConversionError: no weights, a damaged file, something that is not a tensor, a shard that is
            missing or has other tensors than its index says.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return _read_file(folder / name)
    for name in WEIGHTS:
        if (folder / f"{name}.index.json").is_file():
            return _read_shards(folder / f"{name}.index.json")
    raise ConversionError(f"{folder} holds neither {' nor '.join(WEIGHTS)}, whole or in shards with an index")


def check_new(out: str | Path) -> Path:
    """``out``, which must not be a file or a folder with something in it: asked before the work begins."""
    final = Path(out)
    if final.exists() and (not final.is_dir() or any(final.iterdir())):
        kind = "a folder that is not empty" if final.is_dir() else "a file"
        raise ConversionError(f"{final} is {kind}, and nothing is overwritten; name a new folder")
    return final


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its name at the end; after an error nothing is left of it.

    Raises:
        ConversionError: ``out`` holds something, or writing failed.
    """
    final = check_new(out)
    final.parent.mkdir(parents=True, exist_ok=True)
    whole = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        yield whole
        whole.chmod(0o777 & ~_umask())  # mkdtemp lets nobody else read
        if final.is_dir():
            final.rmdir()
        os.replace(whole, final)
    # RuntimeError: torch.save on a full disk.
    except (OSError, RuntimeError, SafetensorError) as error:
        raise ConversionError(f"cannot write {final}: {error}; nothing was left there") from error
    finally:
        shutil.rmtree(whole, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # weights_only: a pickle from elsewhere must not run code.
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ConversionError(
            f"{path} is damaged or holds more than tensors ({str(error).splitlines()[0]}); only a plain mapping of "
            "names to tensors is read, because anything else could run code: save model.state_dict() instead"
        ) from error
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise ConversionError(
            f"cannot read {path} ({path.stat().st_size} bytes): {error}. It is truncated or of another format; "
            "download it again"
        ) from error
    if not isinstance(found, dict):
        raise ConversionError(f"{path} holds a {type(found).__name__}; expected a mapping of names to tensors")
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise ConversionError(
                f"{path}: {name!r} is a {type(value).__name__}; expected a tensor at every name (a state_dict)"
            )
    return dict(found)


def _read_shards(index: Path) -> dict[str, Tensor]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ConversionError(f"{index} has no 'weight_map' of tensor names to file names")
    tensors: dict[str, Tensor] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or not (index.parent / file).is_file():
            raise ConversionError(f"{index} names the shard {file!r}, which is not in {index.parent}")
        found = _read_file(index.parent / file)
        listed = {name for name, place in places.items() if place == file}
        if found.keys() != listed:
            wrong = ", ".join(sorted(found.keys() ^ listed))
            raise ConversionError(f"{index.parent / file} and its index {index.name} differ in {wrong}")
        tensors |= found
    return tensors
