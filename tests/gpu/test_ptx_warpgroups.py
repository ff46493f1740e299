"""The emulator of PTX: products of warpgroups, of matrices that are laid out by other formulas, and their rules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from emulation.ptx.formats import Array
from emulation.ptx.program import Fault, Unsupported
from ptx_programs import run

SHARED = 32768
SWIZZLES = {16: 0, 128: 1, 64: 2, 32: 3}
# Where the operands lie, and the offsets between their patterns, of eight rows of 16 to 128 bytes, which leave gaps.
A_START, B_START, LEADING = 0, 16384, 4096
STRIDES = {16: 512, 32: 512, 64: 1024, 128: 1024}


def place(row: int, byte: int, width: int) -> int:
    """Byte `byte` of a row, of patterns of eight rows of `width` bytes, whose units change places: the row is xored."""
    unit = byte % width // 16 ^ row % 8 * width // 128 if width > 16 else 0
    return row % 8 * width + unit * 16 + byte % 16


def laid_out(image: Array, start: int, values: Array, width: int, transposed: bool, skipped: int) -> int:
    """Write values [rows, 16] of two bytes to an image of shared memory; the descriptor.

    skipped: bytes of other columns that precede these in a row of the pattern.
    """
    stride = STRIDES[width]
    codes = values.astype(np.float16).view(np.uint16)
    for row, column in np.ndindex(codes.shape):
        if transposed and width == 16:  # eight rows of one column lie together
            at = row // 8 * stride + column // 8 * LEADING + place(column, 2 * (row % 8), 16)
        elif transposed:
            at = 2 * row // width * LEADING + column // 8 * stride + place(column, 2 * row, width)
        elif width == 16:
            at = row // 8 * stride + column // 8 * LEADING + place(row, 2 * column, 16)
        else:
            at = row // 8 * stride + place(row, 2 * column + skipped, width)
        image[start + at : start + at + 2].view(np.uint16)[0] = codes[row, column]
    first = start + (0 if transposed or width == 16 else skipped)
    return first // 16 | LEADING // 16 << 16 | stride // 16 << 32 | SWIZZLES[width] << 62


COPY = "".join(
    f"mad.wide.u32 %d9, %r0, 16, %d0; ld.global.v4.b32 {{%r1, %r2, %r3, %r4}}, [%d9+{at}];"
    f"shl.b32 %r5, %r0, 4; st.shared.v4.b32 [%r5+{at}], {{%r1, %r2, %r3, %r4}};"
    for at in range(0, SHARED, 128 * 16)
)
READY = "bar.sync 0; fence.proxy.async.shared::cta; wgmma.fence.sync.aligned;"
DONE = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"


def registers(first: int, count: int) -> str:
    return "{" + ",".join(f"%f{i}" for i in range(first, first + count)) + "}"


def stored(columns: int, first: int = 0) -> str:
    """Write the registers of a thread, one after another, to %d1."""
    body = f"mad.wide.u32 %d9, %r0, {2 * columns}, %d1;"
    return body + "".join(f"st.global.b32 [%d9+{4 * i}], %f{first + i};" for i in range(columns // 2))


def product(columns: int, a: str = "%d10", more: str = "%p1, 1, 1, 0, 0", first: int = 0) -> str:
    d = registers(first, columns // 2)
    return f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.f16.f16 {d}, {a}, %d11, {more};"


def execute(body: str, image: Array, out: Array, descriptors: tuple[int, int] = (0, 0), threads: int = 128) -> None:
    first, second = (f"mov.b64 %d1{i}, {value:#x};" for i, value in enumerate(descriptors))
    start = "mov.pred %p1, -1;" + "".join(f"mov.b32 %f{i}, 0f3F800000;" for i in range(out.size // 128))
    run(f".reg .f32 %f<160>; {first}{second}{start}{COPY if threads == 128 else ''}{body}", image, out, threads=threads,
        shared=SHARED)  # fmt: skip


def matrix_of(out: Array, columns: int) -> Array:
    """[64, columns] from the registers of each thread [128, columns / 2], element by element."""
    values = out.reshape(128, columns // 2)
    matrix = np.zeros((64, columns), np.float32)
    for thread, register in np.ndindex(values.shape):
        row = thread // 32 * 16 + thread % 32 // 4 + (8 if register % 4 >= 2 else 0)
        matrix[row, register // 4 * 8 + thread % 4 * 2 + register % 2] = values[thread, register]
    return matrix


def operands(columns: int) -> tuple[Array, Array]:
    generator = np.random.default_rng(columns)
    return generator.integers(-8, 8, (64, 16)), generator.integers(-8, 8, (columns, 16))


@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize("widths", [(16, 16), (32, 128), (64, 32), (128, 64)], ids=str)
def test_every_layout_in_shared_memory(widths: tuple[int, int], transposed: tuple[bool, bool]) -> None:
    columns = 40
    a, b = operands(columns)
    image, out = np.zeros(SHARED, np.uint8), np.zeros((128, columns // 2), np.float32)
    skipped = [width // 2 if width > 32 else 0 for width in widths]
    first = laid_out(image, A_START, a, widths[0], transposed[0], skipped[0])
    second = laid_out(image, B_START, b, widths[1], transposed[1], skipped[1])
    more = f"%p1, 1, 1, {int(transposed[0])}, {int(transposed[1])}"
    execute(f"{READY}{product(columns, more=more)}{DONE}{stored(columns)}", image, out, (first, second))
    np.testing.assert_array_equal(matrix_of(out, columns), a @ b.T + 1)


@pytest.mark.parametrize("columns", [8, 32, 64, 128, 256])
def test_an_operand_in_registers_and_every_width(columns: int) -> None:
    """The fragment of each thread: rows l / 4 and 8 more, columns 2 (l % 4) and one more, then 8 more."""
    a, b = operands(columns)
    image, out = np.zeros(SHARED, np.uint8), np.zeros((128, columns // 2), np.float32)
    descriptor = laid_out(image, B_START, b, 32, False, 0)
    lanes = np.arange(128)
    row, column = lanes // 32 * 16 + lanes % 32 // 4, lanes % 4 * 2
    fragment = [a[row + 8 * (i % 2), column + 8 * (i // 2) + c] for i in range(4) for c in range(2)]
    image[A_START : A_START + 2048].view(np.float16)[:] = np.stack(fragment, 1).reshape(-1)
    body = f"shl.b32 %r5, %r0, 4; bar.sync 0; ld.shared.v4.b32 {{%r10, %r11, %r12, %r13}}, [%r5+{A_START}]; {READY}"
    body += product(columns, "{%r10, %r11, %r12, %r13}", "0, 1, -1, 0") + DONE + stored(columns)
    execute(body, image, out, (0, descriptor))
    # The result is not added to what the registers held, and b is negated.
    np.testing.assert_array_equal(matrix_of(out, columns), -(a @ b.T))


def prepared() -> tuple[Array, Array, tuple[int, int], Array]:
    a, b = operands(16)
    image, out = np.zeros(SHARED, np.uint8), np.zeros((128, 8), np.float32)
    descriptors = laid_out(image, A_START, a, 32, False, 0), laid_out(image, B_START, b, 128, False, 0)
    return image, out, descriptors, a @ b.T


def test_products_add_up_and_groups_land_in_order() -> None:
    image, out, descriptors, exact = prepared()
    body = f"{READY}{product(16)}{product(16)} wgmma.commit_group.sync.aligned; {product(16, first=16)}"
    body += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1;"
    # wgmma.fence of registers that a product uses is no access to them.
    execute(f"{body} wgmma.fence.sync.aligned; {stored(16)}", image, out, descriptors)
    np.testing.assert_array_equal(matrix_of(out, 16), 2 * exact + 1)
    with pytest.raises(Fault, match=r"%f16\.\.\. accessed while a product uses it"):
        execute(body + stored(16, first=16), image, out, descriptors)


FENCE, PROXY, COMMIT = "wgmma.fence.sync.aligned;", "fence.proxy.async.shared::cta;", "wgmma.commit_group.sync.aligned;"
WAIT, PRODUCT = "wgmma.wait_group.sync.aligned 0;", product(16)
STORE = "st.shared.b32 [16384], %r0;"
FIRST_WARP = "setp.lt.u32 %p2, %r0, 32;"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (f"bar.sync 0; {PROXY} {FENCE} {PRODUCT} {DONE}", None),
        (f"{PROXY} bar.sync 0; {FENCE} {PRODUCT} {DONE}", None),
        (f"bar.sync 0; {FENCE} {PRODUCT} {DONE}", "without fence.proxy.async"),
        (f"bar.sync 0; {PROXY} bar.sync 0; {STORE} bar.sync 0; {FENCE} {PRODUCT} {DONE}", "without fence.proxy.async"),
        (f"bar.sync 0; {FIRST_WARP} @%p2 {PROXY} {FENCE} {PRODUCT} {DONE}", "without fence.proxy.async"),
        (f"bar.sync 0; {FIRST_WARP} @%p2 {PROXY} bar.sync 0; {FENCE} {PRODUCT} {DONE}", None),
        # A fence before the barrier is for the writes of its own warp only.
        (f"{FIRST_WARP} @%p2 {PROXY} bar.sync 0; {FENCE} {PRODUCT} {DONE}", "without fence.proxy.async"),
        (f"{PROXY} {FENCE} {PRODUCT} {DONE}", "read by a product before a barrier"),
        (f"bar.sync 0; {PROXY} {PRODUCT} {DONE}", "without wgmma.fence"),
        (f"bar.sync 0; {PROXY} {FENCE} mov.b32 %f3, 0; {PRODUCT} {DONE}", "without wgmma.fence"),
        (f"{READY} {PRODUCT} {COMMIT} mov.b32 %r1, %f3;", "wgmma.wait_group is missing"),
        (f"{READY} {PRODUCT} {COMMIT} mov.b32 %f3, %r1;", "wgmma.wait_group is missing"),
        (f"{READY} {PRODUCT} {WAIT} mov.b32 %r1, %f3;", "wgmma.wait_group is missing"),  # not committed
        (f"{READY} {PRODUCT} {COMMIT} bar.sync 0; {STORE}", "written while a product reads it"),
        (f"{READY} {PRODUCT} {COMMIT} bar.sync 0; cp.async.ca.shared.global [16384], [%d0], 4;", "while a product"),
        (f"{READY} {PRODUCT} {COMMIT} bar.sync 0; atom.shared.add.u32 %r1, [16384], 1;", "written while a product"),
        (f"{READY} {PRODUCT} {DONE} {FIRST_WARP} @%p2 {STORE}", "before a barrier after the read"),
        (f"{READY} {PRODUCT} {DONE} bar.sync 0; {FIRST_WARP} @%p2 {STORE}", None),
        (f"{READY} cp.async.ca.shared.global [16384], [%d0], 4; {PRODUCT}", "a wait is missing"),
        (f"{READY} cvt.u64.u32 %d12, %r0; add.s64 %d10, %d10, %d12; {PRODUCT}", "different descriptors"),
        (f"{READY} mov.b64 %d11, 0x3FF; {PRODUCT}", None),
        (f"{READY} mov.b64 %d11, 0x7FF; {PRODUCT}", "shared memory, which has 32768"),
        (f"{READY} setp.lt.u32 %p2, %r0, 96; @%p2 {PRODUCT}", "a whole warpgroup"),
    ],
)  # fmt: skip
def test_rules(body: str, message: str | None) -> None:
    image, out, descriptors, _ = prepared()
    if message is None:
        execute(body, image, out, descriptors)
        return
    with pytest.raises(Fault, match=message):
        execute(body, image, out, descriptors)


@pytest.mark.parametrize(
    ("body", "threads", "message"),
    [
        (product(16), 64, "a block of 64 threads"),
        (product(12), 128, "m64n12k16"),
        (product(16).replace("f16.f16", "e4m3.e4m3"), 128, "e4m3"),
        (product(16).replace("f32", "f16"), 128, "f16.f16.f16"),
        (product(16) + product(16, first=4), 128, "register %f4 in two fragments"),
    ],
)
def test_what_is_not_emulated_is_named(body: str, threads: int, message: str) -> None:
    arrays: list[Any] = [np.zeros(SHARED, np.uint8), np.zeros((128, 8), np.float32)]
    with pytest.raises(Unsupported, match=message):
        execute(body, *arrays, threads=threads)
