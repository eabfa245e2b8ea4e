"""The audit compiles real kernels and catches each way in which one can be unfit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the audit compiles with Triton, which is not installed")

from seqmodels.audit import baseline, run
from seqmodels.audit.compilation import Row, plan
from seqmodels.audit.discovery import discover, kernel_modules, misplaced
from seqmodels.audit.resources import Resources, occupancy
from seqmodels.ops.kernels import KernelSpec
from seqmodels.ops.tiles import KNOWN_DEVICES, Tile

SAMPLES = str(Path(__file__).with_name("sample_kernels.py"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQMODELS_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def audit(cache):
    return run(modules=[SAMPLES], quick=True, workers=2)


def failures_of(audit, kernel):
    return [failure for row in audit.rows if row.kernel == kernel for failure in row.failures]


def test_good_kernel_passes_and_reports_its_resources(audit):
    (row,) = [row for row in audit.rows if row.kernel == "sample.good"]
    assert row.failures == []
    used = row.resources
    assert 32 <= used.registers <= 255
    assert used.spill == 0
    assert used.local_accesses == 0
    assert used.shared >= 2 * 64 * 64 * 2
    assert set(used.matrix) == {"wgmma"}
    assert 0 < used.vectorised <= used.global_accesses
    assert 0 < used.occupancy <= 1


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("sample.overrun", "bytes of shared memory; sm_90 has 232448"),
        ("sample.idle", "should use wgmma; matrix instructions found: none"),
        ("sample.spill", "spills"),
        ("sample.broken", "does not compile: CompilationError"),
    ],
)
def test_each_fault_is_caught(audit, kernel, message):
    assert any(message in failure for failure in failures_of(audit, kernel))
    assert not audit.passed


def test_kernel_nobody_registered_is_named(audit):
    assert any("unregistered_kernel is a kernel nobody registered" in problem for problem in audit.problems)
    assert not any("_scaled" in problem for problem in audit.problems), "helpers of declared kernels need no entry"


def test_kernel_in_another_place_is_named(tmp_path):
    (tmp_path / "ops" / "scan").mkdir(parents=True)
    kernel = "import triton\n@triton.jit\ndef kernel(x):\n    pass\n"
    (tmp_path / "ops" / "scan" / "triton_step.py").write_text(kernel)
    (tmp_path / "layer.py").write_text('"""Not @triton.jit."""\n' + kernel.replace("jit", "jit(debug=True)"))
    (problem,) = misplaced(tmp_path)
    assert "layer.py: kernel kernel belongs in" in problem


def test_kernel_that_is_tuned_at_run_time_is_refused(tmp_path):
    path = tmp_path / "tuned_kernels.py"
    config = "triton.Config({'SIZE': 64})"
    path.write_text(
        "import triton\nimport triton.language as tl\n"
        f"@triton.autotune([{config}], key=['n'])\n@triton.jit\n"
        "def tuned(x, n, SIZE: tl.constexpr):\n    tl.store(x + tl.arange(0, SIZE), n)\n"
    )
    (problem,) = discover([str(path)]).problems
    assert "tuned is wrapped by triton.autotuner: it would be timed" in problem


def test_second_run_reads_the_cache(audit, cache, monkeypatch):
    monkeypatch.setattr("seqmodels.audit.compilation.ProcessPoolExecutor", None)
    monkeypatch.setattr("seqmodels.audit.compilation._measure", lambda spec, job: pytest.fail(f"{job} compiled again"))
    again = run(modules=[SAMPLES], quick=True, kernels="good")
    assert [row.resources for row in again.rows] == [row.resources for row in audit.rows if row.kernel == "sample.good"]


def test_plan_covers_every_tile_on_the_main_target_and_the_default_elsewhere():
    kernels = {"sample.good": discover([SAMPLES]).kernels["sample.good"]}
    jobs = list(plan(kernels, ["sm_90", "sm_80", "gfx942"]))
    assert sum(job.target == "sm_90" for job in jobs) == 2 * 2 * 2
    for target in ("sm_80", "gfx942"):
        found = {(job.variant, job.dtype, job.tile.label) for job in jobs if job.target == target}
        assert found == {(v, d, "BLOCK_L=64 w4 s2") for v, d in ((0, "bf16"), (1, "bf16"), (0, "fp16"))}
    assert len(list(plan(kernels, ["sm_80"], quick=True))) == 1


def test_other_architectures_compile_without_their_gpu(cache):
    found = run(modules=[SAMPLES], kernels="good", targets=["sm_80", "sm_100", "gfx942"], workers=2)
    matrix = {row.target: set(row.resources.matrix) for row in found.rows if row.dtype == "bf16"}
    assert matrix == {"sm_80": {"mma.sync"}, "sm_100": {"tcgen05"}, "gfx942": {"mfma"}}
    assert all(row.failures == [] for row in found.rows)


def test_baseline_shows_regressions_only(tmp_path):
    path = tmp_path / "baseline.json"
    row = Row("a", "", "bf16", "t", "sm_90", Resources(registers=100, spill=0, shared=1024))
    baseline.save([row], "3.6.0", path)
    version, recorded = baseline.load(path)
    assert (version, recorded) == ("3.6.0", {row.key: [100, 1024, 0]})
    assert baseline.regressions([row], recorded) == []
    row.resources = Resources(registers=90, spill=0, shared=512)
    assert baseline.regressions([row], recorded) == []
    row.resources = Resources(registers=101, spill=0, shared=2048)
    assert len(baseline.regressions([row], recorded)) == 2
    other = Row("b", "", "bf16", "t", "sm_90", Resources(registers=1, spill=0, shared=0))
    assert baseline.changes([other], recorded) == ([other.key], [row.key])


def test_run_compares_with_the_baseline(audit, cache, tmp_path):
    path = tmp_path / "baseline.json"
    run(modules=[SAMPLES], quick=True, kernels="good", baseline_path=path, update_baseline=True)
    stored = json.loads(path.read_text())
    (key,) = stored["rows"]
    stored["rows"][key][0] -= 1
    path.write_text(json.dumps(stored))
    worse = run(modules=[SAMPLES], quick=True, kernels="good", baseline_path=path)
    assert any("registers" in problem and "--update-baseline" in problem for problem in worse.problems)


def test_occupancy_follows_registers_shared_memory_and_warps():
    device = KNOWN_DEVICES["sm_90"]
    assert occupancy(device, registers=32, shared=0, num_warps=4) == 1.0
    assert occupancy(device, registers=255, shared=0, num_warps=4) == 8 / 64
    assert occupancy(device, registers=128, shared=0, num_warps=4) == 16 / 64
    assert occupancy(device, registers=32, shared=100 * 1024, num_warps=4) == 8 / 64
    assert occupancy(device, registers=32, shared=300 * 1024, num_warps=4) == 0
    assert occupancy(KNOWN_DEVICES["gfx942"], registers=128, shared=0, num_warps=4) == 16 / 32


def test_declaration_that_does_not_fit_its_kernel_is_refused():
    function = discover([SAMPLES]).kernels["sample.good"].function
    signature = {**dict.fromkeys(("a", "b", "y", "bias"), "*fp32"), "nothing": "i32"}
    with pytest.raises(ValueError, match=r"lacks \['length', 'HEAD_DIM'\] and names unknown \['nothing'\]"):
        KernelSpec("x", function, signature, (Tile({"BLOCK_L": 1}),))


def test_heuristic_must_choose_a_shipped_tile():
    good = discover([SAMPLES]).kernels["sample.good"]
    spec = KernelSpec(
        good.name, good.function, good.signature, good.tiles, good.variants, choose=lambda *_: Tile({"BLOCK_L": 16})
    )
    with pytest.raises(ValueError, match="not among the shipped tiles"):
        spec.default_tile(KNOWN_DEVICES["sm_90"], good.variants[0], "bf16")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown target 'sm_75'; expected one of sm_90"):
        run(modules=[SAMPLES], targets=["sm_75"])
    with pytest.raises(ValueError, match="no kernel has 'nothing' in its name"):
        run(modules=[SAMPLES], kernels="nothing")
    assert "no_such_module does not import" in discover(["no_such_module"]).problems[0]


def test_interpreter_process_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset it"):
        run(quick=True)


def test_every_kernel_of_the_library(tmp_path):
    """``seqmodels audit --quick`` on the library itself, as a user runs it."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "seqmodels.cli", "audit", "--quick", "--json", str(tmp_path / "audit.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    stored = json.loads((tmp_path / "audit.json").read_text())
    assert stored["passed"]
    assert len(stored["rows"]) >= len(kernel_modules())
