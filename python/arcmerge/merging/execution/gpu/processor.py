"""The arithmetic of a merge on a GPU: pinned memory to the GPU, Triton kernels, and back.

Every thread takes a slot: pinned memory, GPU memory of the same size, and a stream that orders the slot's copies and
kernels. While one slot copies to the GPU, another computes and a third copies back, so that the bus is busy in both
directions. Files are read into pinned memory and written from it. What is measured stays on the GPU, whole tensors,
until the result has been computed: for two bf16 inputs 4 bytes an element go in and 2 come out. Tensors that do not fit
(kept.py) are staged again for the result.

Casts and rows that are matched by token are resolved when weights are staged in pinned memory. Operations without a
kernel (coefficients per row or column, elementwise rules, random masks by rank, results that are rounded twice) run on
the CPU, with the same bits.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from arcmerge.dtypes import F32
from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution.cpu.processor import CpuProcessor
from arcmerge.merging.execution.gpu.kept import AHEAD_BYTES, KeptInputs, kept_bytes
from arcmerge.merging.execution.gpu.slots import ResultBuffers, Slot, SlotPool, slot_bytes, slot_count
from arcmerge.merging.execution.processor import FillTask, Request
from arcmerge.merging.execution.work_units import Piece
from arcmerge.merging.methods.magnitudes import sums_by_exponent
from arcmerge.merging.methods.measure import Counts, Gram, Histogram, Norms, Selection
from arcmerge.merging.methods.rule import Coefficients, Consensus
from arcmerge.merging.plan.tensor_job import Job

if TYPE_CHECKING:
    import torch

    from arcmerge.merging.vocabulary.embedding_rows import RowAddresses

# The kernels of histograms and consensus take so many inputs, and draw the random numbers of so many elements at once.
_MAX_INPUTS = _BLOCK = 8


class GpuProcessor:
    """The Processor of a GPU.

    Args:
        jobs: the jobs of the plan.
        rows: the address of each row, for inputs that are matched by token; by (job index, input index).
        device: a torch device name. With "cpu" the same code runs on CPU tensors, which the Triton interpreter accepts.
        threads: the number of threads that call the processor at once.
    """

    ahead_bytes = AHEAD_BYTES

    def __init__(
        self, jobs: tuple[Job, ...], rows: Mapping[tuple[int, int], RowAddresses], device: str, threads: int
    ) -> None:
        import torch

        self._torch = torch
        self._jobs = jobs
        self._cpu = CpuProcessor(jobs, rows)
        self._dtypes = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32")}
        # Triton compiles a kernel once if its first launches do not overlap. A launch does not wait for the GPU.
        self._launching = threading.Lock()
        self._device = torch.device(device)
        self._slots = SlotPool(self._device, slot_bytes(jobs), slot_count(threads))
        self._kept = KeptInputs(jobs, self._device, 0)

    def buffers(self, count: int, nbytes: int) -> list[memoryview]:
        """See Processor.buffers. They are pinned. Inputs that are measured from now on are kept."""
        on_gpu = self._device.type == "cuda"
        self._results = ResultBuffers(count, nbytes, pinned=on_gpu)
        free = self._torch.cuda.mem_get_info(self._device)[0] if on_gpu else 1 << 62
        self._kept = KeptInputs(self._jobs, self._device, kept_bytes(self._jobs, free))
        return self._results.views

    def measure(self, requests: Sequence[Request]) -> list[NDArray[Any] | Counts]:
        """See Processor.measure. Gram matrices of the same number of inputs share a launch."""
        from arcmerge.kernels.gram import gram

        shares: dict[Piece, NDArray[Any] | Counts] = {}
        alike_by: dict[tuple[int, bool], list[Piece]] = {}
        for piece, measure in requests:
            if isinstance(measure, Histogram | Norms) and has_kernel(measure.selection, piece.first):
                counts = self._histogram(piece, Histogram(measure.selection) if isinstance(measure, Norms) else measure)
                shares[piece] = sums_by_exponent(counts) if isinstance(measure, Norms) else counts
            elif isinstance(measure, Gram) and measure.dim is None:
                alike_by.setdefault((len(self._jobs[piece.job].inputs), measure.centered), []).append(piece)
            else:
                (shares[piece],) = self._cpu.measure([(piece, measure)])
        for (k, centered), alike in alike_by.items():
            with self._slots.take() as slot, self._keeping(alike):
                groups = [self._inputs(slot, piece, keep=True) for piece in alike]
                bases = None
                if centered:
                    bases = [
                        group.pop(self._jobs[piece.job].base or 0) for group, piece in zip(groups, alike, strict=True)
                    ]
                k -= centered
                out = self._torch.empty((len(alike), k, k), dtype=self._torch.float64, device=slot.device)
                with self._launching:
                    gram(groups, out, bases=bases)
                shares.update(zip(alike, out.cpu().numpy(), strict=True))
        return [shares[piece] for piece, _ in requests]

    def fill(self, tasks: Sequence[FillTask]) -> list[int]:
        """See Processor.fill. Pieces with the same number of inputs share a launch."""
        counts: dict[Piece, int] = {}
        groups: dict[int, list[FillTask]] = {}
        for task in tasks:
            rule = task.rule
            if isinstance(rule, Consensus) and self._rounds_once(task) and has_kernel(rule.selection, task.piece.first):
                counts[task.piece] = self._consensus(task, rule)
            else:
                groups.setdefault(self._kernel_inputs(task), []).append(task)
        for k, group in groups.items():
            done = self._combine(group) if k else self._fill_without_kernel(group)
            counts.update(zip((task.piece for task in group), done, strict=True))
        for task in tasks:
            self._kept.filled(task.piece)
        return [counts[task.piece] for task in tasks]

    def not_finite(self, job: int) -> ArcmergeError:
        """See Processor.not_finite."""
        return self._cpu.not_finite(job)

    def _kernel_inputs(self, task: FillTask) -> int:
        """The number of inputs that the kernel combines for a task, 0 if the CPU must do it."""
        job = self._jobs[task.piece.job]
        if job.copied or not isinstance(task.rule, Coefficients) or task.rule.values.ndim > 1:
            return 0
        return len(job.inputs) if self._rounds_once(task) else 0

    def _rounds_once(self, task: FillTask) -> bool:
        job = self._jobs[task.piece.job]
        return job.result in (job.output.dtype, F32)

    def _histogram(self, piece: Piece, measure: Histogram) -> NDArray[np.int64]:
        from arcmerge.merging.execution.gpu.consensus import histogram

        job = self._jobs[piece.job]
        with self._slots.take() as slot, self._keeping([piece]):
            inputs = self._inputs(slot, piece, keep=True)
            base = inputs.pop(job.base or 0)
            with self._launching:
                counts = histogram(measure, inputs, base, job.row, piece.first)
            return counts.cpu().numpy()

    def _consensus(self, task: FillTask, rule: Consensus) -> int:
        from arcmerge.merging.execution.gpu.consensus import consensus

        piece, job = task.piece, self._jobs[task.piece.job]
        with self._slots.take() as slot:
            inputs = self._inputs(slot, piece)
            base = inputs.pop(job.base or 0)
            pinned, on_gpu = self._output(slot, task)
            with self._launching:
                not_finite = consensus(rule, on_gpu, inputs, base, job.row, piece.first)
            if pinned is not None:
                slot.copy(on_gpu.view(self._torch.uint8), pinned)
            return int(not_finite.item())  # waits for the stream

    def _combine(self, tasks: Sequence[FillTask]) -> list[int]:
        from arcmerge.kernels.combine import combine

        with self._slots.take() as slot:
            groups = [self._inputs(slot, task.piece) for task in tasks]
            outputs = [self._output(slot, task) for task in tasks]
            values = np.stack([task.rule.values for task in tasks if isinstance(task.rule, Coefficients)])
            coefficients = self._torch.tensor(values, dtype=self._torch.float32, device=slot.device)
            not_finite = self._torch.zeros(len(tasks), dtype=self._torch.int64, device=slot.device)
            with self._launching:
                combine([on_gpu for _, on_gpu in outputs], groups, coefficients, not_finite)
            for pinned, on_gpu in outputs:
                if pinned is not None:
                    slot.copy(on_gpu.view(self._torch.uint8), pinned)
            counts: list[int] = not_finite.tolist()  # waits for the stream
            return counts

    def _output(self, slot: Slot, task: FillTask) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The bytes that the result is copied to, None if it stays on the GPU, and the kernel's output."""
        dtype = self._jobs[task.piece.job].output.dtype
        on_gpu = slot.allocate(task.piece.count, self._dtypes[dtype.name]).gpu
        return self._results.at(task.address, task.piece.count * dtype.itemsize), on_gpu

    def _fill_without_kernel(self, tasks: Sequence[FillTask]) -> list[int]:
        return self._cpu.fill(tasks)

    @contextmanager
    def _keeping(self, pieces: Sequence[Piece]) -> Iterator[None]:
        """Measures pieces in its block, at the end of which the host has waited for their copies."""
        first = [piece for piece in pieces if self._kept.find(piece) is None]
        yield
        for piece in first:
            self._kept.arrived(piece)

    def _inputs(self, slot: Slot, piece: Piece, *, keep: bool = False) -> list[torch.Tensor]:
        """The piece of every input on the GPU, cast and with rows matched by token."""
        if (found := self._kept.find(piece)) is not None:
            return found
        places = self._kept.place(piece) if keep else None
        return [
            self._input(slot, piece, index, places[index] if places else None)
            for index in range(len(self._jobs[piece.job].inputs))
        ]

    def _input(self, slot: Slot, piece: Piece, index: int, place: torch.Tensor | None) -> torch.Tensor:
        staged = slot.allocate(piece.count, self._dtypes[self._jobs[piece.job].inputs[index].dtype.name])
        on_gpu = staged.gpu if place is None else place
        self._cpu.stage(piece, index, staged.pinned.data_ptr())
        slot.copy(staged.pinned, on_gpu)
        return on_gpu


def has_kernel(selection: Selection, first: int) -> bool:
    """Whether the kernels select elements in this way, in a piece that starts at element `first`."""
    by_rank = any(smallest != largest for smallest, largest in selection.probabilities)
    return len(selection.keys) <= _MAX_INPUTS and first % _BLOCK == 0 and not by_rank
