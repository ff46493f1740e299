"""The number of threads: from the processors, OMP_NUM_THREADS, the CPU quota, and set_num_threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import arcmerge
from arcmerge import _C
from arcmerge.merging.options import Options

NONE = 1024


def tree(root: Path, files: dict[str, str]) -> str:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content + "\n")
    return str(root)


V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw"
V1 = "33 24 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct"
GROUP, MOUNTS, FS = "proc/self/cgroup", "proc/self/mountinfo", "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, NONE),
        ({GROUP: "0::/", MOUNTS: V2, f"{FS}/cpu.max": "max 100000"}, NONE),
        ({GROUP: "0::/", MOUNTS: V2, f"{FS}/cpu.max": "150000 100000"}, 2),
        ({GROUP: "0::/", MOUNTS: V2, f"{FS}/cpu.max": "20000 100000"}, 1),
        ({GROUP: "0::/", MOUNTS: V2, f"{FS}/cpu.max": "text"}, NONE),
        # The quota of a parent group holds too.
        ({GROUP: "0::/a/b", MOUNTS: V2, f"{FS}/a/cpu.max": "300000 100000", f"{FS}/a/b/cpu.max": "max 100000"}, 3),
        # A container gets the path of its host, but sees its own group as the root.
        ({GROUP: "0::/host/c", MOUNTS: V2.replace(" / ", " /host/c "), f"{FS}/cpu.max": "400000 100000"}, 4),
        (
            {
                GROUP: "5:memory:/\n4:cpu,cpuacct:/box",
                MOUNTS: V1,
                f"{FS}/cpu,cpuacct/box/cpu.cfs_quota_us": "500000",
                f"{FS}/cpu,cpuacct/box/cpu.cfs_period_us": "100000",
            },
            5,
        ),
        (
            {
                GROUP: "4:cpu,cpuacct:/",
                MOUNTS: V1,
                f"{FS}/cpu,cpuacct/cpu.cfs_quota_us": "-1",
                f"{FS}/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            NONE,
        ),
    ],
)
def test_the_quota_of_a_control_group(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert _C.quota_threads(tree(tmp_path, files)) == expected


@pytest.mark.parametrize(("value", "one"), [("1", True), ("1,4", True), ("0", False), ("many", False), ("", False)])
def test_omp_num_threads_is_a_limit(value: str, one: bool) -> None:
    code = "import arcmerge; print(arcmerge.get_num_threads())"
    command = [sys.executable, "-c", code]

    def threads(**more: str) -> int:
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        return int(subprocess.run(command, env={**environment, **more}, capture_output=True, check=True).stdout)

    assert threads(OMP_NUM_THREADS=value) == (1 if one else threads())


def test_set_num_threads_applies_to_merges() -> None:
    before = arcmerge.get_num_threads()
    arcmerge.set_num_threads(before + 1)
    try:
        assert arcmerge.get_num_threads() == Options().thread_count == before + 1
        assert Options(threads=3).thread_count == 3
    finally:
        arcmerge.set_num_threads(before)
    with pytest.raises(ValueError, match="must be a whole number from 1 to 1024, got 0"):
        arcmerge.set_num_threads(0)
