"""The emulator of PTX: who may read and write global memory when, and the order in which blocks run."""

from __future__ import annotations

import re

import numpy as np
import pytest

from emulation.ptx.formats import Array
from emulation.ptx.program import Fault
from ptx_programs import run

# Two warps; the address of each thread's own word, and that of the same thread of the other warp.
PLACES = "mad.wide.u32 %d8, %r0, 4, %d0; xor.b32 %r1, %r0, 32; mad.wide.u32 %d9, %r1, 4, %d0;"
FIRST_WARP = "setp.lt.u32 %p0, %r0, 32;"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("st.global.b32 [%d8], %r0; ld.global.b32 %r2, [%d8];", None),
        ("ld.global.nc.b32 %r2, [%d8];", None),
        ("st.global.b32 [%d8], %r0; ld.global.nc.b32 %r2, [%d8];", "read as a constant"),
        ("st.global.b32 [%d8], %r0; ld.global.b32 %r2, [%d9];", "read that another warp has written"),
        ("st.global.b32 [%d8], %r0; bar.sync 0; ld.global.b32 %r2, [%d9];", None),
        ("st.global.b32 [%d8], %r0; bar.sync 0; st.global.b32 [%d8], %r0; ld.global.b32 %r2, [%d9];", "has written"),
        ("ld.global.b32 %r2, [%d9]; st.global.b32 [%d8], %r0;", "written that another warp has read"),
        ("ld.global.b32 %r2, [%d9]; bar.sync 0; st.global.b32 [%d8], %r0;", None),
        ("st.global.b32 [%d8], %r0; st.global.b32 [%d9], %r0;", "written that another warp has written"),
        ("st.global.b32 [%d0], %r0;", "written by two warps at once"),
        (f"{FIRST_WARP} @%p0 st.global.b32 [%d0], %r0;", None),
        # Elements are of two bytes: neighbours belong to different warps.
        (f"{FIRST_WARP} @%p0 st.global.b16 [%d0], %h0; @!%p0 st.global.b16 [%d0+2], %h0;", None),
        (f"{FIRST_WARP} @%p0 st.global.b16 [%d0], %h0; @!%p0 ld.global.b32 %r2, [%d0];", "has written"),
        ("red.global.gpu.relaxed.add.u32 [%d0], %r0; red.global.gpu.relaxed.add.u32 [%d0], %r0;", None),
        ("red.global.gpu.relaxed.add.u32 [%d0], %r0; ld.global.b32 %r2, [%d0];", "read that another warp"),
        ("ld.global.b32 %r2, [%d0]; red.global.gpu.relaxed.add.u32 [%d0], %r0;", "updated that another warp has read"),
        (f"{FIRST_WARP} @%p0 st.global.b32 [%d0], %r0; atom.global.gpu.acq_rel.add.u32 %r2, [%d0], 1;", "updated that"),
        ("st.global.b32 [%d8], %r0; cp.async.ca.shared.global [0], [%d9], 4;", "read that another warp"),
    ],
)  # fmt: skip
def test_warps_of_a_block(body: str, message: str | None) -> None:
    array = np.zeros(128, np.uint16)
    if message is None:
        run(PLACES + body, array, threads=64, shared=4)
        return
    with pytest.raises(Fault, match=message):
        run(PLACES + body, array, threads=64, shared=4)


# Every thread of four blocks of two warps leaves its number; the last block to come adds up what all have left.
STORE = "mov.u32 %r1, %ctaid.x; mad.lo.s32 %r2, %r1, 64, %r0; mad.wide.u32 %d8, %r2, 4, %d0; st.global.b32 [%d8], %r2;"
COUNT = """
    setp.eq.u32 %p0, %r0, 0;
    @%p0 atom.global.gpu.acq_rel.add.u32 %r3, [%d1], 1;
    @%p0 st.shared.b32 [0], %r3;
"""
SUM = """
    bar.sync 0; ld.shared.b32 %r3, [0]; setp.ne.u32 %p1, %r3, 3; @%p1 ret;
    mov.b32 %r4, 0; mov.b32 %r5, 0; mad.wide.u32 %d9, %r0, 4, %d0;
Next:
    ld.global.b32 %r6, [%d9]; add.u32 %r4, %r4, %r6; add.s64 %d9, %d9, 256; add.u32 %r5, %r5, 1;
    setp.lt.u32 %p1, %r5, 4; @%p1 bra Next;
    mad.wide.u32 %d9, %r0, 4, %d2; st.global.b32 [%d9], %r4;
"""
LAST_BLOCK = STORE + "bar.sync 0;" + COUNT + SUM
FENCED = LAST_BLOCK.replace("@%p0 atom.global.gpu.acq_rel", "membar.gl; @%p0 atom.global.gpu.relaxed")


