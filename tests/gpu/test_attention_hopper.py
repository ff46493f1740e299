"""Attention for sm_90 by specialised warps: faults in its source and in its compiled code are found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import triton

from emulation.specialised import COMPILED, SOURCE
from paths import PYTHONPATH, ROOT

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the GPU"),
    pytest.mark.skipif(
        tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9), reason="the kernel needs Gluon as of Triton 3.9"
    ),
]


@pytest.fixture(scope="module")
def executed() -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": PYTHONPATH, "OMP_NUM_THREADS": "1"}
    environment.setdefault("TRITON_CACHE_DIR", str(ROOT / ".triton-cache"))
    worker = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "emulation.specialised"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert worker.returncode == 0, worker.stderr[-2000:]
    lines = [json.loads(line) for line in worker.stdout.splitlines() if line.startswith("{")]
    return {facts["name"]: facts for facts in lines}


def test_the_kernel_without_a_fault_is_right(executed: dict[str, dict[str, Any]]) -> None:
    facts = executed["right"]
    assert facts["kernel"] == "_attention_hopper_kernel"
    assert facts["error"] <= 1


def test_caches_that_no_tensor_map_can_start_at_have_the_other_kernel(executed: dict[str, dict[str, Any]]) -> None:
    facts = executed["misaligned"]
    assert facts["kernel"] == "_attention_kernel"
    assert facts["error"] <= 1


@pytest.mark.parametrize("name", [*COMPILED, *SOURCE])
def test_planted_faults_are_found(executed: dict[str, dict[str, Any]], name: str) -> None:
    facts = executed[name]
    assert "fault" in facts or facts["error"] > 1, facts
