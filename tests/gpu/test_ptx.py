"""The emulator of PTX: single instructions, against independent arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from emulation.ptx import machine
from emulation.ptx.formats import dtype_of
from emulation.ptx.program import Fault, Unsupported
from ptx_programs import bits, evaluate, run

# A result is compared by its bits. The last of the types is the result's.
CASES: list[tuple[str, str, list[Any], Any]] = [
    (
        "cvt.rna.tf32.f32 $0, $1",
        "f32 b32",
        [bits(0x3F801000, 0x3F800FFF, 0x7F800001)],
        [0x3F802000, 0x3F800000, 0x7FFFFFFF],
    ),
    ("cvt.rn.tf32.f32 $0, $1", "f32 b32", [bits(0x3F801000, 0x3F803000)], [0x3F800000, 0x3F804000]),
    ("cvt.rn.bf16x2.f32 $0, $1, $2", "f32 f32 b32", [[1.0], [-2.0]], [0x3F80C000]),
    ("cvt.rni.s32.f32 $0, $1", "f32 s32", [[0.5, 1.5, -2.5, 3e9, -3e9, np.nan]], [0, 2, -2, 2**31 - 1, -(2**31), 0]),
    ("cvt.rzi.u32.f32 $0, $1", "f32 u32", [[2.9, -1.0, 5e9]], [2, 0, 2**32 - 1]),
    ("cvt.rmi.s64.f64 $0, $1", "f64 s64", [[-0.5, 1e30]], [-1, 2**63 - 1]),
    ("cvt.rpi.f32.f32 $0, $1", "f32 f32", [[0.25, -0.25]], [1.0, -0.0]),
    ("cvt.rn.f32.s64 $0, $1", "s64 f32", [[2**24 + 1, 2**60 + 2**36 + 1]], [2.0**24, 2.0**60 + 2.0**37]),
    ("cvt.sat.s8.s32 $0, $1", "s32 s16", [[200, -200, 5]], [127, -128, 5]),
    ("cvt.s64.s32 $0, $1", "s32 s64", [[-5]], [-5]),
    ("cvt.u64.u32 $0, $1", "u32 u64", [[2**32 - 5]], [2**32 - 5]),
    ("cvt.u32.u16 $0, $1", "u16 u32", [[65535]], [65535]),
    ("cvt.rn.sat.f32.f64 $0, $1", "f64 f32", [[1.5, -1.0, 0.25, np.nan]], [1.0, 0.0, 0.25, 0.0]),
    ("add.f32 $0, $1, $2", "f32 f32 b32", [bits(0x7F800000, 0x7FC00001), bits(0xFF800000, 0)], [0x7FFFFFFF] * 2),
    ("add.ftz.f32 $0, $1, $2", "f32 f32 b32", [bits(0x00000001, 0x80000001), bits(0, 0x80000000)], [0, 0x80000000]),
    ("min.f32 $0, $1, $2", "f32 f32 f32", [[np.nan, 0.0, -1.0], [3.0, -0.0, -2.0]], [3.0, -0.0, -2.0]),
    ("sub.rn.f32.bf16 $0, $1, $2", "b16 f32 f32", [[0x4040], [1.5]], [1.5]),
    ("add.sat.f32.f16 $0, $1, $2", "b16 f32 f32", [[0x3C00, 0x3C00], [0.5, -0.5]], [1.0, 0.5]),
    ("max.NaN.f32 $0, $1, $2", "f32 f32 b32", [[np.nan], [3.0]], [0x7FFFFFFF]),
    ("max.f32 $0, $1, $2", "f32 f32 f32", [[-0.0, 5.0], [0.0, 4.0]], [0.0, 5.0]),
    ("fma.rn.relu.bf16 $0, $1, $2, $3", "b16 b16 b16 b16", [[0x3F80], [0xBF80], [0]], [0]),
    ("fma.rn.bf16x2 $0, $1, $2, $3", "b32 b32 b32 b32", [[0x3FC03FC0], [0x3F813F81], [0x0D808D80]], [0x3FC23FC1]),
    ("mul.rn.f16x2 $0, $1, $2", "b32 b32 b32", [[0x3C004000], [0xC0004200]], [0xC0004600]),
    ("add.rn.f32x2 $0, $1, $2", "b64 b64 b64", [[0x3F800000_40000000], [0x3F800000_3F800000]], [0x40000000_40400000]),
    ("ex2.approx.ftz.f32 $0, $1", "f32 f32", [[3.0, -200.0, -127.0]], [8.0, 0.0, 0.0]),
    ("ex2.approx.f32 $0, $1", "f32 f32", [[-127.0]], [2.0**-127]),
    ("tanh.approx.f32 $0, $1", "f32 f32", [[0.5]], [np.tanh(0.5)]),
    ("rsqrt.approx.f32 $0, $1", "f32 f32", [[4.0, 0.0]], [0.5, np.inf]),
    ("lg2.approx.f32 $0, $1", "f32 f32", [[8.0, 0.0]], [3.0, -np.inf]),
    ("rcp.approx.ftz.f32 $0, $1", "f32 f32", [[4.0, 1e38]], [0.25, 0.0]),
    ("div.full.f32 $0, $1, $2", "f32 f32 f32", [[1.0], [3.0]], [1 / 3]),
    ("copysign.f32 $0, $1, $2", "f32 f32 f32", [[-1.0], [3.0]], [-3.0]),
    ("neg.bf16 $0, $1", "b16 b16", [[0x3F80]], [0xBF80]),
    ("add.s32 $0, $1, $2", "s32 s32 s32", [[2**31 - 1], [1]], [-(2**31)]),
    ("mul.hi.s32 $0, $1, $2", "s32 s32 s32", [[-(2**31)], [3]], [-2]),
    ("mul.hi.u64 $0, $1, $2", "u64 u64 u64", [[2**63 + 5], [6]], [3]),
    ("mul.wide.s32 $0, $1, $2", "s32 s32 s64", [[-3], [2**30]], [-3 * 2**30]),
    ("mad.lo.s32 $0, $1, $2, $3", "s32 s32 s32 s32", [[7], [-3], [1]], [-20]),
    ("div.s32 $0, $1, $2", "s32 s32 s32", [[-7, 7, -(2**31)], [2, -2, 3]], [-3, -3, -715827882]),
    ("rem.s32 $0, $1, $2", "s32 s32 s32", [[-7, 7], [2, -2]], [-1, 1]),
    ("shl.b32 $0, $1, $2", "b32 u32 b32", [[1, 1], [31, 32]], [2**31, 0]),
    ("shr.s32 $0, $1, $2", "s32 u32 s32", [[-8, -8], [1, 40]], [-4, -1]),
    ("shr.u64 $0, $1, $2", "u64 u32 u64", [[2**63, 2**63], [63, 64]], [1, 0]),
    ("shf.l.wrap.b32 $0, $1, $2, $3", "b32 b32 b32 b32", [[0x80000000], [1], [33]], [3]),
    ("shf.r.clamp.b32 $0, $1, $2, $3", "b32 b32 b32 b32", [[1], [7], [40]], [7]),
    ("bfe.u32 $0, $1, 4, 8", "u32 u32", [[0xABCDE]], [0xCD]),
    ("bfe.s32 $0, $1, 28, 8", "s32 s32", [[-(2**31)]], [-8]),
    ("bfe.s32 $0, $1, 2, 1", "s32 s32", [[4, 3]], [-1, 0]),
    ("bfi.b32 $0, $1, $2, 8, 4", "b32 b32 b32", [[0xF3], [0xFFFFFFFF]], [0xFFFFF3FF]),
    ("prmt.b32 $0, $1, $2, 0x7C10", "b32 b32 b32", [[0x44332211], [0x88776685]], [0x88FF2211]),
    ("lop3.b32 $0, $1, $2, $3, 0xE8", "b32 b32 b32 b32", [[0b1100], [0b1010], [0b0110]], [0b1110]),
    ("popc.b64 $0, $1", "b64 u32", [[2**63 + 7]], [4]),
    ("clz.b32 $0, $1", "b32 u32", [[1, 0]], [31, 32]),
    ("bfind.s32 $0, $1", "s32 u32", [[-1, 8, -9]], [0xFFFFFFFF, 3, 3]),
    ("brev.b32 $0, $1", "b32 b32", [[1]], [2**31]),
    ("setp.lt.f32 %p0|%p1, $1, $2; selp.u32 $0, 1, 0, %p1", "f32 f32 u32", [[1.0, np.nan], [2.0, 1.0]], [0, 1]),
    ("setp.ltu.f32 %p0, $1, $2; selp.u32 $0, 1, 0, %p0", "f32 f32 u32", [[3.0, np.nan], [2.0, 1.0]], [0, 1]),
    ("setp.ne.f32 %p0, $1, $2; selp.u32 $0, 1, 0, %p0", "f32 f32 u32", [[3.0, np.nan], [2.0, 1.0]], [1, 0]),
    ("setp.num.f32 %p0, $1, $2; selp.u32 $0, 1, 0, %p0", "f32 f32 u32", [[3.0, np.nan], [2.0, 1.0]], [1, 0]),
    ("setp.num.bf16x2 %p0|%p1, $1, $2; selp.u32 $0, 1, 0, %p0", "u32 u32 u32", [[0x3F807FC0], [0]], [0]),
    ("setp.num.bf16x2 %p0|%p1, $1, $2; selp.u32 $0, 1, 0, %p1", "u32 u32 u32", [[0x3F807FC0], [0]], [1]),
    ("setp.gt.u16 %p0, $1, -257; selp.u32 $0, 1, 0, %p0", "u16 u32", [[0xFF00, 5]], [1, 0]),
    ("mov.pred %p1, -1; setp.eq.and.s32 %p0, $1, 3, !%p1; selp.u32 $0, 1, 0, %p0", "s32 u32", [[3]], [0]),
    ("mov.b32 {%h1, %h2}, $1; mov.b32 $0, {%h2, %h1}", "b32 b32", [[0x12345678]], [0x56781234]),
    ("{ .reg .b16 low; mov.b32 {low, _}, $1; cvt.u32.u16 $0, low; }", "b32 u32", [[0x12345678]], [0x5678]),
    ("mov.b32 $0, 0f3F800000", "b32 f32", [[0]], [1.0]),
    ("vote.sync.ballot.b32 $0, %p2, -1", "b32 b32", [[0]], [0]),
    ("activemask.b32 $0", "b32 b32", [[0]], [0xFFFFFFFF]),
    ("redux.sync.add.s32 $0, $1, -1", "s32 s32", [np.arange(-16, 16)], [-16] * 32),
    ("redux.sync.max.NaN.f32 $0, $1, -1", "f32 b32", [[np.nan] + [1.0] * 31], [0x7FFFFFFF]),
    ("shfl.sync.bfly.b32 $0, $1, 16, 31, -1", "b32 b32", [np.arange(32)], np.arange(32) ^ 16),
    ("shfl.sync.up.b32 $0, $1, 3, 0, -1", "b32 b32", [np.arange(32)], [0, 1, 2, *range(29)]),
    ("shfl.sync.down.b32 $0, $1, 1, 0x1807, -1", "b32 b32", [np.arange(32)], [min(i + 1, i | 7) for i in range(32)]),
    ("shfl.sync.idx.b32 $0, $1, 5, 0x181F, -1", "b32 b32", [np.arange(32)], [i // 8 * 8 + 5 for i in range(32)]),
]


@pytest.mark.parametrize(("instruction", "kinds", "operands", "expected"), CASES, ids=[case[0] for case in CASES])
def test_instruction(instruction: str, kinds: str, operands: list[Any], expected: Any) -> None:
    *inputs, result = kinds.split()
    found = evaluate(instruction, result, inputs, *operands)
    wanted = np.array(expected).astype(dtype_of(result))
    assert found.tobytes()[: wanted.nbytes] == wanted.tobytes(), (found[: wanted.size], wanted)


def test_lanes_part_and_meet_again() -> None:
    """Each lane adds 1 as often as its index; lanes of odd index then double their value."""
    out = np.zeros(64, np.uint32)
    body = """
        mov.u32 %r1, 0; mov.u32 %r2, %ctaid.x; add.s32 %r5, %r0, %r2;
    Loop:
        setp.ge.u32 %p0, %r1, %r5;
        @%p0 bra Done;
        add.s32 %r1, %r1, 1;
        bra Loop;
    Done:
        and.b32 %r3, %r0, 1;
        setp.eq.s32 %p1, %r3, 0;
        @%p1 bra Even;
        shl.b32 %r1, %r1, 1;
    Even:
        activemask.b32 %r6;
        mad.lo.s32 %r4, %r2, 32, %r0;
        mad.wide.u32 %d1, %r4, 4, %d0;
        setp.eq.s32 %p2, %r6, -1;
        @%p2 st.global.b32 [%d1], %r1;
    """
    counts = run(body, out, blocks=2)
    assert out.tolist() == [(lane + block) * (1 + lane % 2) for block in range(2) for lane in range(32)]
    # In block 0 lane 0 leaves at once, the last one alone; in block 1 one step later. And odd from even.
    assert counts.divergent_branches == 31 + 31 + 2
    assert counts.instructions["activemask.b32"] == 2
    assert counts.instructions["add.s32"] == (31 + 1) + (32 + 1)


def test_a_register_chooses_a_parameter() -> None:
    """As LLVM makes of the choice between two pointers that were passed."""
    first, second = np.full(32, 7, np.uint32), np.arange(32, dtype=np.uint32)
    body = """
        and.b32 %r1, %r0, 1; setp.eq.s32 %p0, %r1, 0;
        mov.b32 %r2, p0; mov.b32 %r3, p1; selp.b32 %r4, %r2, %r3, %p0;
        ld.param.b64 %d2, [%r4+0];
        mad.wide.u32 %d2, %r0, 4, %d2; ld.global.b32 %r5, [%d2];
        mad.wide.u32 %d1, %r0, 4, %d0; st.global.b32 [%d1], %r5;
    """
    run(body, first, second)
    assert first.tolist() == [7 if lane % 2 == 0 else lane for lane in range(32)]
    with pytest.raises(Fault, match="from where none is"):
        run("mov.b32 %r1, 4; ld.param.b64 %d1, [%r1];", first)


PLACE = "shl.b32 %r1, %r0, 2; mov.b32 %r9, global_smem; add.s32 %r1, %r1, %r9; xor.b32 %r2, %r1, 128;"
FIRST = "setp.lt.u32 %p0, %r0, 32;"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"{PLACE} st.shared.b32 [%r1], %r0; ld.shared.b32 %r3, [%r2];", "read before a barrier"),
        (f"{PLACE} ld.shared.b32 %r3, [%r1]; st.shared.b32 [%r2], %r0;", "after the read"),
        (f"{PLACE} ld.shared.b32 %r3, [0]; {FIRST} @%p0 st.shared.b32 [0], %r0;", "after the read"),
        (f"{PLACE} ld.shared.b32 %r3, [%r1+4];", "shared memory, which has 256"),
        (f"{PLACE} ld.shared.b32 %r3, [%r1+-2];", "4 bytes at -2"),
        (f"{FIRST} @%p0 bra Past; bar.sync 0; Past:", None),
        (f"{FIRST} @%p0 bra Other; bar.sync 0; bra Past; Other: bar.sync 0; Past:", "not all threads"),
        (f"{FIRST} @%p0 ret; bar.sync 0;", None),
        ("setp.lt.u32 %p0, %r0, 3; @%p0 shfl.sync.bfly.b32 %r2, %r0, 2, 31, 7;", "a shuffle from a lane"),
        ("setp.lt.u32 %p0, %r0, 3; @%p0 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [0];", "some of its lanes"),
        ("ld.global.b32 %r1, [%d0+64];", "byte 64 of array 0, which has 64"),
        ("ld.global.b32 %r1, [%d0+-4];", "byte -4 of array 0"),
        ("ld.global.v2.b32 {%r1, %r2}, [%d0+4];", "misaligned: 8 bytes at byte 4"),
        ("red.global.gpu.relaxed.add.u32 [%d0+64], %r0;", "out of bounds, 64 lanes"),
        ("cp.async.cg.shared.global [0], [%d0+56], 0x10;", "misaligned"),
        ("cp.async.ca.shared.global [0], [%d0], 0x4; ld.shared.b32 %r1, [0];", "a wait is missing"),
    ],
)  # fmt: skip
def test_faults(body: str, message: str | None) -> None:
    array = np.zeros(16, np.uint32)
    if message is None:
        run(body, array, threads=64, shared=256)
        return
    with pytest.raises(Fault, match=message):
        run(body, array, threads=64, shared=256)


def test_a_loop_without_end_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "ENDLESS", 1000)
    with pytest.raises(Fault, match="does not end"):
        run("Loop: bra Loop;", np.zeros(1))


def test_unknown_instructions_are_named() -> None:
    for instruction in ("addc.u32 %r1, %r0, %r0", "add.cc.u32 %r1, %r0, %r0", "wgmma.fence.sync.aligned"):
        with pytest.raises(Unsupported, match=instruction.split()[0].split(".")[0]):
            run(f"{instruction};", np.zeros(1, np.uint32))


def test_a_copy_lands_when_it_is_waited_for() -> None:
    """Three groups of one thread: `wait_group 1` lands the first two. The second reads nothing and writes zeros."""
    source, out = np.arange(1, 17, dtype=np.uint32), np.zeros(8, np.uint32)
    body = "setp.ne.u32 %p0, %r0, 0; @%p0 ret; mov.b32 %r5, 0;"
    for number, taken in ((0, ""), (1, ", %r5"), (2, "")):
        body += f"cp.async.cg.shared.global [{16 * number}], [%d0+{16 * number}], 0x10{taken}; cp.async.commit_group;"
    body += (
        "cp.async.wait_group 1; ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [0]; st.global.v4.b32 [%d1], {%r1,%r2,%r3,%r4};"
    )
    body += "ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [16]; st.global.v4.b32 [%d1+16], {%r1, %r2, %r3, %r4};"
    counts = run(body, source, out, shared=48)
    assert out.tolist() == [1, 2, 3, 4, 0, 0, 0, 0]
    assert counts.loads.bytes == 32
    with pytest.raises(Fault, match="a wait is missing"):
        run(f"{body} ld.shared.b32 %r1, [32];", source, out, shared=48)


@pytest.mark.parametrize(
    ("stride", "width", "wavefronts"),
    [(4, 4, 1), (8, 4, 2), (128, 4, 32), (0, 4, 1), (8, 8, 2), (16, 16, 4), (32, 16, 8)],
)
def test_bank_conflicts(stride: int, width: int, wavefronts: int) -> None:
    vector = {4: "b32 %r2", 8: "b64 %d2", 16: "v2.b64 {%d2, %d3}"}[width]
    counts = run(f"mul.lo.s32 %r1, %r0, {stride}; ld.shared.{vector}, [%r1];", np.zeros(1), shared=4096)
    assert counts.shared_wavefronts == wavefronts
    assert counts.shared_ideal == max(1, width // 4)


@pytest.mark.parametrize(("stride", "width", "sectors"), [(16, 16, 16), (4, 4, 4), (2, 2, 2), (32, 4, 32), (0, 4, 1)])
def test_sectors(stride: int, width: int, sectors: int) -> None:
    array = torch.zeros(4096 + 32, dtype=torch.uint8)
    start = -array.data_ptr() % 32
    vector = {2: "b16 %h2", 4: "b32 %r2", 16: "v4.b32 {%r2, %r3, %r4, %r5}"}[width]
    counts = run(f"mad.wide.u32 %d1, %r0, {stride}, %d0; ld.global.{vector}, [%d1+{start}];", array.numpy())
    assert (counts.loads.requests, counts.loads.sectors, counts.loads.bytes) == (1, sectors, 32 * width)


def test_atomics_go_lane_after_lane() -> None:
    cells, before = np.array([5, 0], np.uint32), np.zeros(64, np.uint32)
    body = """
        atom.global.gpu.acq_rel.add.u32 %r1, [%d0], %r0;
        mad.wide.u32 %d2, %r0, 4, %d1; st.global.b32 [%d2], %r1;
        atom.global.gpu.acq_rel.cas.b32 %r2, [%d0+4], 0, 7; setp.eq.s32 %p0, %r2, 0;
        @%p0 atom.shared.add.u32 %r3, [0], 1;
    """
    counts = run(body, cells, before, threads=64, shared=4)
    assert cells.tolist() == [5 + 63 * 32, 7]
    assert before.tolist() == [5 + lane * (lane - 1) // 2 for lane in range(64)]
    assert (counts.atomics, counts.global_atomics) == (64 + 64 + 1, 64 + 64)
    assert counts.shared_wavefronts == 1


def test_atomics_of_shared_memory_wait_for_each_other_in_a_bank() -> None:
    # Lanes with one address are one access; those of 0 and 128, of one bank, are two.
    body = "and.b32 %r1, %r0, 3; shl.b32 %r1, %r1, 7; {} atom.shared.add.u32 %r3, [%r1], 1;"
    assert run(body.format(""), np.zeros(1, np.uint32), shared=512).shared_wavefronts == 4
    assert run(body.format("mov.u32 %r1, 4;"), np.zeros(1, np.uint32), shared=512).shared_wavefronts == 1


def test_matrix_instructions() -> None:
    """a [16, 16] from shared memory by ldmatrix, b [16, 8] by ldmatrix.trans, their product plus one by mma."""
    generator = np.random.default_rng(0)
    a, b = generator.integers(-8, 8, (16, 16)).astype(np.float16), generator.integers(-8, 8, (16, 8)).astype(np.float16)
    out = np.zeros((16, 8), np.float32)
    body = """
        mad.wide.u32 %d3, %r0, 16, %d0; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d3];
        shl.b32 %r5, %r0, 4; st.shared.v4.b32 [%r5], {%r1, %r2, %r3, %r4};
        setp.lt.u32 %p0, %r0, 16; mad.wide.u32 %d3, %r0, 16, %d1;
        @%p0 ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d3];
        @%p0 st.shared.v4.b32 [%r5+512], {%r1, %r2, %r3, %r4};
        and.b32 %r6, %r0, 15; shl.b32 %r6, %r6, 5; shr.u32 %r7, %r0, 4; shl.b32 %r7, %r7, 4; add.u32 %r6, %r6, %r7;
        ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r6];
        ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%r14, %r15}, [%r5+512];
        mov.b32 %r20, 0f3F800000;
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
            {%r21, %r22, %r23, %r24}, {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%r20, %r20, %r20, %r20};
        mad.wide.u32 %d3, %r0, 8, %d2;
        st.global.v2.b32 [%d3], {%r21, %r22}; st.global.v2.b32 [%d3+256], {%r23, %r24};
    """
    counts = run(body, a, b, out, shared=768)
    np.testing.assert_array_equal(out, a.astype(np.float32) @ b.astype(np.float32) + 1)
    assert counts.mma_flops == 2 * 16 * 8 * 16
