"""Builds the compiled kernels in ``csrc/`` where torch and a compiler are present.

One shared library, ``seqmodels/_C.abi3.so``, holds the CPU kernels. It uses torch's stable
ABI (target 2.11) and no Python symbol, so one wheel serves every torch from 2.11 on and
every Python from 3.10 on. Every source is compiled once per instruction set (see
``csrc/cpu/dispatch.h``). ``seqmodels/_CUDA.abi3.so`` is built beside it when
``SEQMODELS_CUDA=1``, or when torch is a CUDA build and nvcc is found.

Nothing here fails an installation: without torch or a compiler the package installs without
kernels, says so, and runs on PyTorch and Triton.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ABI_TARGET = "0x020b000000000000"  # torch 2.11
X86 = platform.machine().lower() in ("x86_64", "amd64")
LEVELS = {"plain": []}
if X86:
    LEVELS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    LEVELS["avx512"] = [
        "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c", "-mprefer-vector-width=512",
    ]  # fmt: skip
COMPILE = ["-std=c++17", "-O3", "-fPIC", "-Wall", "-Wextra", "-fvisibility=hidden", "-fno-math-errno",
           "-fno-trapping-math", "-ffp-contract=fast", f"-DTORCH_TARGET_VERSION={ABI_TARGET}"]  # fmt: skip
SANITIZE = ["-fsanitize=address", "-fno-omit-frame-pointer", "-g", "-O1"]
# Without warning 128: a loop behind `if (a template argument) continue` is not reached in some instances.
CUDA_COMPILE = ["nvcc", "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-diag-suppress", "128"]
# Code for three GPU generations (the last two with their own matrix instructions), and PTX of
# the first for every other.
CUDA_ARCHITECTURES = os.environ.get("SEQMODELS_CUDA_ARCHITECTURES", "80;90a;100a").split(";")


def find_torch() -> Path | None:
    """The folder of an installed torch >= 2.11, or None."""
    try:
        import torch
    except ImportError:
        print("seqmodels: torch is not importable here (build isolation hides it); building without kernels. "
              "Install torch first and pass --no-build-isolation to get them.", file=sys.stderr)  # fmt: skip
        return None
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 11):
        print(f"seqmodels: torch {torch.__version__} is older than 2.11; building without kernels.", file=sys.stderr)
        return None
    return Path(torch.__file__).resolve().parent


def find_compiler() -> str | None:
    """$CXX, else the first of c++, g++ and clang++ on the path."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        if shutil.which(candidate.split()[0]):
            return candidate
    print(f"seqmodels: no C++ compiler found (looked for {', '.join(candidates)}); building without kernels.",
          file=sys.stderr)  # fmt: skip
    return None


def wants_cuda() -> bool:
    if not list((ROOT / "csrc/cuda").glob("*.cu")):
        return False
    setting = os.environ.get("SEQMODELS_CUDA")
    if setting is not None:
        return setting == "1"
    import torch

    return torch.version.cuda is not None and shutil.which("nvcc") is not None


def extensions() -> list[Extension]:
    if sys.platform == "win32" or find_torch() is None or find_compiler() is None:
        return []
    found = [Extension("seqmodels._C", relative("csrc/cpu", "*.cpp"), py_limited_api=True, optional=True)]
    if wants_cuda():
        sources = relative("csrc/cuda", "*.cu") + relative("csrc/cuda", "*.cpp")
        found.append(Extension("seqmodels._CUDA", sources, py_limited_api=True, optional=True))
    return found


