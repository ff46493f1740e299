"""The protocol of all benchmarks: the order of the runs, the statistics, and the result files.

Providers run interleaved, in another order each round, so that a machine that slows down slows all of them. A figure is
a median with its 20th and 80th percentile. Rows are appended to results/<benchmark>.csv: one a timed run, with the
machine, the versions, the date and the commit, so that a table can always be traced to what was measured.
"""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import random
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from arcmerge import _C

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SAMPLING_SECONDS = 0.02

T = TypeVar("T")


@dataclass(frozen=True)
class Usage:
    """What a process took: wall and CPU seconds (with those of its children), and its own peak of anonymous memory; and
    what it printed."""

    seconds: float
    cpu_seconds: float
    peak_anonymous_mb: float
    output: str


def run_process(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Usage:
    """Run a command to its end. Its memory is sampled, so a peak of less than 20 ms may be missed.

    Anonymous memory counts what the process allocates (RssAnon and RssShmem), not the pages of files that it maps.
    Raises RuntimeError with the command's last words if it fails.
    """
    ended, peak = threading.Event(), 0.0
    started = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )

    def sample() -> None:
        nonlocal peak
        while not ended.wait(SAMPLING_SECONDS):
            peak = max(peak, anonymous_mb(process.pid))

    sampler = threading.Thread(target=sample)
    sampler.start()
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    ended.set()
    sampler.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {process.returncode}:\n{output[-2000:]}")
    return Usage(seconds, usage.ru_utime + usage.ru_stime, peak, output)


def anonymous_mb(pid: int) -> float:
    """Anonymous and shared memory of a process in MB (10^6 bytes); 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    sizes = (line.split() for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem")))
    return sum(int(kibibytes) * 1024 / 1e6 for _, kibibytes, _ in sizes)


def warm(files: Iterable[Path]) -> None:
    """Read files, so that they are in the page cache."""
    buffer = bytearray(1 << 22)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def interleaved(providers: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """(round, provider), every provider once a round, each round in an order of its own, the same in every run.

    Not merely rotated: what ran before leaves its mark. `cp` leaves free memory in large pieces, in which the next copy
    is written back in half the time.
    """
    for number in range(rounds):
        for provider in random.Random(number).sample(providers, len(providers)):
            yield number, provider


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, the 20th and the 80th percentile of repeated measurements."""
    low, middle, high = np.percentile(values, [20, 50, 80])
    return {"median": float(middle), "p20": float(low), "p80": float(high)}


def provenance(*packages: str) -> dict[str, str]:
    """The columns for machine, versions, date and commit of a row, with the best instruction set of the processor."""
    cpu = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory = next(int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal"))
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": _git("describe", "--always", "--dirty", "--abbrev=10") or "none",
        "machine": f"{cpu} ({_C.variant()}), {len(os.sched_getaffinity(0))} cores, {memory / 2**20:.0f} GiB",
        "versions": ", ".join([f"Linux {platform.release()}", f"Python {platform.python_version()}", *versions]),
    }


def append(benchmark: str, rows: Sequence[Mapping[str, object]]) -> Path:
    """Append rows to results/<benchmark>.csv; the first ones write the header."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{benchmark}.csv"
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
    return path


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
