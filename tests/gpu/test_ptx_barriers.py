"""The emulator of PTX: mbarriers, copies by tensor maps, barriers of some of the threads."""

from __future__ import annotations

import numpy as np
import pytest

from emulation.ptx.barriers import TensorMap
from emulation.ptx.formats import Array
from emulation.ptx.program import Fault
from ptx_programs import run

ROWS, COLUMNS, BOX_ROWS = 6, 64, 4
SIZE = BOX_ROWS * COLUMNS * 2
MBARRIER = 2048
# Thread 0 makes the mbarrier, and tells it what it copies; all wait and store what they find, 16 bytes each.
INIT = f"setp.eq.u32 %p0, %r0, 0; @%p0 mbarrier.init.shared::cta.b64 [{MBARRIER}], 1;"
FENCE = "fence.proxy.async.shared::cta;"
MEET = "bar.sync 0;"
ANNOUNCE = f"@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [{MBARRIER}], {{size}};"
COPY = (
    "mov.b32 %r9, map; cvt.u64.u32 %d9, %r9; cvta.param.u64 %d9, %d9; mov.b32 %r10, {start}; mov.b32 %r11, 0;"
    "mov.b32 %r12, {place};"
    "@%p0 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r12], [%d9, {{%r11, %r10}}],"
    f" [{MBARRIER}];"
)
WAIT = (
    "{{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [" + f"{MBARRIER}" + "], {phase};"
    " @!done bra.uni again; }}"
)
STORE = (
    "shl.b32 %r5, %r0, 4; ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5+1024];"
    "mad.wide.u32 %d8, %r0, 16, %d1; st.global.v4.b32 [%d8], {%r1, %r2, %r3, %r4};"
)
GUARDED = STORE.replace("st.global", "@%p2 st.global").replace("ld.shared", "@%p2 ld.shared")
STEPS = (INIT, FENCE, MEET, ANNOUNCE, COPY, WAIT, STORE)


def completed(steps: tuple[str, ...], **values: int) -> str:
    return "".join(step.format(**values) if step in (ANNOUNCE, COPY, WAIT) else step for step in steps)


