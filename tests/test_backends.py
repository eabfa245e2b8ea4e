"""Choosing a backend: by name, by environment, by device; nothing falls back when named."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import types

import pytest
import torch

import seqmodels
from seqmodels import BackendUnavailable, backends
from seqmodels.ops.registration import Operator


def _module(name, value, **extra):
    module = types.ModuleType(f"seqmodels_test_backends_{name}")
    module.forward = lambda x: x + value
    vars(module).update(extra)
    sys.modules[module.__name__] = module
    return module.__name__


ADD = Operator(
    "test_backends_add", "Tensor x", outputs=1, fake=torch.empty_like,
    modules={
        "reference": _module("reference", 1),
        "torch": _module("torch", 2),
        "cpu": _module("cpu", 3, supports=lambda x: "x is float64" if x.dtype == torch.float64 else None),
        "triton": _module("triton", 4),
    },
)  # fmt: skip
HIDDEN = Operator(
    "test_backends_hidden", "Tensor x", outputs=1, fake=torch.empty_like,
    modules={"torch": _module("plain", 2), "cpu": _module("by_name", 3, BY_NAME_ONLY=True)},
)  # fmt: skip


@pytest.fixture
def everything_installed(monkeypatch):
    monkeypatch.setattr(backends, "missing", lambda name: None)


def _taken(operator=ADD, dtype=torch.float32):
    return int(operator(torch.zeros(1, dtype=dtype)))


def test_named_backends_run(everything_installed):
    for name, value in (("reference", 1), ("torch", 2), ("cpu", 3)):
        with seqmodels.backend(name):
            assert _taken() == value


def test_auto_takes_the_fastest_that_accepts(everything_installed, monkeypatch):
    assert _taken() == 3
    assert _taken(dtype=torch.float64) == 2
    monkeypatch.setattr(backends, "missing", lambda name: "not built" if name == "cpu" else None)
    assert _taken() == 2


def test_auto_passes_over_by_name_only(everything_installed):
    assert _taken(HIDDEN) == 2
    with seqmodels.backend("cpu"):
        assert _taken(HIDDEN) == 3


def test_a_named_backend_never_falls_back(everything_installed, monkeypatch):
    with seqmodels.backend("cpu"), pytest.raises(BackendUnavailable, match="'cpu' was asked for, but x is float64"):
        _taken(dtype=torch.float64)
    with seqmodels.backend("cuda"), pytest.raises(BackendUnavailable, match="has only reference, torch, cpu, triton"):
        _taken()
    monkeypatch.setattr(backends, "missing", lambda name: "it is not built; run make install")
    with seqmodels.backend("cpu"), pytest.raises(BackendUnavailable, match="not built; run make install"):
        _taken()


def test_triton_kernels_refuse_cpu_tensors_outside_the_interpreter(everything_installed, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with seqmodels.backend("triton"), pytest.raises(BackendUnavailable, match="tensors are on 'cpu'"):
        _taken()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with seqmodels.backend("triton"):
        assert _taken() == 4


def test_kernels_on_a_gpu_launch_nothing_for_an_empty_tensor(everything_installed, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with seqmodels.backend("triton"), pytest.raises(BackendUnavailable, match="nothing to launch"):
        ADD(torch.zeros(0, 3))
    assert ADD(torch.zeros(0, 3)).shape == (0, 3)


def _fail_inside(name):
    with seqmodels.backend(name):
        assert backends.requested_backend() == name
        raise KeyError


def test_context_nests_and_restores_after_an_error():
    with seqmodels.backend("reference"):
        with pytest.raises(KeyError):
            _fail_inside("torch")
        assert backends.requested_backend() == "reference"
    assert backends.requested_backend() == "auto"


def test_unknown_name_is_refused():
    with pytest.raises(ValueError, match="unknown backend 'fast'; expected 'auto' or one of reference, torch, cpu"):
        seqmodels.backend("fast").__enter__()


def _python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_environment_variable():
    code = "from seqmodels.backends import requested_backend; print(requested_backend())"
    assert _python(code, SEQMODELS_BACKEND="reference").stdout.strip() == "reference"
    assert _python(code, SEQMODELS_BACKEND="").stdout.strip() == "auto"
    assert "SEQMODELS_BACKEND: unknown backend 'fast'" in _python(code, SEQMODELS_BACKEND="fast").stderr


def test_auto_says_once_what_it_took(everything_installed, caplog):
    caplog.set_level(logging.INFO, logger="seqmodels")
    backends.announce.cache_clear()
    backends._warned.clear()
    for _ in range(3):
        _taken(dtype=torch.float64)
    lines = [record for record in caplog.records if "test_backends_add" in record.message]
    assert len(lines) == 1
    assert lines[0].levelno == logging.WARNING
    assert "runs on backend 'torch' (not 'cpu': x is float64)" in lines[0].message


def test_missing_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    backends.missing.cache_clear()
    assert backends.missing("reference") is None
    assert backends.missing("torch") is None
    assert "no GPU" in backends.missing("cuda")
    assert backends.missing("triton")
    backends.missing.cache_clear()


def test_import_is_light():
    """``import seqmodels`` pulls in neither the compiler nor any extra."""
    heavy = ("torch._dynamo", "torch._inductor", "triton", "typer", "rich", "datasets", "transformers", "matplotlib")
    code = (
        "import sys, torch; before = set(sys.modules); import seqmodels; seqmodels.Mixer, seqmodels.Layout; "
        f"print([name for name in {heavy} if name in set(sys.modules) - before])"
    )
    done = _python(code)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
