"""The package: what it builds, what it ships, what it imports, and how it does without its extension."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from statistics import median

import pytest

from seqmodels.ops import extension

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(extension.__file__).resolve().parent.parent
EXTRAS = ("triton", "datasets", "matplotlib", "lm_eval", "sklearn", "transformers", "peft", "flash_attn")
HAS_COMPILER = any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++"))
in_clone = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the clone")
needs_extension = pytest.mark.skipif(extension.load() is not None, reason=str(extension.load()))


def library() -> Path:
    return next(PACKAGE.glob("_C.*"))


def output(*command: str | Path, environment: dict[str, str] | None = None, cwd: Path = ROOT) -> str:
    """Standard output and error of a command that must succeed."""
    # CI asks for kernels or an error; what a test says of its own environment decides here.
    inherited = {name: value for name, value in os.environ.items() if name != "SEQMODELS_REQUIRE_KERNELS"}
    variables = {**inherited, **(environment or {})}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def python(code: str, folder: Path = PACKAGE.parent, **environment: str) -> str:
    """Runs code in a new process that imports seqmodels from ``folder``."""
    return output(sys.executable, "-c", code, environment={"PYTHONPATH": str(folder), **environment}, cwd=Path("/"))


# ---- the compiled library


@in_clone
@pytest.mark.skipif(not HAS_COMPILER or sys.platform == "win32", reason="no C++ compiler")
def test_the_extension_is_built_where_there_is_a_compiler():
    assert extension.load() is None


@needs_extension
@pytest.mark.skipif(not shutil.which("nm"), reason="no nm")
def test_the_library_needs_only_stable_symbols():
    symbols = output("nm", "-D", "--undefined-only", library()).splitlines()
    undefined = {line.split()[-1].split("@")[0] for line in symbols}
    torch_symbols = {name for name in undefined if "torch" in name or "c10" in name or re.match(r"_ZNK?2at", name)}
    assert torch_symbols, "the library calls nothing of torch: this test looks at the wrong file"
    unstable = {name for name in torch_symbols if not re.match(r"(aoti_)?torch_", name)}
    assert not unstable, "C++ symbols of torch are not stable across versions"
    assert not {name for name in undefined if re.match(r"_?Py[A-Z_]", name)}, "the library needs no Python symbol"


@needs_extension
@pytest.mark.skipif(not shutil.which("objdump") or os.uname().machine != "x86_64", reason="needs objdump on x86-64")
def test_only_kernels_of_a_level_use_its_instructions():
    """A library function compiled for AVX-512 and taken by all would stop older machines."""
    function, wrong = "", set()
    for line in output("objdump", "-d", "--no-show-raw-insn", library()).splitlines():
        if line.endswith(">:"):
            function = line.split("<")[1][:-2]
        elif ("%zmm" in line and "6avx512" not in function) or (
            "%ymm" in line and "6avx512" not in function and "4avx2" not in function
        ):
            wrong.add(function)
    assert not wrong


@needs_extension
def test_capability_can_be_lowered_from_outside():
    code = "from seqmodels.ops import extension; print(extension.capability_name())"
    assert python(code, SEQMODELS_CPU_CAPABILITY="default").strip() == "default"
    with pytest.raises(AssertionError, match="unknown CPU capability 'fast'"):
        python(code, SEQMODELS_CPU_CAPABILITY="fast")


# ---- without the extension

WITHOUT_EXTENSION = """
import logging, torch
lines = []
handler = logging.Handler()
handler.emit = lambda record: lines.append(record.getMessage()) if record.levelno >= logging.WARNING else None
logging.getLogger("seqmodels").addHandler(handler)
import seqmodels
from seqmodels.ops.short_conv import short_conv, short_conv_step
x, weight = torch.randn(2, 5, 8), torch.randn(8, 4, requires_grad=True)
y, state = short_conv(x, weight, activation="silu")
y.sum().backward()
short_conv_step(x[:, 0], weight, None, state.detach())
try:
    with seqmodels.backend("cpu"):
        short_conv(x, weight)