def relative(folder: str, pattern: str) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in sorted((ROOT / folder).glob(pattern))]


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One build at a time in this folder: editable installs share it."""
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


class BuildKernels(build_ext):
    """Compiles every source at every level in parallel, skipping what is up to date."""

    def build_extension(self, ext: Extension) -> None:
        folder = ROOT / "build" / "kernels"
        target = Path(self.get_ext_fullpath(ext.name))
        try:
            with locked(folder):
                self._build(ext, folder, target)
        except (OSError, subprocess.CalledProcessError) as error:
            # A compiler that cannot build the kernels must not stop the installation.
            reason = f"{Path(error.cmd[-1]).name} failed, see above" if hasattr(error, "cmd") else str(error)
            print(f"seqmodels: {ext.name} was not built ({reason}); the package works without it.", file=sys.stderr)
            if os.environ.get("SEQMODELS_REQUIRE_KERNELS") == "1":
                raise SystemExit(1) from error

    def copy_extensions_to_source(self) -> None:
        """In-place and editable builds: setuptools' copy is not atomic and fails on a missing file."""
        for ext in self.extensions:
            filename = self.get_ext_filename(ext.name)
            built = Path(self.build_lib) / filename
            if built.exists():
                install(built, ROOT / filename)

    def _build(self, ext: Extension, folder: Path, target: Path) -> None:
        torch_folder, compiler = find_torch(), find_compiler()
        if torch_folder is None or compiler is None:
            raise OSError("torch or the compiler went away")
        sanitize = SANITIZE if os.environ.get("SEQMODELS_ASAN") == "1" else []
        # Objects of another compiler, torch or set of flags are not up to date, whatever their age.
        identity = repr((compiler, torch_folder, (torch_folder / "version.py").read_text(), COMPILE, LEVELS, sanitize))
        folder = folder / hashlib.sha256(identity.encode()).hexdigest()[:12]
        folder.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{ROOT / 'csrc/cpu'}", f"-isystem{torch_folder / 'include'}"]
        base = [*compiler.split(), *COMPILE, *includes, *sanitize]
        # Registration files of CUDA hold no CPU kernel: one level is enough for them.
        levels = LEVELS if ext.name.endswith("._C") else {"plain": []}
        sources = [Path(source) for source in ext.sources]
        jobs = [(CUDA_COMPILE + architectures(), source, folder / f"{source.name}.o")
                for source in sources if source.suffix == ".cu"]  # fmt: skip
        for level, flags in levels.items():  # in this order the linker meets plain objects first: see dispatch.h
            define = [f"-DSEQMODELS_LEVEL={level}", f"-DSEQMODELS_LAUNCHERS={int(level == 'plain')}"]
            jobs += [([*base, *define, *flags], source, folder / f"{source.name}.{level}.o")
                     for source in sources if source.suffix == ".cpp"]  # fmt: skip
        newest_header = max(path.stat().st_mtime for path in [*(ROOT / "csrc").rglob("*.h"), ROOT / "setup.py"])
        stale = [job for job in jobs if not up_to_date(job[2], ROOT / job[1], newest_header)]
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            list(pool.map(compile_one, stale))

        libraries = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
        linker = [*compiler.split(), *sanitize]
        if ext.name.endswith("._CUDA"):  # nvcc knows where its own run-time library lies
            linker, libraries = ["nvcc"], [*libraries, "-ltorch_cuda"]
        target.parent.mkdir(parents=True, exist_ok=True)
        linked = folder / target.name
        run([*linker, "-shared", *(str(job[2]) for job in jobs), *libraries, "-o", str(linked)])
        install(linked, target)


def up_to_date(built: Path, source: Path, newest_header: float) -> bool:
    return built.exists() and built.stat().st_mtime > max(source.stat().st_mtime, newest_header)


def architectures() -> list[str]:
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in CUDA_ARCHITECTURES]
    oldest = CUDA_ARCHITECTURES[0]
    return [*flags, f"-gencode=arch=compute_{oldest},code=compute_{oldest}"]


def install(source: Path, target: Path) -> None:
    """Copies under a temporary name and renames: a process that has the old library mapped keeps it."""
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, unfinished)
    os.replace(unfinished, target)


def compile_one(job: tuple[list[str], Path, Path]) -> None:
    command, source, target = job
    run([*command, "-c", str(ROOT / source), "-o", str(target)])


def run(command: list[str]) -> None:
    """Runs a command in silence; shows it and what it said when it fails or warns."""
    print(f"building {Path(command[-1]).name}", flush=True)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or done.stderr:
        print(f"{' '.join(command)}\n{done.stdout}{done.stderr}", file=sys.stderr)
    done.check_returncode()


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
