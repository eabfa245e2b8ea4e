"""The throughput suite on tiny cases: correctness first, rows as promised, faults that do not spread."""

from __future__ import annotations

import math
import time

import pytest
import torch

from evals.results import Results, read
from evals.throughput import compilation, derived, layers, ops, rivals, runner, suites, timing
from evals.throughput.__main__ import main
from evals.throughput.ceilings import Ceilings, measure_ceilings
from evals.throughput.problem import Case, Contestant, Cost, Problem, bound_from, relative_error
from evals.throughput.report import update_readme, write_report

CPU = torch.device("cpu")
TINY = {"H": 2, "P": 8, "N": 8}


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    monkeypatch.setattr(timing, "SAMPLE_SECONDS", 1e-4)
    monkeypatch.setattr(ops, "CHECKED_LENGTH", 16)
    monkeypatch.setattr(layers, "CHECKED_LENGTH", 16)
    monkeypatch.setattr(runner, "measure_ceilings", lambda *_: Ceilings(1e10, {"float32": 1e11}))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def measure(cases, folder, **kwargs):
    said = []
    results = Results(folder, "throughput")
    left = runner.run(cases, results, CPU, say=said.append, **kwargs)
    return read(folder), said, left


def of_metric(rows, metric):
    return [row for row in rows if row["metric"] == metric]


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize(
    ("op", "sizes"),
    [
        ("linear_attention", TINY),
        ("feature_attention_hedgehog", {"H": 2, "P": 8, "D": 8}),
        ("feature_attention_taylor", {"H": 2, "P": 8, "D": 4}),
        ("short_conv", {"C": 8, "W": 4}),
        ("attention", {"H": 2, "P": 8}),
        ("mamba3", TINY),
        ("vandermonde", {"H": 3, "N": 8}),
        ("linear_recurrence", {"C": 3}),
        ("linear_recurrence", {"C": 3, "V": 1}),
    ],
)
def test_op_cases_agree_with_float64_before_they_are_timed(tmp_path, op, sizes, mode):
    case = Case("op", op, mode, "float32", 1, 33, sizes)
    rows, _, _ = measure([case], tmp_path)
    assert not of_metric(rows, "failed"), of_metric(rows, "failed")
    errors = of_metric(rows, "error")
    assert errors
    assert all(row["value"] <= row["config"]["bound"] < 1e-3 for row in errors)
    latencies = of_metric(rows, "latency")
    assert {row["rival"] for row in latencies} >= {None}
    assert all(row["value"] > 0 and row["config"]["samples"] >= 6 for row in latencies)
    assert all(row["value"] > 0 for row in of_metric(rows, "floor"))
    for row in of_metric(rows, "ratio"):
        assert row["rival"]
    assert set(case.config) <= set(latencies[0]["config"])


@pytest.mark.parametrize("mode", ["forward", "forward+backward", "prefill", "decode"])
@pytest.mark.parametrize("kind", ["layer", "model"])
def test_layer_and_model_cases(tmp_path, kind, mode):
    sizes = {"d_model": 64} if kind == "layer" else {"d_model": 64, "layers": 1, "vocab_size": 11}
    rows, _, _ = measure([Case(kind, "mamba2", mode, "float32", 2, 20, sizes)], tmp_path)
    assert not of_metric(rows, "failed"), of_metric(rows, "failed")
    own = [row for row in of_metric(rows, "latency") if row["rival"] is None]
    assert {row["backend"] for row in own} == {"auto", "torch"}
    (state,) = of_metric(rows, "state_bytes")
    assert state["value"] > 0
    assert any("sdpa" in row["rival"] for row in of_metric(rows, "ratio"))


@pytest.mark.parametrize("mode", ["forward", "forward+backward", "decode"])
def test_s4d_beside_its_plain_form(tmp_path, mode):
    rows, _, _ = measure([Case("layer", "s4d", mode, "float32", 2, 20, {"d_model": 16})], tmp_path)
    assert not of_metric(rows, "failed"), of_metric(rows, "failed")
    beside = [row for row in of_metric(rows, "ratio") if row["rival"] == "S4D in plain PyTorch"]
    assert len(beside) == (mode != "decode")


