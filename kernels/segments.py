"""Segments: one launch for many tensors, of any length and alignment.

The tensors of a call are cut into segments of at most SEGMENT elements; every program of the launch computes one. A
table on the GPU has a row of int64 for each segment:

    address of each operand | elements | vector | first

The operands of a group are its inputs, in order, then its output or its base. A vector has its own Gram matrix or row
of coefficients: it is a whole group, or one of the rows of equal length that its tensors consist of. A segment never
crosses vectors; `first` is the index of its first element in its vector, a multiple of SEGMENT. SEGMENT bounds the
work of a program, so that large and small tensors fill the GPU evenly, and keeps the table small: 48 bytes for the
65,536 bytes of a segment of a bf16 pair.

A segment whose operands all start at multiples of 16 bytes is read and written 16 bytes at a time, except for its last
partial tile; any other segment element by element.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SEGMENT = 16384
_ROWS = 1024  # of a table that a program makes
DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


class Launch(NamedTuple):
    """The arguments of one launch: the groups of one combination of dtypes, cut into segments.

    Args:
        dtypes: of the operands, in order.
        table: [segments, operands + 3] int64, rows as above.
        runs: [vectors, 3] int64, the rows at any distance: the first segment of a vector, one past its last, and the
            index of the vector.
    """

    dtypes: tuple[tl.dtype, ...]
    table: Tensor
    runs: Tensor


def launches(groups: Sequence[Sequence[Tensor]], rows: int = 1, *, interleaved: bool = False) -> Iterator[Launch]:
    """One launch for each combination of dtypes among the groups; a checkpoint mostly has one.

    Args:
        groups: operands of one length, contiguous, on one device.
        rows: how many vectors of equal length follow one another in each tensor. Vector v of group g has the index
            g * rows + v.
        interleaved: order segments by their first elements, so that groups with a tensor in common read it at about
            the same time, from memory once. `runs` then means nothing.
    """
    for dtypes, indices in _alike(groups).items():
        table, runs = _cut([groups[index] for index in indices], torch.tensor(indices), rows)
        if interleaved:
            table = table[table[:, -1].argsort(stable=True)]
        device = groups[0][0].device
        yield Launch(tuple(DTYPES[dtype] for dtype in dtypes), _to_device(table, device), _to_device(runs, device))


def tabulated(groups: Sequence[Sequence[Tensor]], origin: Tensor) -> Iterator[Launch]:
    """The same with tables that the GPU makes, by a launch each, from a row a group.

    The rows, 7 int64 for three operands, are copied from pinned memory. So nothing waits, and a graph can capture it:
    the host's allocator of torch 2.11 and newer keeps pinned memory that a captured copy reads.

    Args:
        groups: as in `launches`. Every group is one vector, with its index.
        origin: any tensor in the memory of the last operands. They may be far from one another.
    """
    for dtypes, indices in _alike(groups).items():
        rows, first = [], 0
        for index in indices:
            *others, last = groups[index]
            addresses = [*(operand.data_ptr() for operand in others), last.data_ptr() - origin.data_ptr()]
            end = first + max(1, -(-last.numel() // SEGMENT))
            rows.append([*addresses, last.numel(), first, end, index])
            first = end
        of_groups = _to_device(torch.tensor(rows), origin.device)
        table = torch.empty((first, len(dtypes) + 3), dtype=torch.int64, device=origin.device)
        _table_kernel[(triton.cdiv(first, _ROWS),)](
            table,
            of_groups,
            origin,
            len(rows),
            first,
            OPERANDS=len(dtypes),
            SIZES=tuple(dtype.itemsize for dtype in dtypes),
            STEPS=len(rows).bit_length(),
            SEGMENT=SEGMENT,
            ROWS=_ROWS,
            num_warps=4,
        )
        yield Launch(tuple(DTYPES[dtype] for dtype in dtypes), table, of_groups[:, -3:])


def _alike(groups: Sequence[Sequence[Tensor]]) -> dict[tuple[torch.dtype, ...], list[int]]:
    """The indices of the groups of each combination of dtypes."""
    alike: dict[tuple[torch.dtype, ...], list[int]] = {}
    for index, group in enumerate(groups):
        alike.setdefault(tuple(operand.dtype for operand in group), []).append(index)
    return alike


@triton.jit(do_not_specialize=["groups", "segments"])
def _table_kernel(
    table_ptr,
    rows_ptr,
    origin_ptr,
    groups,
    segments,
    OPERANDS: tl.constexpr,
    SIZES: tl.constexpr,
    STEPS: tl.constexpr,
    SEGMENT: tl.constexpr,
    ROWS: tl.constexpr,
):
    WIDTH: tl.constexpr = OPERANDS + 4
    segment = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = segment < segments
    # The group of a segment is the last that starts at it or before, by bisection.
    group = tl.zeros((ROWS,), tl.int64)
    for step in tl.static_range(STEPS):
        probe = group + (1 << (STEPS - 1 - step))
        starts = tl.load(rows_ptr + probe * WIDTH + OPERANDS + 1, mask=probe < groups, other=0)
        group = tl.where((probe < groups) & (starts <= segment), probe, group)
    rows_ptr += group * WIDTH
    first = (segment - tl.load(rows_ptr + OPERANDS + 1)) * SEGMENT
    table_ptr += segment * (OPERANDS + 3)
    for operand in tl.static_range(OPERANDS):
        address = tl.load(rows_ptr + operand) + first * SIZES[operand]
        if operand == OPERANDS - 1:
            address += origin_ptr.to(tl.int64)
        tl.store(table_ptr + operand, address, mask=inside)
    tl.store(table_ptr + OPERANDS, tl.minimum(tl.load(rows_ptr + OPERANDS) - first, SEGMENT), mask=inside)
    tl.store(table_ptr + OPERANDS + 1, tl.load(rows_ptr + OPERANDS + 3), mask=inside)
    tl.store(table_ptr + OPERANDS + 2, first, mask=inside)


def _cut(groups: Sequence[Sequence[Tensor]], indices: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    addresses = torch.tensor([[operand.data_ptr() for operand in group] for group in groups])
    itemsizes = torch.tensor([operand.element_size() for operand in groups[0]])
    counts = torch.tensor([group[0].numel() // rows for group in groups])

    row = torch.arange(rows)
    addresses = (addresses[:, None] + (row * counts[:, None])[:, :, None] * itemsizes).flatten(0, 1)
    counts = counts.repeat_interleave(rows)
    vectors = (indices[:, None] * rows + row).flatten()

    # An empty vector has one segment of no elements, so that its Gram matrix is written: zero.
    pieces = ((counts + SEGMENT - 1) // SEGMENT).clamp(min=1)
    last = pieces.cumsum(0)
    first = last - pieces
    owner = torch.arange(len(pieces)).repeat_interleave(pieces)
    start = (torch.arange(len(owner)) - first[owner]) * SEGMENT
    left = (counts[owner] - start).clamp(max=SEGMENT)
    columns = [addresses[owner] + start[:, None] * itemsizes, left[:, None], vectors[owner, None], start[:, None]]
    table = torch.cat(columns, dim=1)
    return table, torch.stack([first, last, vectors], dim=1)


def _to_device(table: Tensor, device: torch.device) -> Tensor:
    # A copy from pageable memory would wait for the stream.
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


@triton.jit
def read_row(row_ptr, OPERANDS: tl.constexpr, TILE: tl.constexpr):
    """A row of the table: (addresses, elements, elements to move 16 bytes at a time, vector)."""
    addresses = ()
    misaligned = 0
    for operand in tl.static_range(OPERANDS):
        address = tl.load(row_ptr + operand)
        addresses += (address,)
        misaligned |= address % 16
    count = tl.load(row_ptr + OPERANDS).to(tl.int32)
    vectored = tl.where(misaligned == 0, count // TILE * TILE, 0)
    return addresses, count, vectored, tl.load(row_ptr + OPERANDS + 1)


@triton.jit
def read_first(row_ptr, OPERANDS: tl.constexpr):
    """The index of the segment's first element in its vector."""
    return tl.load(row_ptr + OPERANDS + 2)


