"""What a kernel that starts early may do before it waits for earlier ones, in PTX."""

from __future__ import annotations

import pytest

from emulation.early_accesses import early_accesses

HEAD = ".version 8.7\n.target sm_90a\n.address_size 64\n.visible .entry k(.param .u64 k_param_0)\n.reqntid 256\n{\n"
REGISTERS = ".reg .pred %p<3>;\n.reg .b32 %r<5>;\n.reg .b64 %rd<3>;\nld.param.b64 %rd1, [k_param_0];\n"
WAIT, LOAD, STORE = "griddepcontrol.wait;", "ld.global.b32 %r1, [%rd1];", "st.global.b32 [%rd1], %r1;"
BARRIER, BRANCH, END = "barrier.sync 1;", "@!%p1 bra $L1;", "ret;"


def found(*lines: str) -> list[str]:
    return early_accesses(HEAD + REGISTERS + "\n".join(lines) + "\n}\n")


def test_accesses_after_the_wait_and_prefetches_before_it_are_right() -> None:
    assert found("prefetch.global.L2 [%rd1];", WAIT, LOAD, STORE, END) == []


@pytest.mark.parametrize("early", [LOAD, STORE, END, "@%p1 ret;", "bra $L1;"])
def test_accesses_ends_and_branches_around_the_wait_are_named(early: str) -> None:
    assert len(found(early, WAIT, LOAD, "$L1:", STORE, END)) == 1


def test_warps_may_wait_at_a_barrier_for_those_that_have_waited() -> None:
    assert found(BRANCH, WAIT, BARRIER, END, "$L1:", BARRIER, LOAD, END) == []
    assert found(BRANCH, WAIT, BARRIER, END, "$L1:", "bra.uni $L2;", "$L2:", BARRIER, LOAD, END) == []


@pytest.mark.parametrize(
    "lines",
    [
        # An access, an end or a condition before the barrier; a barrier that some threads skip.
        (BRANCH, WAIT, BARRIER, END, "$L1:", LOAD, BARRIER, END),
        (BRANCH, WAIT, BARRIER, END, "$L1:", END),
        (BRANCH, WAIT, BARRIER, END, "$L1:", "@%p2 bra $L2;", BARRIER, "$L2:", LOAD, END),
        (BRANCH, WAIT, BARRIER, END, "$L1:", "@%p2 barrier.sync 1;", LOAD, END),
        # The threads that wait have passed the barrier before.
        (BRANCH, BARRIER, WAIT, END, "$L1:", BARRIER, LOAD, END),
        (BRANCH, WAIT, END, "$L1:", "bra.uni $L1;"),
    ],
)
def test_warps_that_do_not_wait_for_those_at_the_wait_are_named(lines: tuple[str, ...]) -> None:
    assert found(*lines) == [BRANCH.removesuffix(";")]
