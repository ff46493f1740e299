"""The run on a GPU: its parts in order of importance, and their results."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks._bench import RESULTS
from benchmarks.gpu import jobs
from benchmarks.gpu.device import DRY
from benchmarks.gpu.kernel_tests import PLAIN, SANITIZER, SANITIZER_TOOLS, Way, instrumented, run_tests, sanitized
from benchmarks.gpu.worker import JobError, Worker

from arcmerge.ops.attention_packages import PACKAGES
from cases import Case

# The part of the time at which a section must give way to the next. Tests and kernels compile, which takes longest.
UNTIL = {
    "environment": 0.08,
    "tests": 0.36,
    "roofs": 0.44,
    "kernels": 0.64,
    "merge": 0.68,
    "prefill": 0.76,
    "decode": 0.8,
    "sanitizer": 1.0,
}
LONGEST_JOB_SECONDS = 90.0
TESTS_OF_OPS = ("test_ops_agree_with_their_references", "test_replayed_steps_give_the_tokens_of_plain_calls")

Record = dict[str, Any]


@dataclass
class Report:
    """The report, as the JSON that __main__.py describes."""

    environment: Record = field(default_factory=dict)
    tests: Record = field(default_factory=dict)
    roofs: dict[str, float] = field(default_factory=dict)
    predicted_for: str | None = None
    measurements: list[Record] = field(default_factory=list)
    launches_per_layer: float | None = None
    sanitizer: dict[str, Record] = field(default_factory=dict)
    not_installed: list[str] = field(default_factory=list)
    failures: list[Record] = field(default_factory=list)
    not_reached: list[Record] = field(default_factory=list)
    seconds: float = 0.0

    def as_json(self) -> Record:
        return asdict(self)


class Run:
    """Runs jobs for a report, as long as there is time."""

    def __init__(self, seconds: float, worker: Worker) -> None:
        self.report = Report()
        self._started = time.monotonic()
        self._seconds = seconds
        self._worker = worker

    def left(self, section: str) -> float:
        """Seconds until a section must end."""
        return self._started + UNTIL[section] * self._seconds - time.monotonic()

    def job(self, section: str, op: str, case: str, job: Callable[..., Any], *arguments: object) -> Any:
        """The result of a job; None if it failed or was not started."""
        place = {"section": section, "op": op, "case": case}
        if (left := self.left(section)) <= 0:
            self.report.not_reached.append(place)
            return None
        try:
            return self._worker.run(job, *arguments, seconds=min(left, LONGEST_JOB_SECONDS))
        except JobError as error:
            self.report.failures.append({**place, "error": str(error)})
            return None

    def tests(self, cases: Sequence[Case], way: Way = PLAIN) -> None:
        chosen = [*TESTS_OF_OPS, *(f"test_kernel[{case}]" for case in cases)] if DRY else []
        self.report.tests = self._tests("tests", "", chosen, way)

    def sanitizer(self, cases: Sequence[Case]) -> None:
        """The tests of some kernels, one tool after the other. A test takes 10 to 100 times as long as without."""
        if shutil.which(SANITIZER) is None:
            self.report.not_installed.append(SANITIZER)
            return
        chosen = [f"test_kernel[{case}]" for case in cases]
        for tool in SANITIZER_TOOLS:
            if self.left("sanitizer") <= 0:
                self.report.not_reached.append({"section": "sanitizer", "op": tool, "case": ""})
            else:
                self.report.sanitizer[tool] = self._tests("sanitizer", tool, chosen, sanitized(tool))

    def _tests(self, section: str, op: str, chosen: Sequence[str], way: Way) -> Record:
        tests = run_tests(chosen, self.left(section), way)
        place = {"section": section, "op": op}
        for failed in tests["failed"]:
            self.report.failures.append({**place, "case": failed["test"], "error": failed["error"]})
        if tests["unfinished"] is not None:
            self.report.failures.append({**place, "case": "", "error": tests["unfinished"]})
        return tests

    def roofs(self) -> None:
        roofs = {"copy": jobs.roof_copy, "read": jobs.roof_read, "matmul": jobs.roof_matmul}
        found = {name: self.job("roofs", "torch", name, job) for name, job in roofs.items()}
        rates = {
            name: each["operations" if name == "matmul" else "bytes"] / each["seconds"]
            for name, each in found.items()
            if each is not None
        }
        bandwidths = [rates[name] for name in ("copy", "read") if name in rates]
        if bandwidths:
            self.report.roofs["bandwidth"] = max(bandwidths)
        if "matmul" in rates:
            self.report.roofs["matmul"] = rates["matmul"]
        for name, each in found.items():
            self._add("roofs", "torch", name, each)

    def kernels(self, cases: Sequence[Case]) -> None:
        packages = [] if DRY else jobs.installed(PACKAGES)
        self.report.not_installed += [package for package in PACKAGES if package not in jobs.installed(PACKAGES)]
        self.report.predicted_for, predictions = predicted(self.report.environment.get("device", ""))
        for case in cases:
            measured = self.job("kernels", case.op, case.name, jobs.kernel, case.op, case.name)
            self._add("kernels", case.op, case.name, measured, predictions.get((case.op, case.name)))
            for package in packages if case.op == "attention" else ():
                beside = f"{case.name}, by {package}"
                found = self.job("kernels", case.op, beside, jobs.by_package, package, case.name)
                self._add("kernels", case.op, beside, found)

    def journeys(self) -> None:
        for case, each in (self.job("merge", "slerp", "", jobs.merge) or {}).items():
            self._add("merge", "slerp", case, each)
        for tokens in jobs.PREFILLS:
            case = f"{tokens} tokens"
            self._add("prefill", "network", case, self.job("prefill", "network", case, jobs.prefill, tokens))
        for case, each in (self.job("decode", "network", "", jobs.decode) or {}).items():
            self._add("decode", "network", f"{case}, from {jobs.CONTEXT} tokens", each)
        self.report.launches_per_layer = self.job("decode", "network", "launches", jobs.launches)

    def _add(self, section: str, op: str, case: str, measured: Record | None, seconds: float | None = None) -> None:
        if measured is not None:
            place = {"section": section, "op": op, "case": case}
            self.report.measurements.append({**place, **rates(measured, self.report.roofs, seconds)})


def rates(measured: Record, roofs: Mapping[str, float], predicted_seconds: float | None = None) -> Record:
    """A measurement with the rates, and the shares of the roofs and of a prediction, that follow from it."""
    seconds = measured["seconds"]
    minimum = max(
        measured["bytes"] / roofs.get("bandwidth", float("inf")),
        measured["operations"] / roofs.get("matmul", float("inf")),
    )
    found = {
        **measured,
        "bytes_per_second": measured["bytes"] / seconds,
        "operations_per_second": measured["operations"] / seconds,
        "fraction": minimum / seconds,
    }
    if predicted_seconds is not None:
        found |= {"predicted_seconds": predicted_seconds, "measured_over_predicted": seconds / predicted_seconds}
    if "tokens" in measured:
        found["tokens_per_second"] = measured["tokens"] / seconds
    return found


def predicted(device: str) -> tuple[str | None, dict[tuple[str, str], float]]:
    """The machine of the proof that a device is, by its name, and the seconds predicted for it by op and case."""
    file = RESULTS / "proof.json"
    records = json.loads(file.read_text())["predicted"] if file.exists() else []
    machines = {name for record in records for name in record.get("machines", {})}
    machine = next((name for name in sorted(machines) if name.lower() in device.lower()), None)
    return machine, {
        (record["op"], record["case"]): record["machines"][machine]["seconds"]
        for record in records
        if machine in record.get("machines", {})
    }


def run(seconds: float, instrument: str | None = None) -> Report:
    """All parts, in at most about so many seconds; the tests alone if their kernels are instrumented."""
    started = time.monotonic()
    worker = Worker()
    whole, cases = Run(seconds, worker), jobs.measured_cases()
    try:
        found = whole.job("environment", "", "", jobs.environment) or {}
        whole.report.environment = {**found, "dry": DRY}
        if instrument is not None:
            whole.tests(cases, instrumented(instrument, DRY))
        else:
            whole.tests(cases)
            whole.roofs()
            whole.kernels(cases)
            whole.journeys()
            whole.sanitizer(jobs.smallest_cases())
    finally:
        worker.stop()
    whole.report.seconds = time.monotonic() - started
    return whole.report