@triton.jit
def _pointers(address, offsets, DTYPE: tl.constexpr, VECTORED: tl.constexpr):
    pointers = address.to(tl.pointer_type(DTYPE)) + offsets
    if VECTORED:
        # The compiler does not know the alignment of an address from a table; without these hints every element is a
        # request of its own.
        pointers = tl.max_contiguous(tl.multiple_of(pointers, 16), 8)
    return pointers


@triton.jit
def load(address, offsets, count, DTYPE: tl.constexpr, VECTORED: tl.constexpr):
    """Elements at `offsets` as float32, which is exact; zero past `count`."""
    pointers = _pointers(address, offsets, DTYPE, VECTORED)
    if VECTORED:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=offsets < count, other=0.0)
    return values.to(tl.float32)


@triton.jit
def store(address, offsets, count, values, DTYPE: tl.constexpr, VECTORED: tl.constexpr):
    """Round float32 `values` to nearest even and write those before `count`; returns 1 for each that is not finite."""
    pointers = _pointers(address, offsets, DTYPE, VECTORED)
    rounded = values.to(DTYPE)
    # A comparison with NaN is false.
    nonfinite = (tl.abs(rounded.to(tl.float32)) < float("inf")) == 0
    if VECTORED:
        tl.store(pointers, rounded)
    else:
        tl.store(pointers, rounded, mask=offsets < count)
        nonfinite = nonfinite & (offsets < count)
    return nonfinite.to(tl.int32)
