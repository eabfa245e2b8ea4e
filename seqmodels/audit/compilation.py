"""Compiles declared kernels for architectures that are not here, in parallel, once per content."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from seqmodels.audit import resources
from seqmodels.audit.discovery import discover
from seqmodels.audit.resources import Resources, occupancy
from seqmodels.ops.kernels import KernelSpec
from seqmodels.ops.tiles import KNOWN_DEVICES, Tile, cache_folder, variant_label

MAIN_TARGET = "sm_90"  # every shipped configuration is compiled for this one
OTHER_TARGETS = ("sm_80", "sm_86", "sm_100", "gfx942")  # the default configuration
_MATRIX_FAMILIES = {"sm_80": ("mma.sync",), "sm_86": ("mma.sync",), "gfx942": ("mfma",)}


@dataclass(frozen=True)
class Job:
    """One compilation: a kernel, its constants, the inputs' dtype, a tile and a target."""

    kernel: str
    variant: int
    dtype: str
    tile: Tile
    target: str


@dataclass
class Row:
    """One line of the audit's table. ``failures`` is empty when all is well."""

    kernel: str
    variant: str
    dtype: str
    tile: str
    target: str
    resources: Resources | None
    failures: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        """What identifies the row in the baseline."""
        return " | ".join((self.kernel, self.variant, self.dtype, self.tile, self.target))


def plan(kernels: dict[str, KernelSpec], targets: Iterable[str], *, quick: bool = False) -> Iterator[Job]:
    """All compilations that the audit makes.

    For sm_90 every tile, dtype and variant; for the others the default tile, with every variant in the
    first dtype and every dtype in the first variant. ``quick``: the default of every kernel, once, for sm_90.
    """
    for name, spec in sorted(kernels.items()):
        for target in (MAIN_TARGET,) if quick else targets:
            device = KNOWN_DEVICES[target]
            if spec.devices is not None and not spec.devices(device):
                continue
            for index, variant in enumerate(spec.variants):
                for dtype in spec.dtypes:
                    first = index == 0 and dtype == spec.dtypes[0]
                    if target == MAIN_TARGET and not quick:
                        for tile in spec.shipped_tiles(variant, dtype):
                            yield Job(name, index, dtype, tile, target)
                    elif first or (not quick and (index == 0 or dtype == spec.dtypes[0])):
                        yield Job(name, index, dtype, spec.default_tile(device, variant, dtype), target)


