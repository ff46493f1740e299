"""The GPU-marked tests, in separate processes: a new process runs the rest when a test broke the CUDA context.

They also run under the tools of NVIDIA's compute-sanitizer, and with the checks that Triton compiles into kernels: its
ConSan looks for hazards between asynchronous copies, barriers and matrix instructions, its GSan for races in global
memory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
FILE = "tests/gpu/test_gpu.py"
OK, FAILED, INTERRUPTED, NONE_LEFT = 0, 1, 2, 5  # exit codes of pytest
FOUND = 99  # that of the sanitizer, if it finds an error and pytest none
SANITIZER = "compute-sanitizer"
# Accesses outside of an allocation; races in shared memory; reads of memory that was never written; barriers that not
# all threads come to.
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# The modes of TRITON_INSTRUMENTATION_MODE, and the module of Triton without which the mode does nothing.
INSTRUMENTATION = {"consan": "triton", "gsan": "triton.tools.gsan"}


class Way(NamedTuple):
    """A way to run pytest: a command that takes Python's, the arguments of Python, and environment variables."""

    under: Sequence[str] = ()
    python: Sequence[str] = ("-m", "pytest")
    environment: Mapping[str, str] = {}


PLAIN = Way()


def sanitized(tool: str) -> Way:
    """Under a tool of compute-sanitizer. Torch caches no memory then, or a stray access would end in its cache."""
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "all", "--require-cuda-init", "no"]
    return Way([SANITIZER, *options], environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def instrumented(mode: str, dry: bool) -> Way:
    """With kernels that Triton compiles in a mode. GSan has a program that runs scripts on memory that it watches."""
    import pytest

    environment = {"TRITON_INSTRUMENTATION_MODE": mode}
    if mode == "consan" or dry:
        return PLAIN._replace(environment=environment)
    script = str(Path(pytest.__file__).parent / "__main__.py")
    return Way(python=("-m", INSTRUMENTATION[mode], script), environment=environment)


def run_tests(chosen: Sequence[str], seconds: float, way: Way = PLAIN) -> dict[str, Any]:
    """The count of tests that passed, and the failures: names and the first line of each reason.

    chosen: names of tests, none for all. "unfinished": why some did not run, or why the sanitizer is not content, or
    None.
    """
    deadline = time.monotonic() + seconds
    verdicts: dict[str, str | None] = {}
    unfinished = None
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        while unfinished is None:
            before = len(verdicts)
            code, output = _pytest(chosen, list(verdicts), report, deadline - time.monotonic(), way)
            if report.exists():
                verdicts |= _verdicts(report)
                report.unlink()
            if code in (OK, FAILED) or (code == NONE_LEFT and verdicts):
                break
            if code != INTERRUPTED or len(verdicts) == before:
                unfinished = f"pytest ended with {code}: {' '.join(output.split())[-300:]}"
    failed = [{"test": name, "error": reason} for name, reason in verdicts.items() if reason is not None]
    return {"passed": len(verdicts) - len(failed), "failed": failed, "unfinished": unfinished}


def _pytest(
    chosen: Sequence[str], done: Sequence[str], report: Path, seconds: float, way: Way
) -> tuple[int | str, str]:
    command = [*way.under, sys.executable, *way.python, "-m", "gpu", "-v", "--tb=short", f"--junitxml={report}"]
    command += [f"{FILE}::{name}" for name in chosen] or [FILE]
    command += [f"--deselect={FILE}::{name}" for name in done]
    # Unbuffered, the last line names the test that was under way if time ran out.
    environment = {**os.environ, "ARCMERGE_GPU": "1", "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1", **way.environment}
    try:
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=max(seconds, 1), capture_output=True, text=True, check=False
        )
    except subprocess.TimeoutExpired as late:
        return f"no verdict in {seconds:.0f} s", (late.stdout or b"").decode()
    return ended.returncode, ended.stdout + ended.stderr


def _verdicts(report: Path) -> dict[str, str | None]:
    """The reason for which each test failed, or None. A skipped test has failed, because all must run here."""
    verdicts = {}
    for test in ElementTree.parse(report).iter("testcase"):
        problem = next((each for kind in ("failure", "error", "skipped") for each in test.iter(kind)), None)
        reason = None if problem is None else " ".join((problem.get("message") or problem.tag).split())[:300]
        verdicts[str(test.get("name"))] = reason
    return verdicts
