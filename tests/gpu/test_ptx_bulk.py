"""Bulk copies and the barriers that count their bytes, in small programs of PTX."""

from __future__ import annotations

import numpy as np
import pytest

from emulation.ptx.program import Fault
from ptx_programs import run

SIZE = 512  # bytes of a copy; the barrier lies behind two of them
BARRIER = 2 * SIZE

FENCE = "@%p0 fence.mbarrier_init.release.cluster;\n"
MEET = "bar.sync 0;\n"
INIT = f"""
    setp.eq.u32 %p0, %r0, 0;
    @%p0 mbarrier.init.shared::cta.b64 [{BARRIER}], 1;
    {FENCE} {MEET}
"""
EXPECT = f"@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [{BARRIER}], {SIZE};\n"
COPY = (
    "@%p0 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
    f"[{{to}}], [%d0+{{of}}], {SIZE}, [{BARRIER}];\n"
)
WAIT = f"""
    LOOP{{n}}:
    mbarrier.try_wait.parity.shared::cta.b64 %p1, [{BARRIER}], {{parity}};
    @!%p1 bra LOOP{{n}};
"""
ADDRESSES = "mul.lo.u32 %r1, %r0, 8; mad.wide.u32 %d3, %r0, 8, %d1;\n"
READ = "ld.shared.b64 %d2, [%r1+{of}];\n"
WRITE = "st.global.b64 [%d3+{of}], %d2;\n"


def copied(body: str, chunks: int = 1, init: str = INIT) -> tuple[np.ndarray, np.ndarray]:
    """What 64 threads, of 8 bytes each, find of an array in a program with these statements."""
    source = np.arange(chunks * SIZE // 8, dtype=np.int64)
    out = np.full_like(source, -1)
    run(init + ADDRESSES + body, source, out, threads=SIZE // 8, shared=BARRIER + 8)
    return out, source


def first(of: int = 0, to: int = 0) -> str:
    return EXPECT + COPY.format(of=of, to=to)


def wait(number: int = 0) -> str:
    return WAIT.format(n=number, parity=number % 2)


def test_a_copy_lands_when_it_is_waited_for() -> None:
    out, source = copied(first() + wait() + READ.format(of=0) + WRITE.format(of=0))
    assert (out == source).all()


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        (INIT.replace(FENCE, ""), "without a fence after it was initialised"),
        (INIT.replace("@%p0 fence", "@!%p0 fence"), "without a fence after it was initialised"),
        (INIT.replace(MEET, ""), "read before a barrier after the write of another warp"),
    ],
)
def test_a_barrier_is_initialised_for_copies_and_for_other_warps(init: str, reason: str) -> None:
    with pytest.raises(Fault, match=reason):
        copied(first() + wait(), init=init)


@pytest.mark.parametrize("fence", ["fence.proxy.async", "fence.proxy.async.shared::cta"])
def test_any_fence_of_the_asynchronous_proxy_will_do(fence: str) -> None:
    body = first() + wait() + READ.format(of=0) + WRITE.format(of=0)
    out, source = copied(body, init=INIT.replace("fence.mbarrier_init.release.cluster", fence))
    assert (out == source).all()


def test_phases_alternate() -> None:
    body = ""
    for number in range(3):
        body += first(of=number * SIZE) + wait(number) + READ.format(of=0) + WRITE.format(of=number * SIZE)
        body += "bar.sync 0;\n"
    out, source = copied(body, 3)
    assert (out == source).all()


def test_two_copies_of_a_phase_land_together() -> None:
    expect = EXPECT.replace(f"{SIZE};", f"{2 * SIZE};")
    both = expect + COPY.format(of=0, to=0) + COPY.format(of=SIZE, to=SIZE) + wait()
    reads = READ.format(of=0) + WRITE.format(of=0) + READ.format(of=SIZE) + WRITE.format(of=SIZE)
    out, source = copied(both + reads, 2)
    assert (out == source).all()


def test_a_copy_reads_global_memory_as_late_as_it_may() -> None:
    # The bytes are overwritten between the copy and the wait.
    change = "mad.wide.u32 %d4, %r0, 8, %d0; mov.b64 %d5, 7; st.global.b64 [%d4], %d5; bar.sync 0;\n"
    out, _ = copied(first() + "bar.sync 0;\n" + change + wait() + READ.format(of=0) + WRITE.format(of=0))
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (first() + READ.format(of=0), "while a cp.async to it is under way"),
        (first() + wait(1) + READ.format(of=0), "while a cp.async to it is under way"),  # the wrong parity
        (
            EXPECT.replace(f"{SIZE};", "1024;") + COPY.format(of=0, to=0) + wait(),
            "expects 1024 bytes, of which 512 come",
        ),
        (EXPECT + wait(), "threads wait for ever"),
        (COPY.format(of=0, to=0) + wait(), "1 arrivals never come"),
        (first(of=SIZE), "out of bounds"),
        (first(of=8), "misaligned"),
        (first(to=8), "16 bytes at 8"),
        (first(to=SIZE + 16), "beyond the 1032 bytes"),
        (EXPECT + COPY.format(of=0, to=0).replace(f"{SIZE},", "500,"), "500 bytes, which is no multiple of 16"),
        (first() + wait() + EXPECT + EXPECT, "more than 1 arrivals"),
        (EXPECT.replace(f"[{BARRIER}]", "[0]"), "no mbarrier at byte 0"),
        # The next copy may overtake the reads of other warps.
        (first() + wait() + READ.format(of=0) + first(), "before a barrier after the read of another warp"),
    ],
)
def test_mistakes_are_faults(body: str, reason: str) -> None:
    with pytest.raises(Fault, match=reason):
        copied(body)
