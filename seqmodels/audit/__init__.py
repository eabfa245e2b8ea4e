"""Compiles every GPU kernel without a GPU and reports what it uses.

``seqmodels audit`` on the command line, :func:`run` from Python. The kernels are those that ops
declare (:mod:`seqmodels.ops.kernels`) and the files in ``csrc/cuda``.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from seqmodels.audit.report import Audit

__all__ = ["Audit", "run"]


def run(
    *,
    quick: bool = False,
    targets: Sequence[str] | None = None,
    kernels: str | None = None,
    modules: list[str] | None = None,
    workers: int | None = None,
    use_cache: bool = True,
    baseline_path: Path | None = None,
    update_baseline: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Audit:
    """Compiles the declared kernels and judges them; see ``seqmodels audit --help`` for the choices.

    Raises:
        RuntimeError: Triton is missing, or this process interprets kernels on the CPU.
        ValueError: a target or kernel that does not exist.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET=1 turns kernels into Python functions, which cannot be compiled; unset it")
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("the audit needs Triton: pip install 'triton>=3.6' (Linux)")
    import triton

    from seqmodels.audit import baseline, compilation, cuda_sources, discovery

    known = (compilation.MAIN_TARGET, *compilation.OTHER_TARGETS)
    targets = list(known if targets is None else targets)
    for target in targets:
        if target not in known:
            raise ValueError(f"unknown target {target!r}; expected one of {', '.join(known)}")
    found = discovery.discover(modules)
    chosen = {name: spec for name, spec in found.kernels.items() if kernels is None or kernels in name}
    if kernels is not None and not chosen:
        names = ", ".join(sorted(found.kernels)) or "none"
        raise ValueError(f"no kernel has {kernels!r} in its name; there are {names}")
    jobs = list(compilation.plan(chosen, targets, quick=quick))
    rows = compilation.compile_all(jobs, modules=modules, workers=workers, use_cache=use_cache, progress=progress)
    audit = Audit(rows, list(found.problems), versions={"triton": triton.__version__})
    if modules is None and kernels is None and not quick:
        more, note = cuda_sources.audit_sources(targets, workers)
        audit.rows.extend(more)
        audit.notes.extend([note] if note else [])
    path = baseline.PATH if baseline_path is None else baseline_path
    version, recorded = baseline.load(path)
    if update_baseline:
        partial = quick or kernels is not None or len(targets) < len(known)
        baseline.save(audit.rows, triton.__version__, path, keep=recorded if partial else None)
        audit.notes.append(f"wrote {path}")
    elif version and version != triton.__version__:
        audit.notes.append(f"the baseline is of Triton {version}, this is {triton.__version__}: not compared")
    elif modules is None or baseline_path is not None:
        worse = baseline.regressions(audit.rows, recorded)
        audit.problems.extend(f"{line}; if it is meant, run `seqmodels audit --update-baseline`" for line in worse)
        new, _ = baseline.changes(audit.rows, recorded)
        if new:
            audit.notes.append(
                f"{len(new)} rows are not in the baseline; `seqmodels audit --update-baseline` adds them"
            )
    return audit
