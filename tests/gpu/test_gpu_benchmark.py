"""The benchmark of a GPU: all of it in dry mode, and its behaviour when a part fails."""

from __future__ import annotations

import json
import operator
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import attention_packages
from arcmerge.gemma2.runtime.decode_graph import DecodeGraph
from arcmerge.ops.attention_packages import PACKAGES
from cases import SMALL, Call, Case, Draw

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="make gpu runs on the GPU")


@pytest.fixture(scope="module")
def gpu_run() -> Iterator[ModuleType]:
    """The module of the run, in dry mode."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARCMERGE_DRY", "1")
        patch.setattr(sys, "path", [*sys.path, str(ROOT)])
        from benchmarks.gpu import run

        yield run


def test_a_dry_run_goes_through_all_parts(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(out)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr

    report = json.loads(out.read_text())
    measured = report["measurements"]
    assert list(dict.fromkeys(each["section"] for each in measured)) == [
        "roofs",
        "kernels",
        "merge",
        "prefill",
        "decode",
    ]
    assert {each["op"] for each in measured if each["section"] == "kernels"} == {case.op for case in SMALL}
    assert all(each["seconds"] > 0 and each["bytes_per_second"] > 0 for each in measured)
    # A kernel of each op, all ops in a network, the steps of a graph.
    assert report["tests"] == {"passed": len({case.op for case in SMALL}) + 2, "failed": [], "unfinished": None}
    assert report["roofs"]["bandwidth"] > 0
    assert report["roofs"]["matmul"] > 0
    assert report["environment"]["dry"]
    assert {"device", "driver", "cuda", "torch", "triton", "python", "commit"} <= set(report["environment"])
    assert (report["failures"], report["not_reached"]) == ([], [])
    wanted = {"compute-sanitizer": shutil.which("compute-sanitizer")}
    wanted |= {package: find_spec(package) for package in ("flash_attn", "flashinfer")}
    assert set(report["not_installed"]) == {name for name, found in wanted.items() if found is None}
    for each in measured:
        assert each["op"] in ended.stdout


def test_the_capture_of_a_graph_is_timed_apart_from_the_steps(
    gpu_run: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, seen, decode = [0.0], set(), DecodeGraph.__call__

    def step(self: DecodeGraph, *arguments: Any) -> Any:
        now[0] += 1.0 if self in seen else 100.0
        seen.add(self)
        return decode(self, *arguments)

    monkeypatch.setattr(DecodeGraph, "__call__", step)
    monkeypatch.setattr(gpu_run.jobs.time, "perf_counter", lambda: now[0])
    measured = gpu_run.jobs.decode()
    assert {case: each["seconds"] for case, each in measured.items()} == {
        "first step, which captures": 100.0,
        "step by step": 1.0,
        "without waiting": 1.0,
    }


def test_attention_by_another_package_is_timed_if_its_result_is_ours(
    gpu_run: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention_packages.install(monkeypatch)
    jobs = gpu_run.jobs
    name = "heads of 256"
    assert jobs.installed([*PACKAGES, "no_such_package"]) == ["flash_attn", "flashinfer"]
    measured = jobs.by_package("flashinfer", name)
    assert measured["seconds"] > 0
    assert (measured["bytes"], measured["operations"]) > (0, 0)

    monkeypatch.setattr(gpu_run, "DRY", False)
    run = gpu_run.Run(600.0, Here(gpu_run.JobError))
    monkeypatch.setattr(jobs, "measured_cases", lambda: SMALL)
    run.kernels([case for case in SMALL if (case.op, case.name) == ("attention", name)])
    assert [each["case"] for each in run.report.measurements] == [name, f"{name}, by flashinfer"]
    assert [(each["case"], each["error"]) for each in run.report.failures] == [
        (f"{name}, by flash_attn", "'key_cache' must have a multiple of 256 slots with flash_attn, got 65")
    ]

    plan = jobs.plan
    monkeypatch.setattr(jobs, "plan", lambda *given, **numbers: plan(*given, **{**numbers, "scale": 9.0}))
    with pytest.raises(ValueError, match=r"flashinfer and our kernel differ by .* of the maximum"):
        jobs.by_package("flashinfer", name)


class Here:
    """Replaces a worker: jobs run in this process."""

    def __init__(self, error: type[Exception]) -> None:
        self._error = error

    def run(self, job: Callable[..., Any], *arguments: object, seconds: float) -> Any:
        try:
            return job(*arguments)
        except Exception as error:
            raise self._error(str(error)) from error

    def stop(self) -> None:
        pass


def test_a_case_that_fails_is_reported_and_the_run_goes_on(
    gpu_run: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def launch() -> None:
        raise ValueError("the kernel does not compile")

    def build(draw: Draw) -> Call:
        return replace(SMALL[0].build(draw), launch=launch)

    monkeypatch.setattr(gpu_run.jobs, "SMALL", [Case("planted", "fails", build), SMALL[-1]])
    monkeypatch.setattr(gpu_run, "Worker", lambda: Here(gpu_run.JobError))
    monkeypatch.setattr(gpu_run, "run_tests", lambda *_: {"passed": 0, "failed": [], "unfinished": None})
    monkeypatch.setattr(gpu_run.Run, "journeys", lambda _: None)
    for name in ("ARCMERGE_DRY", "TRITON_INTERPRET", "ARCMERGE_BACKEND"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # main sets them; they are put back
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "--dry", "--out", str(out)])
    from benchmarks.gpu.__main__ import main

    assert main() == 1
    report = json.loads(out.read_text())
    assert report["failures"] == [
        {"section": "kernels", "op": "planted", "case": "fails", "error": "the kernel does not compile"}
    ]
    assert [each["op"] for each in report["measurements"] if each["section"] == "kernels"] == [SMALL[-1].op]
    assert "FAILED kernels planted fails: the kernel does not compile" in capsys.readouterr().out


def test_what_there_is_no_time_for_is_listed(gpu_run: ModuleType) -> None:
    run = gpu_run.Run(0.0, Here(gpu_run.JobError))
    run.kernels(SMALL[:2])
    assert run.report.not_reached == [{"section": "kernels", "op": case.op, "case": case.name} for case in SMALL[:2]]
    assert run.report.measurements == run.report.failures == []


def test_a_worker_survives_what_its_jobs_do(gpu_run: ModuleType) -> None:
    worker = gpu_run.Worker()
    try:
        assert worker.run(operator.add, 1, 2, seconds=60) == 3
        first = worker.run(os.getpid, seconds=60)
        assert worker.run(os.getpid, seconds=60) == first != os.getpid()
        with pytest.raises(gpu_run.JobError, match=r"^ZeroDivisionError: division by zero \(worker.py:\d+\)$"):
            worker.run(operator.truediv, 1, 0, seconds=60)
        assert worker.run(os.getpid, seconds=60) != first
        with pytest.raises(gpu_run.JobError, match="died with exit code 7"):
            worker.run(os._exit, 7, seconds=60)
        with pytest.raises(gpu_run.JobError, match="not done in 0 s"):
            worker.run(time.sleep, 60, seconds=0.1)
        assert worker.run(operator.add, 1, 2, seconds=60) == 3
    finally:
        worker.stop()


LOST = """
import pytest, time
pytestmark = pytest.mark.gpu
lost = []
@pytest.fixture(autouse=True)
def context():
    yield
    if lost:
        pytest.exit("the context of the GPU is lost")