def compile_all(
    jobs: list[Job],
    *,
    modules: list[str] | None = None,
    workers: int | None = None,
    use_cache: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """A row for every job, in order. Results are kept by content, so a second run takes seconds."""
    kernels = discover(modules).kernels
    paths = [_cache_path(kernels[job.kernel], job) for job in jobs]
    rows: list[Row | None] = [_load(path) if use_cache else None for path in paths]
    pending = [index for index, row in enumerate(rows) if row is None]
    done = len(jobs) - len(pending)
    progress(done, len(jobs))
    workers = min(workers or os.cpu_count() or 1, max(1, len(pending) // 2))
    if len(pending) <= 2:
        results = ((index, compile_one(kernels[jobs[index].kernel], jobs[index])) for index in pending)
        for index, row in results:
            rows[index] = row
            _store(paths[index], row)
    else:
        context = multiprocessing.get_context("spawn")  # Triton and torch hold threads: no fork
        with ProcessPoolExecutor(workers, context, _start_worker, (modules,)) as pool:
            futures = {pool.submit(_work, jobs[index]): index for index in pending}
            for future in as_completed(futures):
                index = futures[future]
                row = rows[index] = future.result()
                _store(paths[index], row)
                done += 1
                progress(done, len(jobs))
    return [row for row in rows if row is not None]


_worker_kernels: dict[str, KernelSpec] = {}


def _start_worker(modules: list[str] | None) -> None:
    _worker_kernels.update(discover(modules).kernels)


def _work(job: Job) -> Row:
    return compile_one(_worker_kernels[job.kernel], job)


def compile_one(spec: KernelSpec, job: Job) -> Row:
    """Compiles one configuration and judges it."""
    variant = spec.variants[job.variant]
    telling = {name: value for name, value in variant.items() if not _shared_by_all(spec, name)}
    row = Row(spec.name, variant_label(telling), job.dtype, job.tile.label, job.target, None)
    try:
        row.resources = _measure(spec, job)
    except Exception as error:  # a kernel that does not compile is a finding, not the end of the audit
        row.failures.append(f"does not compile: {type(error).__name__}: {_first_line(error)}")
        return row
    row.failures.extend(judge(spec, job, row.resources))
    return row


def _shared_by_all(spec: KernelSpec, name: str) -> bool:
    """Whether a constant says nothing about a variant, because every variant has the same."""
    return len({repr(variant.get(name, "absent")) for variant in spec.variants}) == 1 and len(spec.variants) > 1


def judge(spec: KernelSpec, job: Job, found: Resources) -> list[str]:
    """What is wrong with a compiled kernel: a spill, an overrun, matrix units left idle."""
    failures = []
    limit = KNOWN_DEVICES[job.target].shared_memory
    if found.spill:
        failures.append(f"spills {found.spill} bytes a thread to local memory")
    if found.shared > limit:
        failures.append(f"needs {found.shared} bytes of shared memory; {job.target} has {limit}")
    if job.dtype in spec.matrix_units:
        # sm_100 falls back to mma.sync for small tiles; on sm_90 that costs about 40% of the peak
        families = _MATRIX_FAMILIES.get(job.target, ("wgmma", "tcgen05", "mma.sync"))
        if job.target == "sm_90" and spec.warpgroup:
            families = ("wgmma",)
        if not any(family in found.matrix for family in families):
            got = ", ".join(found.matrix) or "none"
            failures.append(f"should use {' or '.join(families)}; matrix instructions found: {got}")
    return failures


def _measure(spec: KernelSpec, job: Job) -> Resources:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    device = KNOWN_DEVICES[job.target]
    target = GPUTarget(device.backend, device.architecture, device.warp_size)
    options = {"num_warps": job.tile.num_warps, "num_stages": job.tile.num_stages}
    with tempfile.TemporaryDirectory() as folder, knobs.cache.scope():
        knobs.cache.dir = folder
        kernel = triton.compile(_source(spec, job), target=target, options=options)
    shared, num_warps = kernel.metadata.shared, kernel.metadata.num_warps
    if device.backend == "hip":
        found = resources.read_amdgcn(kernel.asm["amdgcn"], shared)
    else:
        found = resources.read_cubin(kernel.asm["cubin"], triton_tools())[kernel.metadata.name]
        found.shared = shared
    found.occupancy = occupancy(device, found.registers, found.shared, num_warps)
    return found


def triton_tools() -> tuple[str, str]:
    """cuobjdump and nvdisasm from Triton's package."""
    from triton import knobs

    return knobs.nvidia.cuobjdump.path, knobs.nvidia.nvdisasm.path


def _source(spec: KernelSpec, job: Job) -> Any:
    """What Triton would compile at a launch with 16-byte aligned tensors."""
    from triton.compiler import ASTSource

    variant = spec.variants[job.variant]
    constants = {**variant, **job.tile.constants}
    signature, aligned = {}, {}
    for position, name in enumerate(spec.function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = spec.signature[name].format(dtype=job.dtype, **constants)
        if signature[name].startswith("*") or name in spec.divisible:
            aligned[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(spec.function, signature, constants, aligned)


def _cache_path(spec: KernelSpec, job: Job) -> Path:
    import triton

    content = [
        triton.__version__,
        spec.function.cache_key,
        sorted(spec.signature.items()),
        sorted(map(str, spec.variants[job.variant].items())),
        (spec.name, spec.matrix_units, spec.warpgroup, spec.divisible),
        (job.dtype, job.tile.label, job.target),
        Path(resources.__file__).read_text(),
        Path(__file__).read_text(),
    ]
    return cache_folder() / "audit" / f"{hashlib.sha256(repr(content).encode()).hexdigest()}.json"


def _load(path: Path) -> Row | None:
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    found = stored.pop("resources")
    return Row(**stored, resources=None if found is None else Resources(**found))


def _store(path: Path, row: Row) -> None:
    if row.resources is None:  # a failed compilation is tried again: the tools may have been at fault
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(asdict(row)))
    draft.replace(path)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)
