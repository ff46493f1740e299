"""The arithmetic of a merge on a GPU: pinned rings in, Triton kernels, pinned rings out.

Every thread takes a slot: pinned host memory, device memory of the same size, and a stream on which its copies and
kernels follow each other. While one slot copies in, another computes and a third copies out, so the slots together are
the ring that keeps the bus busy both ways. Weights pass twice, once to be summed and once to be mixed: 8 bytes of a
bf16 pair in and 2 out an element, which a disk of any kind is slower than.

Casts and gathered rows are resolved while the staging memory is filled. What has no kernel (per-vector coefficients,
nearswap, results that are rounded twice) is left to the CPU, which every op can fall to without changing a bit.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from queue import SimpleQueue
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from arcmerge.dtypes import F32
from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution.cpu import CpuProcessor
from arcmerge.merging.execution.gram_pass import Filling
from arcmerge.merging.execution.work_units import GRAM_ELEMENTS, Piece
from arcmerge.merging.plan.tensor_job import Job

if TYPE_CHECKING:
    import torch

    from arcmerge.merging.vocabulary.embedding_rows import RowAddresses


class GpuProcessor:
    """Works on pieces of `jobs` on `device`, from as many threads at once as it has slots.

    device: a torch device name. "cpu" runs the same pipeline on CPU tensors, which the Triton interpreter takes.
    rows: for the inputs of tensors that are aligned by token, where each row lies.
    """

    def __init__(
        self, jobs: tuple[Job, ...], rows: Mapping[tuple[int, int], RowAddresses], device: str, slots: int
    ) -> None:
        import torch

        self._torch = torch
        self._jobs = jobs
        self._host = CpuProcessor(jobs, rows)
        self._dtypes = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}
        # Triton compiles a kernel at its first launch, once if launches come one by one. They do not wait for the GPU.
        self._launching = threading.Lock()
        self._slots: SimpleQueue[Slot] = SimpleQueue()
        for _ in range(slots):
            self._slots.put(Slot(torch.device(device), widest_piece(jobs)))

    def gram(self, pieces: Sequence[Piece]) -> list[NDArray[np.float64]]:
        """As CpuProcessor.gram; pieces with as many inputs go into one launch."""
        from arcmerge.kernels.gram import gram

        shares: dict[Piece, NDArray[np.float64]] = {}
        for (k, centered, whole), alike in self._grouped(pieces).items():
            if not whole:
                shares.update(zip(alike, self._host.gram(alike), strict=True))
                continue
            with self._slot() as slot:
                groups = [self._send(slot, piece) for piece in alike]
                bases = None
                if centered:
                    places = [self._jobs[piece.job].base or 0 for piece in alike]
                    bases = [group.pop(place) for group, place in zip(groups, places, strict=True)]
                k -= centered
                out = self._torch.empty((len(alike), k, k), dtype=self._torch.float64, device=slot.device)
                with self._launching:
                    gram(groups, out, bases=bases)
                shares.update(zip(alike, out.cpu().numpy(), strict=True))
        return [shares[piece] for piece in pieces]

    def fill(self, tasks: Sequence[Filling]) -> list[int]:
        """As CpuProcessor.fill; pieces with as many inputs go into one launch."""
        counts: dict[Piece, int] = {}
        alike: dict[int, list[Filling]] = {}
        for task in tasks:
            alike.setdefault(self._kernel_inputs(task), []).append(task)
        for k, group in alike.items():
            done = self._fill(group) if k else self._fill_without_kernel(group)
            counts.update(zip((task.piece for task in group), done, strict=True))
        return [counts[task.piece] for task in tasks]

    def _kernel_inputs(self, task: Filling) -> int:
        """The number of inputs the kernel combines for a task, 0 for what is left to the CPU."""
        job = self._jobs[task.piece.job]
        rounded_once = job.result in (job.output.dtype, F32)
        if job.copied or task.coefficients is None or task.coefficients.values.ndim > 1 or not rounded_once:
            return 0
        return len(job.inputs)

    def _fill(self, tasks: Sequence[Filling]) -> list[int]:
        from arcmerge.kernels.combine import combine

        with self._slot() as slot:
            groups = [self._send(slot, task.piece) for task in tasks]
            outs = [self._output(slot, task) for task in tasks]
            values = np.stack([task.coefficients.values for task in tasks if task.coefficients is not None])
            coefficients = self._torch.tensor(values, dtype=self._torch.float32, device=slot.device)
            not_finite = self._torch.zeros(len(tasks), dtype=self._torch.int64, device=slot.device)
            with self._launching:
                combine([there for _, there in outs], groups, coefficients, not_finite)
            for host, there in outs:
                if host is not None:
                    host.copy_(there, non_blocking=True)
            counts: list[int] = not_finite.tolist()  # waits for the stream
            for task, (host, _) in zip(tasks, outs, strict=True):
                if host is not None:
                    ctypes.memmove(task.address, host.data_ptr(), host.numel() * host.element_size())
            return counts

    def _output(self, slot: Slot, task: Filling) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Where the result is brought to in the machine's memory, if it is, and where the kernel writes it."""
        return slot.take(task.piece.count, self._dtypes[self._jobs[task.piece.job].output.dtype.name])

    def _fill_without_kernel(self, tasks: Sequence[Filling]) -> list[int]:
        return self._host.fill(tasks)

    def _grouped(self, pieces: Sequence[Piece]) -> dict[tuple[int, bool, bool], list[Piece]]:
        """Pieces by inputs, whether a base is taken off them, and whether a matrix is of the whole tensor."""
        groups: dict[tuple[int, bool, bool], list[Piece]] = {}
        for piece in pieces:
            job = self._jobs[piece.job]
            key = (len(job.inputs), job.method.centered(job.values), job.along is None)
            groups.setdefault(key, []).append(piece)
        return groups

    def not_finite(self, number: int) -> ArcmergeError:
        """The sentence that tells why a job has values that are not finite."""
        return self._host.not_finite(number)

    @contextmanager
    def _slot(self) -> Iterator[Slot]:
        slot = self._slots.get()
        try:
            with slot.stream():
                yield slot
        finally:
            slot.clear()
            self._slots.put(slot)

    def _send(self, slot: Slot, piece: Piece) -> list[torch.Tensor]:
        """The piece of every input on the device, cast and gathered."""
        return [self._input(slot, piece, place) for place in range(len(self._jobs[piece.job].inputs))]

    def _input(self, slot: Slot, piece: Piece, place: int) -> torch.Tensor:
        staged = slot.take(piece.count, self._dtypes[self._jobs[piece.job].inputs[place].dtype.name])
        self._host.stage(piece, place, staged.host.data_ptr())
        staged.device.copy_(staged.host, non_blocking=True)
        return staged.device


