"""What is read from PTX without executing it: accesses that wait for one another, and operands in shared memory."""

from __future__ import annotations

import pytest

from emulation.dependence import dependent_loads, operand_stretch


def load(result: str, address: str) -> str:
    return f"\n\t.loc 1 2 3 // gram.py\n\tld.global.b32 {{ {result} }}, [ {address} + 0 ];\n"


@pytest.mark.parametrize(
    ("code", "count"),
    [
        ("mov.u32 %r1, %tid.x;", 0),
        (load("%r1", "%rd1"), 1),
        (load("%r1", "%rd1") + load("%r2", "%rd2"), 1),
        (load("%r1", "%rd1") + "cvt.u64.u32 %rd2, %r1;" + load("%r2", "%rd2"), 2),
        # A value that decides whether to go on.
        (load("%r1", "%rd1") + "setp.lt.s32 %p1, %r1, 1;\n@%p1 bra $L__BB0_2;" + load("%r2", "%rd2"), 2),
        (load("%r1", "%rd1") + "setp.lt.s32 %p1, %r1, 1;\n@%p1 ld.global.b32 { %r2 }, [ %rd2 + 0 ];", 2),
        # Through shared memory, with and without a barrier.
        (load("%r1", "%rd1") + "st.shared.b32 [%r9], %r1;" + load("%r2", "%rd2"), 1),
        (load("%r1", "%rd1") + "st.shared.b32 [%r9], %r1;\nbar.sync 0;" + load("%r2", "%rd2"), 2),
        (
            load("%r1", "%rd1") + "st.shared.b32 [%r9], %r1;\nld.shared.b32 %r3, [%r9];"
            "\ncvt.u64.u32 %rd2, %r3;" + load("%r2", "%rd2"),
            2,
        ),
        # A copy, a wait for it, and what is read after the barrier.
        (
            "cp.async.cg.shared.global [%r9], [%rd1], 0x10;\ncp.async.commit_group;\ncp.async.wait_group 0;"
            "\nbar.sync 0;" + load("%r2", "%rd2"),
            2,
        ),
        # The store, its visibility, and the answer of the counter; then the sum of what others stored.
        (
            load("%r1", "%rd1") + "st.global.b32 [%rd2], %r1;\natom.global.gpu.acq_rel.add.u32 %r3, [%rd3], 1;"
            "\nsetp.ne.s32 %p1, %r3, 7;\n@%p1 bra $L__BB0_9;" + load("%r4", "%rd2"),
            4,
        ),
        (load("%r1", "%rd1") + "st.global.b32 [%rd2], %r1;\natom.global.gpu.relaxed.add.u32 %r3, [%rd3], 1;", 1),
    ],
)  # fmt: skip
def test_accesses_that_wait_for_each_other_are_counted(code: str, count: int) -> None:
    assert dependent_loads(code) == count


def test_the_two_sides_of_a_branch_do_not_wait_for_each_other() -> None:
    side = "cvt.u64.u32 %rd{0}, %r1;\n" + load("%r{0}", "%rd{0}") + "st.shared.b32 [%r9], %r{0};\nbar.sync 0;\n"
    code = load("%r1", "%rd1") + "@%p1 bra $L__BB0_2;\n" + side.replace("{0}", "2") + "bra.uni $L__BB0_3;\n"
    code += "$L__BB0_2:\n" + side.replace("{0}", "3") + "$L__BB0_3:\n" + load("%r4", "%rd4")
    assert dependent_loads(code) == 3


def test_the_copies_of_a_loop_start_with_it() -> None:
    copy = "cp.async.cg.shared.global [%r9], [%rd1], 0x10;\ncp.async.commit_group;\n"
    body = "cp.async.wait_group 1;\nbar.sync 0;\nadd.s64 %rd1, %rd1, 64;\n" + copy
    loop = "$L__BB0_1:\n" + body + "setp.lt.s32 %p1, %r3, 9;\n@%p1 bra $L__BB0_1;\n"
    assert dependent_loads(copy + loop) == 1
    assert dependent_loads(copy + loop + load("%r7", "%rd7")) == 2


def wgmma(columns: int, a: str) -> str:
    sums = ",".join(f"%r{number}" for number in range(columns // 2))
    return f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {{{sums}}}, {a}, %rd2, 0, 1, 1, 0, 0;\n"


SHARED, REGISTERS = "%rd1", "{%r1,%r2,%r3,%r4}"


@pytest.mark.parametrize(
    ("code", "stretch"),
    [
        # 64 rows of A are 16 passes. 32 columns of B are 8, and their products 16 cycles; 64 are 16 of 32.
        (wgmma(32, SHARED), 24 / 16),
        (wgmma(64, SHARED), 1.0),
        (wgmma(32, REGISTERS), 1.0),
        (wgmma(8, SHARED), 18 / 4),
        # Attention with heads of 256 and 32 keys: as many products for scores as for outputs.
        (16 * wgmma(32, SHARED) + 2 * wgmma(256, REGISTERS), 1.25),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1}, {%r2}, {%r3}, {%r4};", 1.0),
    ],
)
def test_wgmma_waits_for_operands_in_shared_memory(code: str, stretch: float) -> None:
    assert operand_stretch(code, "sm_90") == pytest.approx(stretch)


def test_products_in_a_loop_stand_for_all() -> None:
    loop = "$L__BB0_1:\n" + wgmma(64, SHARED) + "@%p1 bra $L__BB0_1;\n"
    assert operand_stretch(9 * wgmma(8, SHARED) + loop, "sm_90") == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("rows", "columns", "a", "stretch"),
    [
        (128, 32, "%rd1", 40 / 16),  # 32 passes for A, 8 for B
        (128, 128, "%rd1", 1.0),
        (64, 64, "%rd1", 2.0),
        (128, 32, "[ %r9 + 0 ]", 1.0),  # A in tensor memory
    ],
)
def test_tcgen05_waits_for_operands_in_shared_memory(rows: int, columns: int, a: str, stretch: float) -> None:
    descriptor = rows // 16 << 24 | columns // 8 << 17 | 0x490
    code = f"mov.b32 \t%r7, {descriptor};\n@%p1 tcgen05.mma.cta_group::1.kind::f16 [ %r8 + 0 ], {a}, %rd2, %r7, %p2;"
    assert operand_stretch(code, "sm_100") == pytest.approx(stretch)