def test_before(): pass
def test_that_loses_it():
    lost.append(1)
    assert False, "an illegal access"
def test_after(): pass
def test_wrong(): assert False, "a wrong result"
@pytest.mark.skip
def test_skipped(): pass
def test_endless(): time.sleep(60)
"""


def test_tests_go_on_when_one_takes_the_context(
    gpu_run: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from benchmarks.gpu import kernel_tests

    monkeypatch.setattr(kernel_tests, "ROOT", tmp_path)
    monkeypatch.setattr(kernel_tests, "FILE", "test_lost.py")
    (tmp_path / "test_lost.py").write_text(LOST)
    found = kernel_tests.run_tests(
        ["test_before", "test_that_loses_it", "test_after", "test_wrong", "test_skipped"], 120
    )
    assert (found["passed"], found["unfinished"]) == (2, None)
    assert [failed["test"] for failed in found["failed"]] == ["test_that_loses_it", "test_wrong", "test_skipped"]
    assert "an illegal access" in found["failed"][0]["error"]

    late = kernel_tests.run_tests(["test_before", "test_endless"], 6)
    assert late["passed"] == 0
    assert re.match("pytest ended with no verdict in 6 s: .*test_endless$", late["unfinished"])


STAND_IN = """#!/bin/sh
echo "$@" >> {log}
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING" >> {log}
while [ "$1" != "{python}" ]; do shift; done
"$@" || exit $?
if grep -q initcheck {log}; then echo "========= ERROR SUMMARY: 3 errors"; exit 99; fi
"""


def test_what_the_sanitizer_finds_is_a_failure(
    gpu_run: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from benchmarks.gpu import kernel_tests

    monkeypatch.setattr(kernel_tests, "ROOT", tmp_path)
    monkeypatch.setattr(kernel_tests, "FILE", "test_few.py")
    monkeypatch.setattr(gpu_run, "SANITIZER_TOOLS", ("memcheck", "initcheck"))
    case = SMALL[0]
    (tmp_path / "test_few.py").write_text(
        "import pytest\n@pytest.mark.gpu\n"
        f"@pytest.mark.parametrize('case', [{str(case)!r}])\ndef test_kernel(case): pass"
    )
    log, tool = tmp_path / "log", tmp_path / "compute-sanitizer"
    tool.write_text(STAND_IN.format(log=log, python=sys.executable))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run = gpu_run.Run(600.0, Here(gpu_run.JobError))
    run.sanitizer([case])
    found = run.report.sanitizer
    assert {name: (each["passed"], each["failed"]) for name, each in found.items()} == {
        "memcheck": (1, []),
        "initcheck": (1, []),
    }
    (failure,) = run.report.failures
    assert (failure["section"], failure["op"]) == ("sanitizer", "initcheck")
    assert failure["error"].startswith("pytest ended with 99: ")
    assert failure["error"].endswith("ERROR SUMMARY: 3 errors")
    assert "--tool memcheck --error-exitcode 99 --target-processes all" in log.read_text()
    assert log.read_text().splitlines()[1::2] == ["1", "1"]

    late = gpu_run.Run(0.0, Here(gpu_run.JobError))
    late.sanitizer([case])
    assert [each["op"] for each in late.report.not_reached] == ["memcheck", "initcheck"]


def test_instrumented_kernels_are_tested_and_not_timed(
    gpu_run: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from benchmarks.gpu import kernel_tests

    monkeypatch.setattr(kernel_tests, "ROOT", tmp_path)
    monkeypatch.setattr(kernel_tests, "FILE", "test_mode.py")
    monkeypatch.setattr(gpu_run, "Worker", lambda: Here(gpu_run.JobError))
    monkeypatch.setattr(gpu_run, "TESTS_OF_OPS", ("test_mode",))
    monkeypatch.setattr(gpu_run.jobs, "measured_cases", list)
    (tmp_path / "test_mode.py").write_text(
        "import os, pytest\n@pytest.mark.gpu\n"
        "def test_mode(): assert os.environ['TRITON_INSTRUMENTATION_MODE'] == 'consan'"
    )
    report = gpu_run.run(600.0, "consan")
    assert (report.tests["passed"], report.failures, report.measurements) == (1, [], [])
    # GSan's own program runs pytest, which runs the tests.
    way = kernel_tests.instrumented("gsan", dry=False)
    assert way.python[:2] == ("-m", "triton.tools.gsan")
    assert Path(way.python[2]).is_file()
    assert way.environment == {"TRITON_INSTRUMENTATION_MODE": "gsan"}


def test_predictions_are_those_for_the_machine_of_this_name(
    gpu_run: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machines = {"H100": {"seconds": 2e-6}, "RTX 4090": {"seconds": 5e-6}}
    proof = {"predicted": [{"op": "gram", "case": "a", "machines": machines}, {"op": "gram", "failed": "b"}]}
    (tmp_path / "proof.json").write_text(json.dumps(proof))
    monkeypatch.setattr(gpu_run, "RESULTS", tmp_path)
    assert gpu_run.predicted("NVIDIA H100 80GB HBM3") == ("H100", {("gram", "a"): 2e-6})
    assert gpu_run.predicted("NVIDIA GeForce RTX 4090") == ("RTX 4090", {("gram", "a"): 5e-6})
    assert gpu_run.predicted("NVIDIA H200") == (None, {})


def test_rates_follow_from_seconds(gpu_run: ModuleType) -> None:
    measured = {"seconds": 1e-3, "bytes": 10**9, "operations": 4 * 10**11, "tokens": 5}
    found = gpu_run.rates(measured, {"bandwidth": 2e12, "matmul": 5e14}, 5e-4)
    assert found["bytes_per_second"] == pytest.approx(1e12)
    assert found["operations_per_second"] == pytest.approx(4e14)
    assert found["fraction"] == pytest.approx(0.8)  # of the products, which take longer than the bytes
    assert found["measured_over_predicted"] == pytest.approx(2.0)
    assert found["tokens_per_second"] == pytest.approx(5000)
    assert "predicted_seconds" not in gpu_run.rates(measured, {})
