"""Files of PTD matrices: shipped ones beside this module, and the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from seqmodels.init.settings import Settings

SHIPPED = Path(__file__).with_name("perturbations")


class Entry(NamedTuple):
    perturbation: Tensor
    settings: Settings


def shipped_path(size: int) -> Path:
    return SHIPPED / f"legs-{size}.safetensors"


def cache_folder() -> Path:
    """``$SEQMODELS_CACHE``, else ``$XDG_CACHE_HOME/seqmodels``, else ``~/.cache/seqmodels``."""
    own = os.environ.get("SEQMODELS_CACHE")
    if own:
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "seqmodels"


def cached_path(size: int, settings: Settings) -> Path:
    digest = hashlib.sha256(json.dumps(settings._asdict(), sort_keys=True).encode()).hexdigest()[:12]
    return cache_folder() / "ptd" / f"legs-{size}-{digest}.safetensors"


def load(path: Path, size: int) -> Entry | None:
    """What is stored at ``path``, or None where there is no file.

    Raises:
        ValueError: a file that cannot be read or holds something else; it is left as it is.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt", device="cpu") as file:
            entry = Entry(file.get_tensor("perturbation"), Settings(**json.loads(file.metadata()["settings"])))
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, and it will be computed again") from error
    if entry.perturbation.shape != (size, size):
        raise ValueError(
            f"{path} holds a matrix of {tuple(entry.perturbation.shape)}; expected {(size, size)}. Delete the file, "
            "and it will be computed again"
        )
    return entry


def save_entry(path: Path, perturbation: Tensor, settings: Settings) -> None:
    """Writes under a temporary name and renames, so that no reader meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    metadata = {"settings": json.dumps(settings._asdict(), sort_keys=True)}
    unfinished.write_bytes(save({"perturbation": perturbation.contiguous()}, metadata))
    os.replace(unfinished, path)
