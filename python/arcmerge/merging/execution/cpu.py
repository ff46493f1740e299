"""The arithmetic of a merge on the CPU: mapped weights in, Gram matrices and finished bytes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from arcmerge import _C
from arcmerge.dtypes import F32
from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution.gram_pass import Filling
from arcmerge.merging.execution.nonfinite import not_finite
from arcmerge.merging.execution.work_units import Piece
from arcmerge.merging.methods.method import Coefficients
from arcmerge.merging.plan.tensor_job import Input, Job
from arcmerge.merging.vocabulary.embedding_rows import RowAddresses

# A result in float32 has not been rounded yet: it is rounded once, to whatever type the file stores.
_UNROUNDED = F32


class CpuProcessor:
    """Works on pieces of `jobs`, from any number of threads at once.

    rows: for the inputs of tensors that are aligned by token, where each row lies.
    """

    def __init__(self, jobs: tuple[Job, ...], rows: Mapping[tuple[int, int], RowAddresses]) -> None:
        self._jobs = jobs
        self._rows = rows
        self._parts: dict[int, list[list[_C.Operand]]] = {}

    def _inputs(self, number: int) -> list[list[_C.Operand]]:
        """What the kernels read of a job's inputs, each the sum of its parts. Shards are mapped on first use."""
        if (inputs := self._parts.get(number)) is None:
            job = self._jobs[number]
            inputs = [_operands(item, self._rows.get((number, place))) for place, item in enumerate(job.inputs)]
            self._parts[number] = inputs
        return inputs

    def _operands(self, piece: Piece) -> tuple[list[_C.Operand], list[NDArray[np.uint8]]]:
        """The inputs of a piece, an operand each, and the memory that holds those which had to be put together."""
        operands, memory = [], []
        for place, (first, *rest) in enumerate(self._inputs(piece.job)):
            if rest:
                dtype = self._jobs[piece.job].inputs[place].dtype
                values = np.empty(piece.count * dtype.itemsize, np.uint8)
                self.stage(piece, place, values.ctypes.data)
                # The kernels count elements from the start of the tensor, of which only this piece is there.
                operands.append(_C.Operand(values.ctypes.data - piece.first * dtype.itemsize, dtype.native))
                memory.append(values)
            else:
                operands.append(first)
        return operands, memory

    def gram(self, pieces: Sequence[Piece]) -> list[NDArray[np.float64]]:
        """Of each piece its share of its job's Gram matrix, (k, k), or all of the job's matrices, (vectors, k, k)."""
        return [self._gram(piece) for piece in pieces]

    def fill(self, tasks: Sequence[Filling]) -> list[int]:
        """Write the result of each piece to its address; returns how many of its values are not finite."""
        return [self._fill(task.piece, task.coefficients, task.address) for task in tasks]

    def _gram(self, piece: Piece) -> NDArray[np.float64]:
        job = self._jobs[piece.job]
        operands, _memory = self._operands(piece)
        base = None
        if job.method.centered(job.values) and job.base is not None:
            base = operands[job.base]
            operands = operands[: job.base] + operands[job.base + 1 :]
        k = len(operands)
        if job.along is None:
            return np.array(_C.gram(operands, base, piece.first, piece.count)).reshape(k, k)
        rows, columns = job.matrix
        grams = np.empty((rows if job.along == 1 else columns, k, k))
        _C.gram_vectors(operands, base, rows, columns, job.along, grams.ctypes.data)
        return grams

    def _fill(self, piece: Piece, coefficients: Coefficients | None, address: int) -> int:
        job = self._jobs[piece.job]
        if job.copied:
            self._copy(job.inputs[0], piece, address)
            if not job.output.dtype.mergeable:
                return 0
            return _C.count_nonfinite(_C.Operand(address, job.output.dtype.native), 0, piece.count)
        if job.result in (job.output.dtype, _UNROUNDED):
            return self._compute(job, piece, coefficients, address, job.output.dtype.native)
        # The recipe asks for two roundings: to the type of the arithmetic, then to the type of the file.
        rounded = np.empty(piece.count * job.result.itemsize, np.uint8)
        self._compute(job, piece, coefficients, rounded.ctypes.data, job.result.native)
        operand = _C.Operand(rounded.ctypes.data, job.result.native)
        return _C.combine(address, job.output.dtype.native, [operand], [1.0], 0, piece.count)

    def stage(self, piece: Piece, place: int, address: int) -> None:
        """Write the piece of one input to `address`, cast and gathered as the arithmetic would see it."""
        item = self._jobs[piece.job].inputs[place]
        if item.cast is None and (piece.job, place) not in self._rows:
            self._copy(item, piece, address)
        else:
            parts = self._inputs(piece.job)[place]
            _C.combine(address, item.dtype.native, parts, [1.0] * len(parts), piece.first, piece.count)

    def _copy(self, source: Input, piece: Piece, address: int) -> None:
        itemsize = source.info.dtype.itemsize
        _C.copy(address, source.checkpoint.address(source.info.name) + piece.first * itemsize, piece.count * itemsize)

    def _compute(self, job: Job, piece: Piece, coefficients: Coefficients | None, address: int, dtype: int) -> int:
        operands, _memory = self._operands(piece)
        if job.constant is None and job.method.elementwise:
            other = operands[1 - (job.base or 0)]
            t = float(job.values.shared["t"])
            return _C.nearswap(address, dtype, operands[job.base or 0], other, t, piece.first, piece.count)
        if coefficients is None:
            raise AssertionError(f"{job.output.name} is filled before its Gram matrix is known")
        values = coefficients.values
        if values.ndim == 1:
            return _C.combine(address, dtype, operands, values.tolist(), piece.first, piece.count)
        vectors = np.ascontiguousarray(values, np.float32)
        _, columns = job.matrix
        along = job.along if job.along is not None else 1
        return _C.combine_vectors(
            address, dtype, operands, vectors.ctypes.data, piece.first, piece.count, columns, along
        )

    def not_finite(self, number: int) -> ArcmergeError:
        """The sentence that tells why a job has values that are not finite."""
        return not_finite(self._jobs[number])


def _operands(item: Input, rows: RowAddresses | None) -> list[_C.Operand]:
    cast = item.cast.native if item.cast is not None else -1
    if rows is None:
        return [_C.Operand(item.checkpoint.address(item.info.name), item.info.dtype.native, cast)]
    return [_C.Operand(0, part.dtype.native, cast, part.addresses.ctypes.data, part.columns) for part in rows.parts]