except seqmodels.BackendUnavailable as error:
    print("REFUSED", error)
print(len(lines), lines)
"""


def test_it_works_without_the_extension_and_says_so_once(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "seqmodels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    text = python(WITHOUT_EXTENSION, tmp_path)
    refused, logged = (line for line in text.splitlines() if line.startswith(("REFUSED", "1 [", "0 [", "2 [")))
    assert "backend 'cpu' was asked for" in refused
    assert logged.startswith("1 ["), logged
    for part in ("not built", "several times slower", "make install"):
        assert part in logged


@in_clone
@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_a_missing_or_failing_compiler_does_not_fail_the_build(tmp_path, compiler):
    folders = ("--build-lib", tmp_path / "lib", "--build-temp", tmp_path / "temp")
    command = (sys.executable, "setup.py", "--quiet", "build_ext", *folders)
    text = output(*command, environment={"CXX": compiler})
    assert "building without kernels" in text or "was not built" in text
    assert not list((tmp_path / "lib").rglob("*.so"))


# ---- imports


def test_importing_needs_no_extra_and_no_dynamo():
    code = (
        "import sys; import seqmodels; seqmodels.MIXERS; seqmodels.LanguageModel; import seqmodels.ops.short_conv;"
        f"print([m for m in {EXTRAS!r} if m in sys.modules], 'torch._dynamo' in sys.modules)"
    )
    assert python(code).strip().splitlines()[-1] == "[] False"


def test_importing_takes_less_than_one_and_a_half_times_torch():
    def seconds(code: str) -> float:
        start = time.perf_counter()
        python(code)
        return time.perf_counter() - start

    ratios = []
    for _ in range(3):  # interleaved: other work on the machine hits both
        alone = seconds("import torch")
        ratios.append(seconds("import seqmodels; seqmodels.MIXERS; seqmodels.LanguageModel") / alone)
    assert median(ratios) < 1.5


# ---- what is shipped


@in_clone
def test_the_list_of_packages_is_complete():
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(re.findall(r'^    "(seqmodels[\w.]*)",$', text, re.MULTILINE))
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "seqmodels").rglob("__init__.py")}
    assert listed == found


@in_clone
@pytest.mark.slow
def test_wheel_and_sdist(tmp_path):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "*.so", "__pycache__", "*.egg-info", "runs", "dist")
    shutil.copytree(ROOT, source, ignore=ignored)
    build = "import sys; from setuptools import build_meta as b; b.build_sdist('out'); print(b.build_wheel('out'))"
    output(sys.executable, "-c", build, cwd=source)
    (wheel,), (sdist,) = source.glob("out/*.whl"), source.glob("out/*.tar.gz")

    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
        archive.extractall(tmp_path / "installed")
    assert not [name for name in names if name.startswith(("evals", "tests", "csrc"))]
    assert {"seqmodels/py.typed", "seqmodels/cli.py"} <= set(names)
    assert "License-Expression: Apache-2.0" in metadata
    for extra in ("triton", "train", "eval", "hf", "cuda", "test"):
        assert f"Provides-Extra: {extra}\n" in metadata
    with tarfile.open(sdist) as archive:
        sources = {name.partition("/")[2] for name in archive.getnames()}
    assert {"setup.py", "csrc/cpu/dispatch.h", "csrc/cpu/short_conv.cpp", "constraints.txt", "LICENSE"} <= sources

    if HAS_COMPILER:
        assert "-cp310-abi3-" in wheel.name
        assert "seqmodels/_C.abi3.so" in names
    code = (
        "import seqmodels, seqmodels.mixers as m; from seqmodels.testing import check_layer;"
        "print(seqmodels.__file__); check_layer(m.GatedConv, d_model=16);"
        "check_layer(m.LinearAttention, d_model=16, num_heads=2)"
    )
    assert str(tmp_path / "installed") in python(code, tmp_path / "installed")
