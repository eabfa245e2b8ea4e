"""Reads what a compiled kernel uses out of its machine code.

NVIDIA: ``cuobjdump -res-usage`` and ``nvdisasm`` (both come with Triton). AMD: the assembly text.
Occupancy is computed from the architecture's limits.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from seqmodels.ops.tiles import Device

# (name shown, pattern of the opcode). UTCHMMA and its kin are tcgen05; QGMMA, IGMMA are wgmma's other dtypes.
_MATRIX = (
    ("wgmma", re.compile(r"^[HQIB]GMMA")),
    ("tcgen05", re.compile(r"^UTC[A-Z]?MMA")),
    ("mma.sync", re.compile(r"^(HMMA|IMMA|QMMA|DMMA|BMMA|OMMA)")),
)
_SASS_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
_USAGE = re.compile(r"Function (\S+?):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass
class Resources:
    """Use of one kernel, per thread or per block.

    Attributes:
        registers: 32-bit registers of a thread (vector and accumulation registers on AMD).
        spill: bytes of local memory of a thread; anything above zero is a spill.
        shared: bytes of shared memory of a block.
        matrix: matrix instructions by family: wgmma, mma.sync, tcgen05, mfma.
        local_accesses: load and store instructions on local memory.
        global_accesses: load and store instructions on global memory (asynchronous copies and TMA too).
        vectorised: those of them that move 16 bytes a thread or more.
        occupancy: share of the multiprocessor's warps that fit at once.
    """

    registers: int
    spill: int
    shared: int
    matrix: dict[str, int] = field(default_factory=dict)
    local_accesses: int = 0
    global_accesses: int = 0
    vectorised: int = 0
    occupancy: float = 0.0


def read_cubin(cubin: bytes, tools: tuple[str, str]) -> dict[str, Resources]:
    """Resources of every kernel in a cubin; shared memory is the static part only.

    ``tools`` are the paths of cuobjdump and nvdisasm.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _output([tools[0], "-res-usage", str(path)])
        sass = _output([tools[1], "-c", str(path)])
    found = {}
    bodies = _split_functions(sass)
    for name, registers, stack, shared, local in _USAGE.findall(usage):
        found[name] = Resources(
            registers=int(registers),
            spill=int(stack) + int(local),
            shared=int(shared),
            **_count_sass(bodies.get(name, "")),
        )
    if not found:
        raise RuntimeError(f"{tools[0]} reported no kernel in the cubin; its output was: {usage!r}")
    return found


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _split_functions(sass: str) -> dict[str, str]:
    parts = re.split(r"^\s*\.section\s+\.text\.(\S+?),.*$", sass, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _count_sass(body: str) -> dict:
    opcodes = Counter(match.group(1) for line in body.splitlines() if (match := _SASS_LINE.match(line)))
    matrix: Counter[str] = Counter()
    local = accesses = vectorised = 0
    for opcode, count in opcodes.items():
        for family, pattern in _MATRIX:
            if pattern.match(opcode):
                matrix[family] += count
        head, *modifiers = opcode.split(".")
        if head in ("LDL", "STL"):
            local += count
        elif head in ("LDG", "STG", "LDGSTS", "UTMALDG", "UTMASTG", "UBLKCP"):
            accesses += count
            if "128" in modifiers or "256" in modifiers or head.startswith("U"):
                vectorised += count
    return {
        "matrix": dict(matrix), "local_accesses": local, "global_accesses": accesses, "vectorised": vectorised,
    }  # fmt: skip


def read_amdgcn(assembly: str, shared: int) -> Resources:
    """Resources of the one kernel in an AMD assembly text."""

    def metadata(key: str) -> int:
        match = re.search(rf"^\s*\.{key}:\s+(\d+)", assembly, re.MULTILINE)
        if match is None:
            raise RuntimeError(f"the AMD assembly has no .{key}; this Triton writes another format")
        return int(match.group(1))

    opcodes = Counter(
        re.findall(r"^\s+(v_mfma\w*|(?:global|buffer|flat|scratch)_(?:load|store)_\w+)", assembly, re.MULTILINE)
    )
    total = {
        "matrix": sum(count for name, count in opcodes.items() if name.startswith("v_mfma")),
        "local": sum(count for name, count in opcodes.items() if name.startswith("scratch_")),
        "global": sum(count for name, count in opcodes.items() if name.startswith(("global_", "buffer_", "flat_"))),
        "vectorised": sum(count for name, count in opcodes.items() if re.match(r"(global|buffer|flat)_\w+x4\b", name)),
    }
    return Resources(
        registers=metadata("vgpr_count"),
        spill=metadata("private_segment_fixed_size"),
        shared=shared,
        matrix={"mfma": total["matrix"]} if total["matrix"] else {},
        local_accesses=total["local"],
        global_accesses=total["global"],
        vectorised=total["vectorised"],
    )


def occupancy(device: Device, registers: int, shared: int, num_warps: int) -> float:
    """Resident warps over the most that fit, for a block of ``num_warps`` warps.

    NVIDIA hands out registers by 256 a warp, in four equal parts of the multiprocessor, and keeps
    1 KiB of shared memory for itself in every block. AMD hands out vector registers of one SIMD (512 a
    lane) by 8, with four SIMDs a compute unit.
    """
    if device.backend == "hip":
        by_registers = 4 * (512 // max(8, -(-registers // 8) * 8)) // num_warps
        by_shared = device.multiprocessor_shared_memory // shared if shared else device.max_blocks
    else:
        per_warp = -(-registers * device.warp_size // 256) * 256
        by_registers = 4 * (device.registers // 4 // max(per_warp, 256)) // num_warps
        by_shared = device.multiprocessor_shared_memory // (shared + 1024)
    blocks = min(by_registers, by_shared, device.max_blocks, device.max_warps // num_warps)
    return blocks * num_warps / device.max_warps
