"""Compiles ``csrc/cuda/*.cu`` with nvcc and reads the resources of every kernel in them."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from seqmodels.audit.compilation import Row, triton_tools
from seqmodels.audit.discovery import ROOT
from seqmodels.audit.resources import read_cubin
from seqmodels.ops.tiles import KNOWN_DEVICES

TARGETS = {"sm_80": "sm_80", "sm_90": "sm_90a", "sm_100": "sm_100a"}
FOLDER = ROOT.parent / "csrc" / "cuda"


def audit_sources(
    targets: list[str], workers: int | None = None, folder: Path = FOLDER
) -> tuple[list[Row], str | None]:
    """A row for every kernel of every file and target, and why there is none, if so.

    Occupancy is not computed: the block size is chosen at the launch.
    """
    files = sorted(folder.glob("*.cu"))
    if not files:
        return [], None
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return [], f"{len(files)} CUDA files were not compiled: nvcc is not on the path; install the CUDA toolkit"
    jobs = [(nvcc, path, target) for path in files for target in targets if target in TARGETS]
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return [row for rows in pool.map(lambda job: _compile(*job), jobs) for row in rows], None


def _compile(nvcc: str, path: Path, target: str) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        command = [nvcc, "-cubin", f"-arch={TARGETS[target]}", "-O3", "-std=c++17", "-o", str(cubin), str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr.strip()]
            return [Row(f"csrc/cuda/{path.name}", "", "", "", target, None, [f"does not compile: {lines[0]}"])]
        found = read_cubin(cubin.read_bytes(), _tools(nvcc))
    rows = []
    for name, used in sorted(found.items()):
        if KNOWN_DEVICES[target].architecture >= 90:  # type: ignore[operator]
            used.shared = max(0, used.shared - 1024)  # the driver's own KiB, reported from sm_90 on
        failures = [f"spills {used.spill} bytes a thread to local memory"] if used.spill else []
        rows.append(Row(f"csrc/cuda/{path.name}", _plain_name(name), "", "", target, used, failures))
    return rows


def _tools(nvcc: str) -> tuple[str, str]:
    """The toolkit's own disassembler where it has one (it knows its compiler's format), else Triton's."""
    folder = Path(nvcc).resolve().parent
    own = tuple(str(folder / name) for name in ("cuobjdump", "nvdisasm"))
    if all(Path(tool).exists() for tool in own):
        return own  # type: ignore[return-value]
    return triton_tools()


def _plain_name(mangled: str) -> str:
    tool = shutil.which("c++filt")
    if tool is None:
        return mangled
    return subprocess.run([tool, mangled], capture_output=True, text=True).stdout.strip() or mangled
