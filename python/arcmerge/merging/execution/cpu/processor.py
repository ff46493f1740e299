"""The arithmetic of a merge on the CPU: reads mapped weights, returns statistics, writes results."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arcmerge import _C
from arcmerge.checkpoint.writer import aligned_buffer
from arcmerge.dtypes import F32, DType
from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution.cpu.masks import MaskStore
from arcmerge.merging.execution.cpu.native import measured, write
from arcmerge.merging.execution.nonfinite import not_finite
from arcmerge.merging.execution.processor import FillTask, Request
from arcmerge.merging.execution.work_units import Piece
from arcmerge.merging.methods.measure import Counts, Gram, Measure, Norms
from arcmerge.merging.methods.rule import Coefficients, Consensus
from arcmerge.merging.plan.tensor_job import Input, Job
from arcmerge.merging.vocabulary.embedding_rows import RowAddresses

# A result in float32 has not been rounded yet: it is rounded once, to the dtype that the file stores.
_UNROUNDED = F32


class CpuProcessor:
    """The Processor of the CPU.

    Args:
        jobs: the jobs of the plan.
        rows: the address of each row, for inputs that are matched by token; by (job index, input index).
        masks: keeps the random masks that are measured for `fill`; None to draw them again.
    """

    def __init__(
        self,
        jobs: tuple[Job, ...],
        rows: Mapping[tuple[int, int], RowAddresses],
        masks: MaskStore | None = None,
    ) -> None:
        self._jobs = jobs
        self._rows = rows
        self._masks = masks
        self._parts: dict[int, list[list[_C.Operand]]] = {}

    @property
    def ahead_bytes(self) -> int:
        """See Processor. The page cache has room for so much."""
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4

    def buffers(self, count: int, nbytes: int) -> list[memoryview]:
        """See Processor.buffers."""
        return [aligned_buffer(nbytes) for _ in range(count)]

    def measure(self, requests: Sequence[Request]) -> list[NDArray[Any] | Counts]:
        """See Processor.measure."""
        return [self._measure(piece, measure) for piece, measure in requests]

    def fill(self, tasks: Sequence[FillTask]) -> list[int]:
        """See Processor.fill."""
        return [self._copy(task) if self._jobs[task.piece.job].copied else self._merge(task) for task in tasks]

    def not_finite(self, job: int) -> ArcmergeError:
        """See Processor.not_finite."""
        return not_finite(self._jobs[job])

    def stage(self, piece: Piece, index: int, address: int) -> None:
        """Write the piece of one input to `address`, cast and with rows matched by token, as the kernels need it."""
        item = self._jobs[piece.job].inputs[index]
        if item.cast is None and (piece.job, index) not in self._rows:
            itemsize = item.dtype.itemsize
            target = (ctypes.c_char * (piece.count * itemsize)).from_address(address)
            item.checkpoint.read_into(item.info.name, piece.first * itemsize, memoryview(target).cast("B"))
        else:
            parts = self._inputs(piece.job)[index]
            _C.combine(address, item.dtype.native, parts, [1.0] * len(parts), piece.first, piece.count)

    def _inputs(self, job: int) -> list[list[_C.Operand]]:
        """The operands of each input of a job, of which an input is the sum. Shards are mapped on first use."""
        if (inputs := self._parts.get(job)) is None:
            inputs = [_operands(item, self._rows.get((job, i))) for i, item in enumerate(self._jobs[job].inputs)]
            self._parts[job] = inputs
        return inputs

    def _operands(self, piece: Piece) -> tuple[list[_C.Operand], list[NDArray[np.uint8]]]:
        """One operand for each input of a piece, and the memory of those inputs that had to be summed first."""
        operands, memory = [], []
        for index, (first, *rest) in enumerate(self._inputs(piece.job)):
            if rest:
                dtype = self._jobs[piece.job].inputs[index].dtype
                rows = self._whole_rows(piece)
                values = np.empty(rows.count * dtype.itemsize, np.uint8)
                self.stage(rows, index, values.ctypes.data)
                # The kernels count elements from the start of the tensor, but `values` starts with the piece.
                operands.append(_C.Operand(values.ctypes.data - rows.first * dtype.itemsize, dtype.native))
                memory.append(values)
            else:
                operands.append(first)
        return operands, memory

    def _whole_rows(self, piece: Piece) -> Piece:
        """The piece with the rest of its first and of its last row, in which random masks rank its elements."""
        row = self._jobs[piece.job].row
        first = piece.first // row * row
        return Piece(piece.job, first, -(-(piece.first + piece.count) // row) * row - first)

    def _measure(self, piece: Piece, measure: Measure) -> NDArray[Any] | Counts:
        job = self._jobs[piece.job]
        operands, _memory = self._operands(piece)
        if isinstance(measure, Gram):
            return self._gram(piece, measure, operands)
        masks = self._masks.new(piece, measure.selection) if self._masks and isinstance(measure, Norms) else []
        return measured(measure, operands, job.base or 0, job.row, piece.first, piece.count, masks)

    def _gram(self, piece: Piece, measure: Gram, operands: list[_C.Operand]) -> NDArray[np.float64]:
        job = self._jobs[piece.job]
        base = operands.pop(job.base) if measure.centered and job.base is not None else None
        k = len(operands)
        if measure.dim is None:
            return np.array(_C.gram(operands, base, piece.first, piece.count)).reshape(k, k)
        rows, columns = job.matrix
        grams = np.empty((rows if measure.dim == 1 else columns, k, k))
        _C.gram_vectors(operands, base, rows, columns, measure.dim, grams.ctypes.data)
        return grams

    def _copy(self, task: FillTask) -> int:
        output = self._jobs[task.piece.job].output
        _copy_bytes(self._jobs[task.piece.job].inputs[0], task.piece, task.address)
        if not output.dtype.mergeable:
            return 0
        return _C.count_nonfinite(_C.Operand(task.address, output.dtype.native), 0, task.piece.count)

    def _merge(self, task: FillTask) -> int:
        job, count = self._jobs[task.piece.job], task.piece.count
        if job.result in (job.output.dtype, _UNROUNDED):
            return self._combine(task, task.address, job.output.dtype)
        # The recipe asks for two roundings: to the dtype of the arithmetic, then to the dtype of the file.
        rounded = np.empty(count * job.result.itemsize, np.uint8)
        self._combine(task, rounded.ctypes.data, job.result)
        operand = _C.Operand(rounded.ctypes.data, job.result.native)
        return _C.combine(task.address, job.output.dtype.native, [operand], [1.0], 0, count)

    def _combine(self, task: FillTask, address: int, dtype: DType) -> int:
        """Write the method's result, rounded once to `dtype`, to `address`; returns the number of non-finite values."""
        job, piece = self._jobs[task.piece.job], task.piece
        operands, _memory = self._operands(piece)
        rule = task.rule
        if rule is None:
            raise AssertionError(f"{job.output.name} is filled before its rule is known")
        if not isinstance(rule, Coefficients):
            base, row, start = job.base or 0, job.row, address - piece.first * dtype.itemsize
            if self._masks is None or not isinstance(rule, Consensus):
                return write(rule, address, dtype.native, operands, base, row, piece.first, piece.count)
            return sum(
                write(
                    rule,
                    start + part.first * dtype.itemsize,
                    dtype.native,
                    operands,
                    base,
                    row,
                    part.first,
                    part.count,
                    part.masks,
                )
                for part in self._masks.parts(piece, rule.selection)
            )
        values = rule.values
        if values.ndim == 1:
            return _C.combine(address, dtype.native, operands, values.tolist(), piece.first, piece.count)
        vectors = np.ascontiguousarray(values, np.float32)
        _, columns = job.matrix
        dim = job.along if job.along is not None else 1
        return _C.combine_vectors(
            address, dtype.native, operands, vectors.ctypes.data, piece.first, piece.count, columns, dim
        )


def _copy_bytes(item: Input, piece: Piece, address: int) -> None:
    itemsize = item.info.dtype.itemsize
    _C.copy(address, item.checkpoint.address(item.info.name) + piece.first * itemsize, piece.count * itemsize)


def _operands(item: Input, rows: RowAddresses | None) -> list[_C.Operand]:
    cast = item.cast.native if item.cast is not None else -1
    if rows is None:
        return [_C.Operand(item.checkpoint.address(item.info.name), item.info.dtype.native, cast)]
    return [_C.Operand(0, part.dtype.native, cast, part.addresses.ctypes.data, part.columns) for part in rows.parts]
