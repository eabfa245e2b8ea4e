"""Triton kernels without a GPU: every ``tests/**/interpret_*.py`` in a process of its own with ``TRITON_INTERPRET=1``.

Triton reads that variable when a kernel is decorated, so it cannot be set inside this process.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("interpret_*.py"))


def run_interpreted(files: list[Path], report: Path, *options: str) -> tuple[dict[str, int], str]:
    """Counts by outcome, and a readable account of what failed. Errors of collection count as errors."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", f"--junitxml={report}", *options, *map(str, files)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=TESTS.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if not report.exists():
        return {"tests": 0, "failures": 0, "errors": 1, "skipped": 0}, done.stdout
    suites = xml.parse(report).getroot().iter("testsuite")
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        for key in counts:
            counts[key] += int(suite.get(key, 0))
    parts = []
    for case in xml.parse(report).getroot().iter("testcase"):
        for problem in (*case.findall("failure"), *case.findall("error")):
            parts.append(f"{case.get('classname')}::{case.get('name')}\n{problem.text or problem.get('message')}")
    if not parts and done.returncode not in (0, 5):
        parts.append(done.stdout)
    return counts, "\n\n".join(parts)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernels_under_the_interpreter(tmp_path, file):
    counts, failures = run_interpreted([file], tmp_path / "report.xml", "-m", "not slow and not gpu")
    if counts["failures"] or counts["errors"]:
        summary = f"{counts['failures']} failed, {counts['errors']} errors under the interpreter"
        pytest.fail(f"{summary}:\n\n{failures}", pytrace=False)
    written = len(re.findall(r"^def test_", file.read_text(), re.MULTILINE))
    assert counts["tests"] - counts["skipped"] >= written, f"{counts} from {written} test functions"


def test_there_are_kernel_tests():
    assert FILES, "no interpret_*.py below tests/"


def test_a_failing_kernel_test_is_reported(tmp_path):
    """The runner itself: one test that passes, one that fails, one file that does not import."""
    good, bad = tmp_path / "interpret_good.py", tmp_path / "interpret_bad.py"
    good.write_text(
        "import os\ndef test_right(): assert os.environ['TRITON_INTERPRET'] == '1'\ndef test_wrong(): assert 1 == 2\n"
    )
    counts, failures = run_interpreted([good], tmp_path / "one.xml", "-p", "no:cacheprovider")
    assert (counts["tests"], counts["failures"]) == (2, 1)
    assert "test_wrong" in failures
    assert "assert 1 == 2" in failures
    bad.write_text("import a_module_that_is_not_there\n")
    counts, failures = run_interpreted([bad], tmp_path / "two.xml", "-p", "no:cacheprovider")
    assert counts["errors"] == 1
    assert "a_module_that_is_not_there" in failures