def copied(start: int, swizzle: int, steps: tuple[str, ...] = STEPS, place: int = 1024, phase: int = 0) -> Array:
    """What lies at byte 1024 of shared memory after a copy of rows from `start` on: [units, 8]."""
    source = np.arange(1, ROWS * COLUMNS + 1, dtype=np.uint16).reshape(ROWS, COLUMNS)
    width = COLUMNS if swizzle == 16 else swizzle // 2
    out = np.zeros((BOX_ROWS * width // 8, 8), np.uint16)
    tensor = TensorMap(source.ctypes.data, source.shape, (2 * COLUMNS, 2), (BOX_ROWS, width), 2, swizzle)
    body = completed(steps, start=start, place=place, phase=phase, size=out.nbytes)
    run(body, source, out, threads=32, shared=MBARRIER + 8, tensor_map=tensor)
    return out


@pytest.mark.parametrize("swizzle", [16, 32, 64, 128])
@pytest.mark.parametrize("start", [-3, 0, 1, 4, 6])
def test_copies_fill_the_box_with_zeros_and_swizzle_its_units(start: int, swizzle: int) -> None:
    out = copied(start, swizzle, (*STEPS[:-1], f"setp.lt.u32 %p2, %r0, {units(swizzle)};", GUARDED))
    across = units(swizzle) // BOX_ROWS
    for unit, element in np.ndindex(*out.shape):
        row, column = start + unit // across, unit % across * 8 + element
        # The units of 128 bytes change places with those of the next.
        found = out[unit ^ (unit // 8 % (swizzle // 16)), element]
        assert found == (row * COLUMNS + column + 1 if 0 <= row < ROWS else 0)


def units(swizzle: int) -> int:
    return BOX_ROWS * (8 if swizzle == 16 else swizzle // 16)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (WAIT, "read while a copy to it is under way"),
        (ANNOUNCE, "wait for ever"),
        (COPY, "wait for ever"),
        (FENCE, r"without fence\.proxy\.async"),
        (INIT, "no mbarrier at byte 2048"),
        (MEET, "another warp or a copy wrote|no mbarrier"),
    ],
    ids=["wait", "announce", "copy", "fence", "init", "barrier"],
)
def test_every_step_of_a_copy_is_needed(missing: str, message: str) -> None:
    steps = tuple(step for step in STEPS if step != missing)
    if missing == INIT:
        steps = ("setp.eq.u32 %p0, %r0, 0;", *steps)
    with pytest.raises(Fault, match=message):
        # A second warp waits for what the first one has made.
        copied(0, 128, (*steps, "")) if missing != MEET else copied_by_two_warps(steps)


def copied_by_two_warps(steps: tuple[str, ...]) -> None:
    source = np.zeros((ROWS, COLUMNS), np.uint16)
    tensor = TensorMap(source.ctypes.data, source.shape, (2 * COLUMNS, 2), (BOX_ROWS, COLUMNS), 2, 128)
    body = completed(steps[:-1], start=0, place=1024, phase=0, size=SIZE)
    run(body, source, threads=64, shared=MBARRIER + 8, tensor_map=tensor)


def test_two_warps_wait_for_a_copy() -> None:
    copied_by_two_warps(STEPS)


def test_a_phase_that_was_never_begun_is_complete_for_the_other_parity() -> None:
    with pytest.raises(Fault, match="read while a copy to it is under way"):
        copied(0, 128, phase=1)


def test_a_row_of_a_box_is_not_longer_than_the_swizzle() -> None:
    source = np.zeros((ROWS, COLUMNS), np.uint16)
    tensor = TensorMap(source.ctypes.data, source.shape, (2 * COLUMNS, 2), (BOX_ROWS, COLUMNS), 2, 64)
    body = completed(STEPS[:-1], start=0, place=1024, phase=0, size=SIZE)
    with pytest.raises(Fault, match="a box with rows of 128 bytes, which the swizzle does not allow"):
        run(body, source, shared=MBARRIER + 8, tensor_map=tensor)


def test_a_swizzled_copy_has_an_aligned_place() -> None:
    with pytest.raises(Fault, match="which the swizzle does not allow"):
        copied(0, 128, place=1024 + 128)


def test_elect_chooses_one_lane_of_each_warp() -> None:
    out = np.zeros(64, np.uint32)
    run(
        "mov.b32 %r2, 0; elect.sync %r1|%p0, -1; @%p0 mov.b32 %r2, 1;"
        "mad.wide.u32 %d8, %r0, 4, %d0; st.global.b32 [%d8], %r2;",
        out,
        threads=64,
    )
    assert np.flatnonzero(out).tolist() == [0, 32]


HALF = "setp.lt.u32 %p1, %r0, 64; shl.b32 %r5, %r0, 2; @!%p1 bra Past; st.shared.b32 [%r5], %r0;"
READ = "xor.b32 %r6, %r5, 128; ld.shared.b32 %r7, [%r6]; mad.wide.u32 %d8, %r0, 4, %d0; st.global.b32 [%d8], %r7; Past:"


def test_some_of_the_threads_meet_at_a_barrier_of_their_own() -> None:
    out = np.zeros(96, np.uint32)
    run(f"{INIT} {HALF} bar.sync 1, 64; {READ}", out, threads=96, shared=MBARRIER + 8)
    assert out[:64].tolist() == [*range(32, 64), *range(32)]
    with pytest.raises(Fault, match="another warp or a copy wrote"):
        run(f"{INIT} {HALF} {READ}", out, threads=96, shared=MBARRIER + 8)
    with pytest.raises(Fault, match="wait for ever"):
        run(f"{INIT} {HALF} bar.sync 1, 96; {READ}", out, threads=96, shared=MBARRIER + 8)


def test_labels_of_inline_assembly_are_known_in_its_braces() -> None:
    out = np.zeros(32, np.uint32)
    loop = "{{ .reg .pred more; again: add.u32 %r1, %r1, 1; setp.lt.u32 more, %r1, {}; @more bra again; }}"
    body = "mov.b32 %r1, 0;" + loop.format(5) + loop.format(9)
    run(body + "mad.wide.u32 %d8, %r0, 4, %d0; st.global.b32 [%d8], %r1;", out)
    assert set(out) == {9}