def test_plain_s4d_is_the_same_function():
    from evals.throughput.state_space import PlainS4D
    from seqmodels.mixers import S4D

    layer, x = S4D(6, d_state=8, dtype=torch.float64), torch.randn(2, 11, 6, dtype=torch.float64)
    torch.testing.assert_close(PlainS4D(layer)(x), layer(x).y, rtol=1e-10, atol=1e-10)


def test_wrong_contestant_is_named_and_not_timed(tmp_path, monkeypatch):
    def wrong(device):
        yield "wrong conv", lambda: lambda tensors: 1.01 * rivals._conv1d(tensors), {}
        yield "broken conv", lambda: rivals.require("no_such_package", "no-such-package"), {}

    monkeypatch.setitem(ops.OPS, "short_conv", ops.OPS["short_conv"].__class__(
        **{**vars(ops.OPS["short_conv"]), "rivals": wrong}
    ))  # fmt: skip
    rows, said, _ = measure([Case("op", "short_conv", "forward", "float32", 1, 32, {"C": 4, "W": 4})], tmp_path)
    (failed,) = of_metric(rows, "failed")
    assert failed["rival"] == "wrong conv"
    assert failed["value"] == pytest.approx(0.01, rel=1e-3)
    assert any("wrong conv" in line and "not timed" in line for line in said)
    (skipped,) = [row for row in of_metric(rows, "skipped") if row["rival"] == "broken conv"]
    assert "not installed (pip install no-such-package)" in skipped["config"]["reason"]
    assert {row["rival"] for row in of_metric(rows, "latency")} == {None}


def test_one_case_out_of_memory_leaves_the_others(tmp_path, monkeypatch):
    cases = [Case("op", "short_conv", "forward", "float32", 1, length, {"C": 4, "W": 4}) for length in (8, 16)]
    build = ops.build

    def first_fails(case, device):
        if case.length == 8:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return build(case, device)

    monkeypatch.setitem(runner.BUILDERS, "op", first_fails)
    rows, _, _ = measure(cases, tmp_path)
    (failed,) = of_metric(rows, "failed")
    assert failed["case"] == cases[0].name
    assert failed["config"]["reason"] == "out of memory"
    assert failed["value"] is None
    assert {row["case"] for row in of_metric(rows, "latency")} == {cases[1].name}