def last_block(body: str, seed: int = 0) -> Array:
    out = np.zeros(64, np.uint32)
    run(body, np.zeros(256, np.uint32), np.zeros(1, np.uint32), out, threads=64, blocks=4, shared=4, seed=seed)
    return out


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("body", [LAST_BLOCK, FENCED.replace("@%p0 st.shared", "membar.gl; @%p0 st.shared")])
def test_what_is_released_and_acquired_may_be_read(body: str, seed: int) -> None:
    assert last_block(body, seed).tolist() == [4 * thread + 64 * 6 for thread in range(64)]


@pytest.mark.parametrize(
    "body",
    [
        LAST_BLOCK.replace("acq_rel", "relaxed"),
        LAST_BLOCK.replace("acq_rel", "acquire"),
        LAST_BLOCK.replace("acq_rel", "release"),
        LAST_BLOCK.replace("gpu.acq_rel", "cta.acq_rel"),
        LAST_BLOCK.replace("bar.sync 0;", "", 1),  # the other warp may not have stored
        FENCED,  # no fence after the atomic
        FENCED.replace("ld.shared", "membar.gl; ld.shared"),  # a fence, but too late for the other warp
        COUNT + STORE + SUM,
    ],
    ids=["relaxed", "acquire", "release", "of the block", "no barrier", "one fence", "a late fence", "too late"],
)
def test_what_is_not_released_or_acquired_may_not_be_read(body: str) -> None:
    with pytest.raises(Fault, match="global memory read that another warp has written"):
        last_block(body)


def test_blocks_come_in_any_order() -> None:
    """Each block of one warp takes a number, with an atomic, and leaves it; then it takes another one."""
    body = """
        setp.ne.u32 %p0, %r0, 0; @%p0 ret; mov.u32 %r1, %ctaid.x; mad.wide.u32 %d8, %r1, 8, %d1;
        atom.global.gpu.relaxed.add.u32 %r2, [%d0], 1; st.global.b32 [%d8], %r2;
        atom.global.gpu.relaxed.add.u32 %r2, [%d0], 1; st.global.b32 [%d8+4], %r2;
    """
    orders = []
    for seed in range(30):
        numbers = np.zeros((3, 2), np.uint32)
        run(body, np.zeros(1, np.uint32), numbers, blocks=3, seed=seed)
        assert sorted(numbers.reshape(-1).tolist()) == list(range(6))
        assert (numbers[:, 0] < numbers[:, 1]).all()
        orders.append(tuple(numbers.reshape(-1).tolist()))
    assert len({numbers[::2] for numbers in orders}) > 10
    # Some block has ended before another one began, and some two took turns.
    assert any(max(numbers[:2]) == 1 for numbers in orders)
    assert any(numbers[0] < numbers[2] < numbers[1] < numbers[3] for numbers in orders)
    numbers = np.zeros((3, 2), np.uint32)
    run(body, np.zeros(1, np.uint32), numbers, blocks=3, seed=7)
    assert tuple(numbers.reshape(-1).tolist()) == orders[7]


@pytest.mark.parametrize("seed", range(5))
def test_a_block_may_wait_for_another(seed: int) -> None:
    """Block 1 spins until block 0 has released its data."""
    body = """
        mov.u32 %r1, %ctaid.x; setp.ne.u32 %p0, %r1, 0; @%p0 bra Wait;
        mad.wide.u32 %d8, %r0, 4, %d0; st.global.b32 [%d8], %r0;
        setp.ne.u32 %p1, %r0, 0; @%p1 ret; st.release.gpu.global.u32 [%d1], 1; ret;
    Wait:
        ld.acquire.gpu.global.u32 %r2, [%d1]; setp.eq.u32 %p1, %r2, 0; @%p1 bra Wait;
        mad.wide.u32 %d8, %r0, 4, %d0; ld.global.b32 %r3, [%d8];
        mad.wide.u32 %d8, %r0, 4, %d2; st.global.b32 [%d8], %r3;
    """
    out = np.zeros(32, np.uint32)
    run(body, np.zeros(32, np.uint32), np.zeros(1, np.uint32), out, blocks=2, seed=seed)
    assert out.tolist() == list(range(32))
    for weaker in ("st.relaxed", "ld.relaxed"):
        strong = {"st": "st.release", "ld": "ld.acquire"}[weaker[:2]]
        with pytest.raises(Fault, match=re.escape("read that another warp has written")):
            run(body.replace(strong, weaker), np.zeros(32, np.uint32), np.zeros(1, np.uint32), out, blocks=2, seed=seed)
