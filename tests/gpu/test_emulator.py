"""The emulator runs compiled kernels: those of the merge and some that use other features, correct and with faults."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from paths import PYTHONPATH

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")


@pytest.fixture(scope="module")
def executed() -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = PYTHONPATH
    worker = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "emulation.ptx.cases"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert worker.returncode == 0, worker.stderr[-2000:]
    lines = [json.loads(line) for line in worker.stdout.splitlines() if line.startswith("{")]
    return {facts["case"]: facts for facts in lines}


@pytest.mark.parametrize("target", TARGETS)
def test_compiled_kernels_compute(executed: dict[str, dict[str, Any]], target: str) -> None:
    mine = {name: facts for name, facts in executed.items() if name.endswith(target) and "unsupported" not in name}
    assert [facts for facts in mine.values() if "problem" in facts] == []
    exact = {name: facts for name, facts in mine.items() if name.startswith(("combine", "sum"))}
    assert len(exact) == 8
    assert [facts for facts in exact.values() if not facts["equal"] or not facts.get("nonfinite", True)] == []
    gram = [facts for name, facts in mine.items() if name.startswith("gram")]
    assert len(gram) == 6
    assert max(facts["error"] for facts in gram) <= 1e-9
    assert mine[f"softmax {target}"]["ratio"] <= 2
    # Sums of 112 products in float32; tf32 cuts each factor to 10 bits, by up to 2^-10 of it.
    limits = {"bfloat16": 112 * 2**-24, "float16": 112 * 2**-24, "float32": 2 * 2**-10}
    for name, facts in mine.items():
        if name.startswith("matmul"):
            assert facts["error"] <= limits[name.split()[1]], name
            assert facts["written"] == 72 * 96
            assert facts["mma_flops"] == 2 * 128 * 128 * 128
            assert facts["bank_conflicts"] == 0


def test_requests_are_as_wide_as_they_can_be(executed: dict[str, dict[str, Any]]) -> None:
    """16,393 elements are a segment of 16,384, moved 512 bytes a request, and one of 9, element by element."""
    for target in TARGETS:
        facts = executed[f"combine 16393 {target}"]
        assert facts["store_bytes"] == 2 * 16393
        assert facts["sectors_per_store"] > 15
        assert executed[f"combine misaligned {target}"]["sectors_per_store"] < 4


def test_a_part_of_the_grid_runs_alone(executed: dict[str, dict[str, Any]]) -> None:
    facts = executed["matmul, one block"]
    assert (facts["blocks"], facts["written"]) == (1, 8 * 64)
    assert 4 * facts["mma_flops"] == executed["matmul bfloat16 sm_80"]["mma_flops"]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("gap", r"out of bounds, 5 lanes: .*(1604|3652|5700|7748) of 'x_ptr'.*softmax_kernel.*block \(\d, 0, 0\)"),
        ("mask", "out of bounds, 1 lanes: 4 bytes at byte 8020 of 'x_ptr'"),
        ("misaligned", "misaligned: 16 bytes at byte 2 of 'x_ptr'"),
        ("one element of another tensor", "4 bytes at byte 796 of 'out_ptr', which has 796"),
        ("table, one element short", "byte 5998 of reachable tensor 1, which has 5998"),
        ("no waits", "a wait is missing"),
        ("first wait", "a wait is missing"),
        ("no barriers, softmax", "read before a barrier"),
        ("first barrier", "read before a barrier"),
        ("no barriers, matmul", "read before a barrier"),
        ("no wait for products", r"wgmma\.wait_group is missing"),
        ("no fence of products", r"without wgmma\.fence"),
        ("no fence of proxies", r"without fence\.proxy\.async"),
        ("count without an order", "global memory read that another warp has written"),
        ("count without a barrier", "global memory read that another warp has written"),
        ("no barriers, products", "read by a product before a barrier"),
    ],
)  # fmt: skip
def test_planted_faults_are_found(executed: dict[str, dict[str, Any]], case: str, message: str) -> None:
    problem = executed[f"fault: {case}"]["problem"]
    assert problem.startswith("Fault: ")
    assert re.search(message, problem), problem


def test_what_is_right_is_no_fault(executed: dict[str, dict[str, Any]]) -> None:
    for case in ("copy to the end", "table, none short", "softmax of strided rows"):
        assert "problem" not in executed[case], case
    assert executed["copy to the end"]["equal"]
    assert max(executed[f"decode, seed {seed}"]["error"] for seed in (1, 2)) <= 1


def test_what_is_not_emulated_is_named(executed: dict[str, dict[str, Any]]) -> None:
    assert "tcgen05" in executed["unsupported: tcgen05"]["problem"]
