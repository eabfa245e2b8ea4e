"""Runs cases one after the other and writes their rows; no case takes the others down with it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from evals.results import Results
from evals.throughput import layers, models, ops
from evals.throughput.ceilings import Ceilings, measure_ceilings
from evals.throughput.problem import Case, Contestant, Problem, tensors_of
from evals.throughput.timing import Busy, Timing, peak_memory, time_all

BUILDERS = {"op": ops.build, "layer": layers.build, "model": models.build}
ROTATED_BYTES = 200 << 20  # inputs in rotation on a GPU: beyond its L2 cache


def run(
    cases: Sequence[Case],
    results: Results,
    device: torch.device,
    *,
    deadline: float | None = None,
    say: Callable[[str], None] = print,
) -> list[Case]:
    """Measures what fits before ``deadline`` (seconds from now); returns the cases that were left out."""
    start = time.monotonic()
    done = results.finished("latency")
    waiting = [case for case in cases if case.name not in done]
    if len(waiting) < len(cases):
        say(f"{len(cases) - len(waiting)} cases are already measured at this commit; they are kept")
    if not waiting:
        return []
    ceilings = _ceilings(waiting, results, device, say)
    longest = 0.0
    for index, case in enumerate(waiting):
        began = time.monotonic()
        if deadline is not None and began - start + longest > deadline:
            say(f"deadline: {len(waiting) - index} cases left out")
            return waiting[index:]
        _run_one(case, results, device, ceilings, lambda text, index=index: say(f"[{index + 1}/{len(waiting)}] {text}"))
        longest = max(0.5 * longest, time.monotonic() - began)  # recent cases foretell the next one's time
    return []


def _ceilings(cases: Sequence[Case], results: Results, device: torch.device, say: Callable[[str], None]) -> Ceilings:
    ceilings = measure_ceilings(device, tuple(sorted({case.dtype for case in cases})))
    threads = {"threads": torch.get_num_threads()} if device.type == "cpu" else {}
    results.write("ceiling/copy", "ceiling", ceilings.copy / 1e9, "GB/s", config=threads)
    for dtype, rate in ceilings.matmul.items():
        results.write(f"ceiling/matmul/{dtype}", "ceiling", rate / 1e9, "GFLOP/s", config=threads)
    say(
        f"ceilings: copy {ceilings.copy / 1e9:.0f} GB/s, "
        + ", ".join(f"{name} product {rate / 1e12:.2f} TFLOP/s" for name, rate in ceilings.matmul.items())
    )
    return ceilings


def _run_one(
    case: Case, results: Results, device: torch.device, ceilings: Ceilings, say: Callable[[str], None]
) -> None:
    failure = None
    try:
        _measure(case, results, device, ceilings, say)
    except torch.cuda.OutOfMemoryError:
        failure = "out of memory"
    except (MemoryError, Busy) as error:
        failure = str(error) or "out of memory"
    except Exception as error:  # recorded by name; the other cases go on
        failure = f"{type(error).__name__}: {error}"
    if failure is not None:
        results.write(case.name, "failed", None, "", layer=case.layer, config={**case.config, "reason": failure})
        say(f"{case.name}: not measured: {failure.splitlines()[0]}")
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _measure(
    case: Case, results: Results, device: torch.device, ceilings: Ceilings, say: Callable[[str], None]
) -> None:
    problem = BUILDERS[case.kind](case, device)

    def write(metric: str, value: float | None, unit: str, backend: str, rival: str | None, **facts: Any) -> None:
        config = {**case.config, "device": device.type, "threads": torch.get_num_threads(), **facts}
        who = {"layer": case.layer, "backend": backend, "rival": rival}
        results.write(case.name, metric, value, unit, seed=0, config=config, **who)

    for name, reason in problem.skipped.items():
        write("skipped", None, "", "", name, reason=reason)
    correct = _checked(problem, write, say)
    if not any(contestant.ours for contestant in correct):
        raise RuntimeError("no backend of this library passed the check against float64; nothing was timed")
    sets = _input_sets(problem, device)
    timings, correct = _timed(correct, sets, device, write)
    floor = ceilings.floor(problem.cost, case.dtype)
    binding = ceilings.binding(problem.cost, case.dtype)
    write("floor", 1e3 * floor, "ms", "", None, binds=binding, flops=problem.cost.flops, bytes=problem.cost.bytes)
    if problem.state_bytes is not None:
        write("state_bytes", problem.state_bytes, "bytes", "", None)
    for contestant in correct:
        timing = timings[contestant.name]
        who = (contestant.name, None) if contestant.ours else ("", contestant.name)
        facts = {**timing.describe(), **({"omits": contestant.omits} if contestant.omits else {})}
        write("latency", 1e3 * timing.median, "ms", *who, **facts)
        write("tokens_per_second", problem.cost.tokens / timing.median, "tokens/s", *who)
        if contestant.same_function:
            write("share_of_limit", floor / timing.median, "", *who, binds=binding)
        peak = peak_memory(lambda contestant=contestant: contestant.run(sets[0]), device)
        if peak is not None:
            write("peak_memory", peak, "bytes", *who)
    best = next(contestant for contestant in correct if contestant.ours)
    for contestant in correct:
        if contestant is not best:
            times = timings[contestant.name].median / timings[best.name].median
            other = f"seqmodels {contestant.name}" if contestant.ours else contestant.name
            write("ratio", times, "x", best.name, other)  # how many times longer the other one takes
    milliseconds = ", ".join(f"{name} {1e3 * timing.median:.3g} ms" for name, timing in timings.items())
    say(f"{case.name}: {milliseconds}; floor {1e3 * floor:.3g} ms ({binding})")


def _checked(problem: Problem, write: Callable[..., None], say: Callable[[str], None]) -> list[Contestant]:
    """Contestants that agree with float64; the others get a row and are not timed."""
    correct = []
    for contestant in problem.contestants:
        if not contestant.same_function:
            correct.append(contestant)
            continue
        error, bound = problem.check(contestant)
        who = (contestant.name, None) if contestant.ours else ("", contestant.name)
        write("error", error, "relative", *who, bound=bound)
        if error <= bound:
            correct.append(contestant)
            continue
        reason = f"relative error {error:.2e} against float64 is above {bound:.2e}: not timed"
        write("failed", error, "relative", *who, reason=reason)
        say(f"{contestant.name}: {reason}")
    return correct


def _timed(
    contestants: list[Contestant], sets: list[Any], device: torch.device, write: Callable[..., None]
) -> tuple[dict[str, Timing], list[Contestant]]:
    """Times all; one that fails at full size is recorded and the rest timed without it."""
    able = []
    for contestant in contestants:
        try:
            contestant.run(sets[0])
        except Exception as error:  # out of memory, a shape it refuses: this contestant's own limit
            who = (contestant.name, None) if contestant.ours else ("", contestant.name)
            write("skipped", None, "", *who, reason=f"{type(error).__name__}: {error}")
            continue
        able.append(contestant)
    if not any(contestant.ours for contestant in able):
        raise RuntimeError("no backend of this library runs at this size; nothing was timed")
    return time_all(able, sets, device), able


def _input_sets(problem: Problem, device: torch.device) -> list[Any]:
    """Two sets on a CPU; on a GPU as many as exceed its L2 cache, at least 4 and at most 64."""
    first = problem.inputs(0)
    if device.type != "cuda":
        return [first, problem.inputs(1)]
    tensors = list(first.values()) if isinstance(first, dict) else tensors_of(first)
    size = max(1, sum(tensor.numel() * tensor.element_size() for tensor in tensors))
    free, _ = torch.cuda.mem_get_info()
    count = max(4, min(64, -(-ROTATED_BYTES // size)))
    count = max(1, min(count, int(0.25 * free / size)))
    return [first, *(problem.inputs(seed) for seed in range(1, count))]