def widest_piece(jobs: Sequence[Job]) -> int:
    """Bytes of a slot for the piece that takes most, with a margin for many small ones that share a slot."""
    widths = (sum(item.dtype.itemsize for item in job.inputs) + F32.itemsize for job in jobs)
    return (1 + max(widths, default=0)) * GRAM_ELEMENTS


class Staged(NamedTuple):
    """The same stretch of a slot's memory on both sides."""

    host: torch.Tensor
    device: torch.Tensor


class Slot:
    """Memory on both sides and a stream, for one piece at a time."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        import torch

        self.device = device
        cuda = device.type == "cuda"
        self._stream: torch.cuda.Stream | None = torch.cuda.Stream(device) if cuda else None
        self._host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=cuda)
        self._device = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._taken = 0

    def stream(self) -> AbstractContextManager[object]:
        import torch

        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def clear(self) -> None:
        """Give all memory back, when nothing reads or writes it any more."""
        if self._stream is not None:
            self._stream.synchronize()
        self._taken = 0

    def take(self, count: int, dtype: torch.dtype) -> Staged:
        """The next `count` elements, 16-byte aligned on both sides."""
        start, nbytes = self._taken, count * dtype.itemsize
        self._taken += -(-nbytes // 256) * 256
        host, device = (memory[start : start + nbytes].view(dtype) for memory in (self._host, self._device))
        return Staged(host, device)