def test_interrupted_run_keeps_its_rows_and_goes_on(tmp_path, monkeypatch):
    cases = [Case("op", "short_conv", "forward", "float32", 1, length, {"C": 4, "W": 4}) for length in (8, 16)]
    build = ops.build

    def interrupted(case, device):
        if case.length == 16:
            raise KeyboardInterrupt
        return build(case, device)

    monkeypatch.setitem(runner.BUILDERS, "op", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure(cases, tmp_path)
    assert {row["case"] for row in of_metric(read(tmp_path), "latency")} == {cases[0].name}
    monkeypatch.setitem(runner.BUILDERS, "op", build)
    rows, said, _ = measure(cases, tmp_path)
    assert "1 cases are already measured" in said[0]
    assert [row["case"] for row in of_metric(rows, "floor")] == [case.name for case in cases]


def test_deadline_leaves_the_rest(tmp_path):
    cases = [Case("op", "short_conv", "forward", "float32", 1, length, {"C": 4, "W": 4}) for length in (8, 16)]
    _, said, left = measure(cases, tmp_path, deadline=0.0)
    assert left == cases
    assert said[-1] == "deadline: 2 cases left out"


def test_interleaved_samples_see_the_slower_one():
    def sleeper(seconds):
        return lambda _: time.sleep(seconds) or sum(range(int(2e6 * seconds)))

    contestants = [Contestant("fast", sleeper(0.002), ours=True), Contestant("slow", sleeper(0.006))]
    timings = timing.time_all(contestants, [None, None], CPU)
    assert len(timings["fast"].process) == 2 * timing.ROUNDS
    assert timings["slow"].median > timings["fast"].median
    assert timings["fast"].clock == timings["slow"].clock


def test_busy_machine_refuses_wall_times(monkeypatch):
    monkeypatch.setattr(timing.QuietMeter, "others", lambda self: 0.5)
    contestant = Contestant("own", lambda _: None, ours=True)
    assert timing.time_all([contestant], [None], CPU)["own"].clock == "process"
    torch.set_num_threads(2)
    with pytest.raises(timing.Busy, match="--threads 1"):
        timing.time_all([contestant], [None], CPU)


def test_slopes_and_positions(tmp_path):
    results = Results(tmp_path, "throughput")
    for length in (1024, 2048, 8192, 32768):
        config = Case("layer", "mamba2", "forward", "float32", 1, length, {"d_model": 8}).config
        results.write(f"L{length}", "latency", 3e-3 * length, "ms", layer="mamba2", backend="auto", config=config)
        results.write(f"L{length}", "latency", 1e-6 * length**2, "ms", layer="mamba2", config=config, rival="sdpa")
        config = Case("layer", "mamba2", "decode", "float32", 1, length, {"d_model": 8}).config
        results.write(f"D{length}", "latency", 2.0, "ms", layer="mamba2", backend="auto", config=config)
    said = []
    derived.write(results, said.append)
    slopes = {row["rival"]: row for row in of_metric(read(tmp_path), "slope")}
    assert slopes[None]["value"] == pytest.approx(1.0)
    assert slopes[None]["config"]["lengths"] == [1024, 2048, 8192, 32768]
    assert slopes["sdpa"]["value"] == pytest.approx(2.0)
    assert len(said) == 1
    assert "within 0.9 to 1.1" in said[0]
    (position,) = of_metric(read(tmp_path), "position_ratio")
    assert position["value"] == 1.0


def test_floor_is_the_larger_of_bytes_and_operations():
    ceilings = Ceilings(copy=100.0, matmul={"float32": 10.0})
    assert ceilings.floor(Cost(50, 200, 1), "float32") == 5.0
    assert ceilings.binding(Cost(50, 200, 1), "float32") == "compute"
    assert ceilings.floor(Cost(10, 200, 1), "float32") == 2.0
    assert ceilings.binding(Cost(10, 200, 1), "float32") == "memory"


@pytest.mark.slow
def test_ceilings_are_plausible():
    found = measure_ceilings(CPU, ("float32",))
    assert 1e8 < found.copy < 1e13
    assert 1e8 < found.matmul["float32"] < 1e15


def test_relative_error_notices_what_is_not_a_number():
    ones = torch.ones(3)
    assert relative_error([ones], [ones]) == 0
    assert math.isinf(relative_error([torch.full((3,), float("nan"))], [ones]))
    assert math.isinf(relative_error([torch.ones(2)], [ones]))
    assert bound_from(0.0) < 1e-5


def test_bound_grows_with_the_roundings_of_the_dtype():
    assert bound_from(0.001, dtype=torch.bfloat16) == pytest.approx(0.004 + 4 * 2**-7, rel=1e-2)
    assert bound_from(0.001, 0.2) == bound_from(0.001), "a wrong plain form widens nothing"


def test_kernels_are_compiled_once_a_series(monkeypatch):
    cases = [Case("op", "short_conv", "forward", "float32", 1, length, {"C": 4, "W": 4}) for length in (16, 8, 32)]
    cases.append(Case("op", "short_conv", "forward", "float32", 2, 64, {"C": 4, "W": 4}))
    assert [(case.batch, case.length) for case in compilation.one_of_each(cases)] == [(1, 8), (2, 64)]
    ran, build = [], ops.build

    def counting(case, device):
        problem = build(case, device)
        for contestant in problem.contestants:
            contestant.run = lambda tensors, name=contestant.name: ran.append(name) or 1 / 0
        problem.check = lambda contestant: (0.0, 0.0)
        return problem

    monkeypatch.setitem(runner.BUILDERS, "op", counting)
    compilation.run_once(cases[0], CPU)
    assert set(ran) >= {"torch", "torch conv1d"}, "one that fails leaves the others"


def test_suites_name_every_case_once_and_cover_the_registry():
    for suite in suites.SUITES:
        names = [case.name for case in suites.cases(suite)]
        assert len(names) == len(set(names)) > 20
    assert {"mamba2", "mamba3", "linear_attention", "gated_conv"} <= set(suites.recurrent_layers())
    assert "attention" not in suites.recurrent_layers()
    priorities = [case.priority for case in suites.cases("gpu")]
    assert priorities == sorted(priorities)
    with pytest.raises(ValueError, match="unknown suite 'tpu'"):
        suites.cases("tpu")


def test_unknown_case_names_get_the_nearest(capsys):
    available = suites.cases("cpu")
    with pytest.raises(ValueError, match=r"'mamba33'; did you mean mamba3"):
        suites.select(available, ["mamba33"])
    assert {case.layer for case in suites.select(available, ["mamba3"])} == {"mamba3"}
    assert {case.mode for case in suites.select(available, ["*decode*"])} == {"decode"}
    assert main(["--suite", "cpu", "--cases", "mamba33", "--out", "unused"]) == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing without a GPU")
def test_gpu_suite_without_a_gpu_says_what_can_be_run(tmp_path, capsys):
    assert main(["--suite", "gpu", "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert "no GPU is visible" in message
    assert "seqmodels audit" in message


def test_report_is_made_from_rows(tmp_path):
    pytest.importorskip("matplotlib")
    cases = [Case("layer", "gated_conv", "forward", "float32", 1, length, {"d_model": 16}) for length in (2048, 4096)]
    cases += [Case("layer", "gated_conv", "decode", "float32", batch, 32, {"d_model": 16}) for batch in (1, 2)]
    cases.append(Case("op", "short_conv", "forward", "float32", 1, 32, {"C": 4, "W": 4}))
    measure(cases, tmp_path)
    derived.write(Results(tmp_path, "throughput"), lambda text: None)
    Results(tmp_path, "throughput", "another machine").write(
        "a", "failed", None, "", config={"reason": "out of memory"}
    )
    page = write_report(tmp_path, [tmp_path]).read_text()
    assert "gated_conv/forward/float32/B1/d_model16/L2048" in page
    assert "## another machine" in page
    assert "out of memory" in page
    assert "Cost over length" in page
    figures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert len(figures) == 4
    assert all(name in page for name in figures)
    readme = tmp_path / "front.md"
    readme.write_text("Before.\n<!-- throughput -->\nold\n<!-- /throughput -->\nAfter.\n")
    assert main(["--report", str(tmp_path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("Before.\n<!-- throughput -->\n")
    assert text.endswith("<!-- /throughput -->\nAfter.\n")
    assert "short_conv/forward" in text
    assert "torch conv1d" in text
    assert "old" not in text
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="has no place for the headline"):
        update_readme(readme, [tmp_path])
    with pytest.raises(FileNotFoundError, match="no throughput rows"):
        write_report(tmp_path / "empty", [tmp_path / "empty"])


def test_problem_without_a_correct_backend_is_refused(tmp_path, monkeypatch):
    problem = Problem(
        lambda seed: {}, [Contestant("torch", lambda _: None, ours=True)], lambda _: (1.0, 0.1), Cost(1, 1, 1)
    )
    monkeypatch.setitem(runner.BUILDERS, "op", lambda case, device: problem)
    rows, _, _ = measure([Case("op", "short_conv", "forward", "float32", 1, 8, {"C": 4, "W": 4})], tmp_path)
    assert not of_metric(rows, "latency")
    assert "no backend of this library passed" in of_metric(rows, "failed")[-1]["config"]["reason"]
