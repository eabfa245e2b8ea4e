"""Checkpoints that are either whole or not there.

A checkpoint is a folder ``step_00000100`` of safetensors and JSON (nothing is pickled)::

    model.safetensors       parameters and buffers, whole tensors also after sharded training
    optimizer.safetensors   AdamW's moments and step counts by parameter name
    rng.safetensors         random generators, one entry a process
    config.yaml             the run's configuration
    parts.yaml              which parts run, where that is not all (a curriculum)
    carried_0.safetensors   states that rows go on from, one file a process; where some are carried
    trainer.json            step, data position, sizes of the files above

It is written under a temporary name, flushed to the disk, and renamed; it is renamed again
before it is deleted. A process killed at any moment therefore leaves complete folders only,
plus temporary ones that the next run removes.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as distributed_checkpoint
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor

from seqmodels.configuration import dump_yaml
from seqmodels.models.loading import PARTS
from seqmodels.models.running_parts import RunningParts
from seqmodels.training.distributed import Processes

_STEP = re.compile(r"step_(\d{8})")
_TEMPORARY = (".writing-", ".deleting-")


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, is damaged, or belongs to another model."""


class Checkpoint(NamedTuple):
    """What a run needs to go on: named tensors, and plain values."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: dict[str, Tensor]
    trainer: dict[str, Any]
    carried: dict[str, Tensor] = {}  # noqa: RUF012 - the default is never written; all processes' when loaded


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in ``folder``, oldest first."""
    found = [path for path in folder.glob("step_*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found)


def remove_leftovers(folder: Path) -> None:
    """Deletes what killed processes left under temporary names."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.name.startswith(_TEMPORARY):
            shutil.rmtree(path)


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Deletes all complete checkpoints but the newest ``keep``."""
    for old in list_checkpoints(folder)[:-keep]:
        _delete(old)


def save_checkpoint(
    folder: Path,
    step: int,
    checkpoint: Checkpoint,
    config: str,
    here: Processes,
    *,
    keep: int,
    parts: RunningParts | None = None,
) -> Path:
    """Writes ``folder/step_########`` and deletes all but the newest ``keep``. Every process must call it.

    ``parts``: what runs of the model that these weights are of, when that may not be all of it.

    Raises:
        CheckpointError: the disk is full or the folder not writable; nothing half-written remains.
    """
    final = folder / f"step_{step:08d}"
    temporary = folder / f".writing-{final.name}"
    generators = _gather_generators(checkpoint.rng, here)

    def start() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def finish() -> None:
        save_file(generators, temporary / "rng.safetensors")
        (temporary / "config.yaml").write_text(config)
        if parts is not None and not parts.as_configured:
            (temporary / PARTS).write_text(dump_yaml(parts))
        sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        (temporary / "trainer.json").write_text(json.dumps({**checkpoint.trainer, "files": sizes}, indent=1))
        for path in temporary.iterdir():
            _flush(path)
        _flush(temporary)
        if final.exists():
            _delete(final)
        os.replace(temporary, final)
        _flush(folder)
        prune_checkpoints(folder, keep)

    try:
        here.on_main(start)
        _write_tensors(checkpoint.model, temporary, "model", here)
        _write_tensors(checkpoint.optimizer, temporary, "optimizer", here)
        here.together(lambda: _write_carried(checkpoint.carried, temporary / f"carried_{here.rank}.safetensors"))
        here.on_main(finish)
    except (OSError, SafetensorError, CheckpointException) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        complete = list_checkpoints(folder)
        last = (
            f"the newest complete checkpoint is {complete[-1]}" if complete else "there is no complete checkpoint yet"
        )
        raise CheckpointError(
            f"cannot write checkpoint {final}: {error}; {last}. Free space or fix the folder's permissions, "
            "then go on with --resume"
        ) from error
    return final


def load_checkpoint(path: Path, model: Mapping[str, Tensor], here: Processes) -> Checkpoint:
    """Reads a checkpoint; ``model`` (a state dict) says which names, shapes and shards are wanted.

    Raises:
        CheckpointError: a missing or truncated file, or tensors of another model (listed).
    """
    trainer = check_files(path)
    weights = read_tensors(path / "model.safetensors")
    wrong = mismatches(weights, model)
    if wrong:
        raise CheckpointError(f"{path} holds another model:\n  " + "\n  ".join(wrong))
    restored = {name: _like(weights[name], tensor) for name, tensor in model.items()}
    optimizer = {
        name: _like(tensor, model.get(name.rpartition(".")[0]))
        for name, tensor in read_tensors(path / "optimizer.safetensors").items()
    }
    generators = read_tensors(path / "rng.safetensors")
    prefix = f"{here.rank}."
    rng = {name.removeprefix(prefix): tensor for name, tensor in generators.items() if name.startswith(prefix)}
    carried: dict[str, Tensor] = {}
    for file in sorted(path.glob("carried_*.safetensors")):
        carried |= read_tensors(file)
    return Checkpoint(restored, optimizer, rng, trainer, carried)


def check_files(path: Path) -> dict[str, Any]:
    """The plain values of a checkpoint whose files all have the sizes they were written with."""
    try:
        trainer = json.loads((path / "trainer.json").read_text())
        files = trainer["files"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path} has no readable trainer.json: {error}") from error
    for name, size in files.items():
        found = (path / name).stat().st_size if (path / name).exists() else None
        if found != size:
            state = "is missing" if found is None else f"is truncated or damaged: {found} bytes instead of {size}"
            raise CheckpointError(
                f"checkpoint file {path / name} {state}; delete the folder {path} to go on from the one before it"
            )
    return trainer


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; the file is truncated or not safetensors") from error


def mismatches(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    """Lines that say which tensors are missing, extra or of another shape."""
    lines = [f"{name} is missing" for name in wanted if name not in found]
    lines += [f"{name} is not a tensor of this model" for name in found if name not in wanted]
    for name in wanted:
        if name in found and found[name].shape != wanted[name].shape:
            lines.append(f"{name} is {tuple(found[name].shape)}; this model has {tuple(wanted[name].shape)}")
    return lines


def _write_carried(tensors: dict[str, Tensor], path: Path) -> None:
    if tensors:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)


def _write_tensors(tensors: dict[str, Tensor], folder: Path, name: str, here: Processes) -> None:
    """``folder/name.safetensors`` with whole tensors, from shards when there are any."""
    path = folder / f"{name}.safetensors"
    if not any(isinstance(tensor, DTensor) for tensor in tensors.values()):
        plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        here.on_main(lambda: save_file(plain, path))
        return
    parts = folder / name
    writer = distributed_checkpoint.HuggingFaceStorageWriter(
        str(parts), save_distributed=True, enable_consolidation=True
    )
    # torch's consolidation loses the values of tensors without dimensions: they travel as (1,).
    scalars = [key for key, tensor in tensors.items() if tensor.dim() == 0]
    shaped = {key: tensor.reshape(1) if tensor.dim() == 0 else tensor for key, tensor in tensors.items()}
    distributed_checkpoint.save(shaped, storage_writer=writer)

    def collect() -> None:
        (whole,) = parts.glob("*.safetensors")
        _drop_dimensions(whole, scalars)
        os.replace(whole, path)
        shutil.rmtree(parts)

    here.on_main(collect)


def _drop_dimensions(path: Path, names: list[str]) -> None:
    """Rewrites the shapes of ``names`` in a safetensors header from [1] to []; the data stays where it is."""
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name in names:
            header[name]["shape"] = []
        file.seek(8)
        file.write(json.dumps(header, separators=(",", ":")).encode().ljust(size))


def _gather_generators(rng: dict[str, Tensor], here: Processes) -> dict[str, Tensor]:
    gathered: list[dict[str, Tensor]] = [rng]
    if here.world_size > 1:
        gathered = [{} for _ in range(here.world_size)]
        dist.all_gather_object(gathered, rng)
    return {f"{rank}.{name}": tensor for rank, entry in enumerate(gathered) for name, tensor in entry.items()}


def _like(tensor: Tensor, reference: Tensor | None) -> Tensor:
    """``tensor`` sharded and placed as ``reference`` is; step counts (scalars) stay whole, on the CPU."""
    if reference is None or tensor.dim() != reference.dim() or tensor.shape != reference.shape:
        return tensor
    if isinstance(reference, DTensor):
        local = tensor.to(reference.device)
        return distribute_tensor(local, reference.device_mesh, reference.placements, src_data_rank=None)
    return tensor.to(reference.device)


def _delete(path: Path) -> None:
    """Renames first: a kill in the middle must not leave part of a checkpoint under a complete name."""
    doomed = path.with_name(f".deleting-{path.name}")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    with _opened(path) as descriptor:
        os.fsync(descriptor)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """States of the random generators this process draws from."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Inverse of :func:`generator_states`; a process without a saved state keeps its seed."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
