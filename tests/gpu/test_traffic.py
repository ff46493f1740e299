"""Traffic counts bytes and finds faults: every expected count is made by hand, every fault is planted."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from emulation.traffic import Fault, Traffic

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on the GPU")


@triton.jit
def _copy(x_ptr, out_ptr, n, stride, shift, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets * stride + shift, mask=offsets < n, other=0.0)
    tl.store(out_ptr + offsets, x, mask=offsets < n)


def copy(x: Tensor, out: Tensor, n: int, stride: int = 1, shift: int = 0) -> None:
    _copy[(triton.cdiv(n, 64),)](x, out, n, stride, shift, BLOCK=64)


@triton.jit
def _three_points(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = (offsets > 0) & (offsets < n - 1)
    left, right = tl.load(x_ptr + offsets - 1, mask=inside), tl.load(x_ptr + offsets + 1, mask=inside)
    tl.store(out_ptr + offsets, left + tl.load(x_ptr + offsets, mask=inside) + right, mask=inside)


def test_masked_lanes_count_nothing_and_shared_bytes_once() -> None:
    x, out = torch.randn(1000), torch.empty(1000)
    with Traffic() as traffic:
        _three_points[(8,)](x, out, 1000, BLOCK=128)
    assert (traffic.loaded, traffic.stored) == (4 * 1000, 4 * 998)
    assert (traffic.requested_loaded, traffic.requested_stored) == (3 * 4 * 998, 4 * 998)


def test_launches_are_recorded_one_by_one() -> None:
    x, out = torch.randn(100).to(torch.bfloat16), torch.empty(100)
    with Traffic() as traffic:
        copy(x, out, 100)
        copy(x, out, 10)
        copy(x, out, 0)
        copy(out, out, 3)
    assert [(launch.kernel, launch.programs) for launch in traffic.kernels] == [
        ("_copy", 2),
        ("_copy", 1),
        ("_copy", 0),
        ("_copy", 1),
    ]
    assert [(launch.loaded, launch.stored) for launch in traffic.kernels] == [(200, 400), (20, 40), (0, 0), (12, 12)]
    assert (traffic.loaded, traffic.stored, traffic.launches, traffic.atomics) == (232, 452, 4, 0)


def test_nothing_is_counted_outside() -> None:
    x, out = torch.randn(64), torch.empty(64)
    with Traffic() as traffic:
        pass
    copy(x, out, 64)
    assert traffic.launches == 0
    assert torch.equal(out, x)


@triton.jit
def _sum_tiles(x_ptr, out_ptr, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    tl.atomic_add(out_ptr + row, tl.sum(tl.load(x_ptr + row[:, None] * stride + column[None, :]), axis=1))


def test_tiles_and_atomics() -> None:
    qkv, out = torch.randn(32, 96), torch.zeros(32)
    with Traffic() as traffic:
        _sum_tiles[(4, 2)](qkv[:, 32:64], out, 96, ROWS=8, COLUMNS=16)
    torch.testing.assert_close(out, qkv[:, 32:64].sum(1))
    assert (traffic.loaded, traffic.stored, traffic.atomics) == (4 * 32 * 32, 0, 2 * 32)
    message = r"256 lanes .* byte 128 of 'x_ptr', which spans 12032 bytes and has 4096"
    with Traffic(), pytest.raises(Fault, match=message):
        _sum_tiles[(1, 1)](qkv[:, 32:64], out, 96, ROWS=8, COLUMNS=64)


@triton.jit
def _lock(lock_ptr, count_ptr):
    while tl.atomic_cas(lock_ptr, 0, 1) == 1:
        pass
    tl.atomic_add(count_ptr, 1)
    tl.atomic_xchg(lock_ptr, 0)


def test_compare_and_swap_is_an_atomic() -> None:
    lock, count = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    with Traffic() as traffic:
        _lock[(5,)](lock, count)
    assert count.item() == 5
    assert traffic.atomics == 15
    with Traffic(), pytest.raises(Fault, match="atomic by program"):
        _lock[(1,)](lock[:0], count)


@triton.jit
def _copy_tile(source, target, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0) * ROWS, tl.program_id(1) * COLUMNS
    target.store([row, column], source.load([row, column]))


@triton.jit
def _copy_described(x_ptr, out_ptr, M, N, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    source = tl.make_tensor_descriptor(x_ptr, [M, N], [N, 1], [ROWS, COLUMNS])
    target = tl.make_tensor_descriptor(out_ptr, [M, N], [N, 1], [ROWS, COLUMNS])
    _copy_tile(source, target, ROWS, COLUMNS)


def test_descriptors_count_what_lies_inside() -> None:
    x = torch.randn(21, 40).to(torch.bfloat16)
    out = torch.empty_like(x)
    with Traffic() as traffic:
        _copy_described[(2, 2)](x, out, 21, 40, ROWS=16, COLUMNS=32)
        _copy_tile[(2, 2)](*(TensorDescriptor.from_tensor(each, [16, 32]) for each in (x, out)), ROWS=16, COLUMNS=32)
    assert [(launch.loaded, launch.stored) for launch in traffic.kernels] == 2 * [(2 * 21 * 40, 2 * 21 * 40)]
    with Traffic(), pytest.raises(Fault, match=r"store by program \(1, 0, 0\) .* byte 1680 of 'out_ptr'"):
        _copy_described[(2, 2)](torch.randn(22, 40).to(torch.bfloat16), out, 22, 40, ROWS=16, COLUMNS=32)


@triton.jit
def _copy_from_table(table_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x_ptr = tl.load(table_ptr + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    x = tl.load(x_ptr + offsets, mask=offsets < n)
    tl.store(out_ptr + tl.program_id(0) * n + offsets, x, mask=offsets < n)


def test_tensors_of_a_table_are_named_by_number() -> None:
    # Views of one buffer, far apart, for neighbours in memory look like one tensor.
    buffer = torch.randn(1000)
    tensors = [buffer[100:105], buffer[500:505], buffer[900:904]]
    table = torch.tensor([tensor.data_ptr() for tensor in tensors])
    out = torch.empty(15)
    with Traffic(*tensors) as traffic:
        _copy_from_table[(2,)](table, out, 5, BLOCK=8)
    assert (traffic.loaded, traffic.stored) == (2 * 8 + 2 * 20, 2 * 20)
    message = (
        r"load by program \(2, 0, 0\) of _copy_from_table: 1 lanes outside every tensor, "
        r"the first at byte 16 of table tensor #2, which spans 16 bytes and has 16 \(4 bytes\)"
    )
    with Traffic(*tensors), pytest.raises(Fault, match=message):
        _copy_from_table[(3,)](table, out, 5, BLOCK=8)


BUFFER = torch.arange(4096, dtype=torch.float32)
ROWS = BUFFER.view(64, 64)[1:9, :48]
FAULTS = {
    "one past the end": (
        BUFFER[64:164],
        101,
        1,
        0,
        r"load by program \(1, 0, 0\) of _copy: 1 lanes .* byte 400 of 'x_p",
    ),
    "one before the start": (BUFFER[64:164], 64, 1, -1, r"program \(0, 0, 0\) .* 1 lanes .* byte -4 of 'x_ptr'"),
    "every other element": (BUFFER[64:264:2], 64, 2, 1, r"64 lanes .* byte 4 of 'x_ptr', .* 796 bytes and has 400"),
    "gap between rows": (ROWS, 50, 1, 0, r"2 lanes .* byte 192 of 'x_ptr', which spans 1984 bytes and has 1536"),
    "row after the last": (ROWS, 9, 64, 0, r"1 lanes .* byte 2048 of 'x_ptr'"),
    "wild": (BUFFER[:1], 1, 1, 1 << 40, "1 lanes"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_access_outside_is_seen(name: str) -> None:
    x, n, stride, shift, message = FAULTS[name]
    with Traffic(), pytest.raises(Fault, match=message):
        copy(x, torch.empty(200), n, stride, shift)


@triton.jit
def _gather(x_ptr, place_ptr, out_ptr, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    place = tl.load(place_ptr + lane, mask=lane < n, other=0)
    tl.store(out_ptr + lane, tl.load(x_ptr + place, mask=lane < n), mask=lane < n)


CUBE = BUFFER.view(16, 16, 16)
VIEWS = {
    "every other element": BUFFER[64:264:2],
    "column": BUFFER.view(512, 8)[3:30:3, 5],
    "columns of some rows": ROWS,
    "transposed": ROWS.t(),
    "expanded": BUFFER[5:6].expand(70),
    "overlapping windows": BUFFER[8:40].unfold(0, 8, 3),
    "three strides": CUBE.permute(1, 2, 0)[2:9, 1::5, 3:6],
}


@pytest.mark.parametrize("name", VIEWS)
def test_strided_tensors_have_their_elements_and_nothing_else(name: str) -> None:
    x = VIEWS[name]
    # The value of an element is its index in the buffer.
    own = x.unique().int() - x.storage_offset()
    out = torch.empty(len(own))
    with Traffic() as traffic:
        _gather[(1,)](x, own, out, len(own), BLOCK=512)
    assert torch.equal(out, x.unique())
    assert traffic.kernels[0].loaded == 4 * len(own) + own.numel() * 4
    for place in set(range(-1, int(own.max()) + 2)) - set(own.tolist()):
        with Traffic(), pytest.raises(Fault, match=f"1 lanes .* byte {4 * place} of 'x_ptr'"):
            _gather[(1,)](x, torch.tensor([place], dtype=torch.int32), out, 1, BLOCK=1)


@triton.jit
def _store_apart(out_ptr, distance, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * distance + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.full((BLOCK,), 1.0, tl.float32))
    tl.store(out_ptr + offsets, tl.full((BLOCK,), 2.0, tl.float32))  # twice, but by one program


def test_two_writers_of_one_address_are_seen() -> None:
    out = torch.empty(64)
    with Traffic() as traffic:
        _store_apart[(4,)](out, 16, BLOCK=16)
    assert (traffic.stored, traffic.requested_stored) == (256, 512)
    message = r"_store_apart: programs \(0, 0, 0\) and \(1, 0, 0\) both store byte 60 of 'out_ptr'"
    with Traffic(), pytest.raises(Fault, match=message):
        _store_apart[(4,)](out, 15, BLOCK=16)


@triton.jit
def _failing(out_ptr):
    tl.store(out_ptr, tl.nothing(1))


def test_kernels_that_fail_otherwise_raise_what_they_raise() -> None:
    with Traffic(), pytest.raises(InterpreterError, match="has no attribute 'nothing'"):
        _failing[(1,)](torch.empty(1))


@triton.jit
def _last_program(
    x_ptr, partial_ptr, done_ptr, out_ptr, BLOCK: tl.constexpr, ORDER: tl.constexpr, BARRIER: tl.constexpr
):
    column = tl.arange(0, BLOCK)
    tl.store(partial_ptr + tl.program_id(0) * BLOCK + column, tl.load(x_ptr + column) * tl.program_id(0))
    if BARRIER:
        tl.debug_barrier()
    programs = tl.num_programs(0)
    if tl.atomic_add(done_ptr, 1, sem=ORDER) == programs - 1:
        total = tl.zeros((BLOCK,), tl.float32)
        for program in range(programs):
            total += tl.load(partial_ptr + program * BLOCK + column)
        tl.store(out_ptr + column, total)


@pytest.mark.parametrize(
    ("order", "barrier", "right"),
    [
        ("acq_rel", True, True),
        ("acq_rel", False, False),
        ("relaxed", True, False),
        ("acquire", True, False),
        ("release", True, False),
    ],
)
def test_a_program_reads_what_another_one_released_and_it_acquired(order: str, barrier: bool, right: bool) -> None:
    x, out = torch.randn(64), torch.empty(64)
    partial, done = torch.empty(4, 64), torch.zeros(1, dtype=torch.int32)
    if right:
        with Traffic():
            _last_program[(4,)](x, partial, done, out, BLOCK=64, ORDER=order, BARRIER=barrier)
        assert torch.equal(out, x * 6)
        return
    with Traffic(), pytest.raises(Fault, match=r"program \(3, 0, 0\) reads what \(0, 0, 0\) stored, .* near byte 0 of"):
        _last_program[(4,)](x, partial, done, out, BLOCK=64, ORDER=order, BARRIER=barrier)


@triton.jit
def _copy_runs(x_ptr, out_ptr, shift, stride, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    pointers = tl.max_contiguous(tl.multiple_of(x_ptr + shift + offsets * stride, 16), 4)
    tl.store(out_ptr + offsets, tl.load(pointers))


def test_promises_of_alignment_are_kept() -> None:
    x, out = torch.randn(128), torch.empty(32)
    assert x.data_ptr() % 16 == 0
    with Traffic():
        _copy_runs[(1,)](x, out, 4, 1, BLOCK=32)
    assert torch.equal(out, x[4:36])
    for shift, stride in ((2, 1), (0, 2)):
        with Traffic(), pytest.raises(Fault, match="_copy_runs: not runs of 4, aligned to 16, as promised"):
            _copy_runs[(1,)](x, out, shift, stride, BLOCK=32)
