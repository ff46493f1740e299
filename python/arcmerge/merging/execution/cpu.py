"""The arithmetic of a merge on the CPU: reads mapped weights, returns Gram matrices, writes results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from arcmerge import _C
from arcmerge.dtypes import F32, DType
from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution.nonfinite import not_finite
from arcmerge.merging.execution.processor import FillTask
from arcmerge.merging.execution.work_units import Piece
from arcmerge.merging.plan.tensor_job import Input, Job
from arcmerge.merging.vocabulary.embedding_rows import RowAddresses

# A result in float32 has not been rounded yet: it is rounded once, to the dtype that the file stores.
_UNROUNDED = F32


class CpuProcessor:
    """The Processor of the CPU.

    Args:
        jobs: the jobs of the plan.
        rows: the address of each row, for inputs that are matched by token; by (job index, input index).
    """

    def __init__(self, jobs: tuple[Job, ...], rows: Mapping[tuple[int, int], RowAddresses]) -> None:
        self._jobs = jobs
        self._rows = rows
        self._parts: dict[int, list[list[_C.Operand]]] = {}

    def gram(self, pieces: Sequence[Piece]) -> list[NDArray[np.float64]]:
        """See Processor.gram."""
        return [self._gram(piece) for piece in pieces]

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
            _copy_bytes(item, piece, address)
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
                values = np.empty(piece.count * dtype.itemsize, np.uint8)
                self.stage(piece, index, values.ctypes.data)
                # The kernels count elements from the start of the tensor, but `values` starts with the piece.
                operands.append(_C.Operand(values.ctypes.data - piece.first * dtype.itemsize, dtype.native))
                memory.append(values)
            else:
                operands.append(first)
        return operands, memory

    def _gram(self, piece: Piece) -> NDArray[np.float64]:
        job = self._jobs[piece.job]
        operands, _memory = self._operands(piece)
        base = None
        if job.method.centered(job.values) and job.base is not None:
            base = operands.pop(job.base)
        k = len(operands)
        if job.along is None:
            return np.array(_C.gram(operands, base, piece.first, piece.count)).reshape(k, k)
        rows, columns = job.matrix
        grams = np.empty((rows if job.along == 1 else columns, k, k))
        _C.gram_vectors(operands, base, rows, columns, job.along, grams.ctypes.data)
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
        if job.constant is None and job.method.elementwise:
            other = operands[1 - (job.base or 0)]
            t = float(job.values.shared["t"])
            return _C.nearswap(address, dtype.native, operands[job.base or 0], other, t, piece.first, piece.count)
        if task.coefficients is None:
            raise AssertionError(f"{job.output.name} is filled before its Gram matrix is known")
        values = task.coefficients.values
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
