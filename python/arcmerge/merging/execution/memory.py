"""Where a merge in memory lies: its result at addresses that stay, and its parents, mapped or beside a GPU."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from arcmerge.checkpoint.writer import address_of, aligned_buffer
from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution.cpu import CpuProcessor
from arcmerge.merging.execution.gpu import GpuProcessor, Slot, widest_piece
from arcmerge.merging.execution.gram_pass import Filling, Processor
from arcmerge.merging.execution.processor import aligned_rows, processor_for
from arcmerge.merging.execution.work_units import GRAM_ELEMENTS, Piece
from arcmerge.merging.execution.workers import Workers
from arcmerge.merging.prepare import Prepared

if TYPE_CHECKING:
    import torch

    from arcmerge.merging.plan.tensor_job import Job

Tick = Callable[[int, int], None]
Key = TypeVar("Key", bound=Hashable)

# Tensors begin at multiples of as many bytes: a line of any cache.
ALIGNMENT = 256
# What a GPU keeps free for the cache and the activations of a model that runs.
_FREE_BYTES = 1 << 30
# Launches of as many pieces keep a GPU busy while the next are put together.
_PIECES_ON_DEVICE = 64


def places(sizes: Mapping[Key, int]) -> tuple[dict[Key, int], int]:
    """Where things of so many bytes begin that lie one after another, and where the last one ends."""
    offsets, end = {}, 0
    for key, nbytes in sizes.items():
        offsets[key] = end
        end += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, end


class Residence(Protocol):
    """pieces_at_once: that a processor takes in one call. address: where the result begins."""

    pieces_at_once: int
    address: int

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        """Bytes of the result, not copied."""
        ...

    def processor(self, prepared: Prepared) -> Processor:
        """For the plan of `prepared`, whose results go to addresses in here."""
        ...

    def wait(self) -> None:
        """Until nothing reads the result any more."""
        ...


def residence_of(plans: Sequence[Prepared], nbytes: int, tick: Tick) -> Residence:
    """A residence of `nbytes` of result, on the device of the plans, for whatever models any of them reads.

    tick: told of the bytes of the models that are brought there, and of all. Raises ArcmergeError where memory is too
    small, and says how much is missing.
    """
    if (device := plans[0].options.resolved_device) == "cpu":
        return CpuMemory(nbytes)
    return GpuMemory(plans, nbytes, device, tick)


class CpuMemory:
    """The result in the memory of the machine. The parents stay mapped."""

    pieces_at_once = 1

    def __init__(self, nbytes: int) -> None:
        _require("the merged weights", nbytes, available_memory(), "memory", "merge to disk")
        self._memory = aligned_buffer(nbytes)
        self.address = address_of(self._memory)

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        import torch

        return torch.frombuffer(self._memory[offset : offset + nbytes], dtype=torch.uint8)

    def processor(self, prepared: Prepared) -> Processor:
        return processor_for(prepared)

    def wait(self) -> None:
        """What reads it, waits for it."""


class GpuMemory:
    """The result in the memory of a GPU, and the parents there too if they fit, else in pinned memory of the machine.

    device: a torch device name. "cpu" does the same with CPU tensors, which the Triton interpreter takes.
    """

    def __init__(self, plans: Sequence[Prepared], nbytes: int, device: str, tick: Tick) -> None:
        import torch

        self._torch = torch
        self._device = torch.device(device)
        # Four slots keep the bus busy both ways.
        self._slots = min(plans[0].options.thread_count, 4)
        parents = {key: found for plan in plans for key, found in _inputs(plan).items()}
        offsets, end = places(
            {key: job.count * job.inputs[at].dtype.itemsize for key, (_, job, _, at) in parents.items()}
        )
        slot_bytes = self._slots * max(widest_piece(plan.plan.jobs) for plan in plans)
        self.streamed = must_stream(nbytes + slot_bytes, end, self._device)
        self.pieces_at_once = 1 if self.streamed else _PIECES_ON_DEVICE
        self._result = torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
        self.address = self._result.data_ptr()
        memory, self._parents = self._memory(end), {}
        for key, (_, job, _, at) in parents.items():
            dtype = job.inputs[at].dtype
            part = memory[offsets[key] : offsets[key] + job.count * dtype.itemsize]
            self._parents[key] = part.view(getattr(torch, dtype.name))
        self._bring(parents, plans[0].options.thread_count, tick)

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        return self._result[offset : offset + nbytes]

    def at(self, address: int, nbytes: int) -> torch.Tensor:
        """Bytes of the result from an address on."""
        return self.tensor(address - self.address, nbytes)

    def parent(self, prepared: Prepared, number: int, place: int) -> torch.Tensor | None:
        """All elements of an input of a job, cast and gathered; None for what is not mergeable."""
        return self._parents.get(_key(prepared, prepared.plan.jobs[number], place))

    def processor(self, prepared: Prepared) -> Processor:
        return _ResidentProcessor(prepared, self, str(self._device), self._slots)

    def wait(self) -> None:
        if self._device.type == "cuda":
            self._torch.cuda.synchronize(self._device)

    def _memory(self, nbytes: int) -> torch.Tensor:
        """For the parents."""
        if not self.streamed:
            return self._torch.empty(nbytes, dtype=self._torch.uint8, device=self._device)
        # torch's own pinned memory comes in powers of two.
        memory = self._torch.frombuffer(aligned_buffer(nbytes), dtype=self._torch.uint8)
        if self._device.type == "cuda":
            runtime = self._torch.cuda.cudart()
            error = runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
            if error != runtime.cudaError.success:
                size = f"{nbytes / 1e9:.1f} GB"
                raise ArcmergeError(f"{size} cannot be pinned: {error}; raise `ulimit -l`, or use --device cpu")
            weakref.finalize(self, runtime.cudaHostUnregister, memory.data_ptr())
        return memory

    def _bring(self, parents: _Inputs, threads: int, tick: Tick) -> None:
        """Read the parents to where they stay."""
        tasks: deque[tuple[CpuProcessor, Piece, int, torch.Tensor]] = deque()
        for key, (processor, job, number, place) in parents.items():
            target = self._parents[key]
            for first in range(0, job.count, GRAM_ELEMENTS):
                piece = Piece(number, first, min(GRAM_ELEMENTS, job.count - first))
                tasks.append((processor, piece, place, target[first : first + piece.count]))
        total = sum(target.numel() * target.element_size() for *_, target in tasks)
        done, team = 0, Workers()

        def work() -> None:
            nonlocal done
            slot = Slot(self._device, GRAM_ELEMENTS * 4)
            while team.failure is None:
                try:
                    processor, piece, place, target = tasks.popleft()
                except IndexError:
                    return
                if self.streamed:
                    processor.stage(piece, place, target.data_ptr())
                else:
                    with slot.stream():
                        staged = slot.take(piece.count, target.dtype)
                        processor.stage(piece, place, staged.host.data_ptr())
                        target.copy_(staged.host, non_blocking=True)
                    slot.clear()
                with team.changed:
                    done += target.numel() * target.element_size()

        team.run(lambda: tick(done, total), (work, threads))


class _ResidentProcessor(GpuProcessor):
    """Reads parents and writes results where they are."""

    def __init__(self, prepared: Prepared, residence: GpuMemory, device: str, slots: int) -> None:
        rows = aligned_rows(prepared.plan, prepared.vocabulary)
        super().__init__(prepared.plan.jobs, rows, device, slots)
        self._prepared = prepared
        self._residence = residence

    def _input(self, slot: Slot, piece: Piece, place: int) -> torch.Tensor:
        parent = self._residence.parent(self._prepared, piece.job, place)
        if parent is None:
            return super()._input(slot, piece, place)
        part = parent[piece.first : piece.first + piece.count]
        if not self._residence.streamed:
            return part
        there = slot.take(piece.count, part.dtype).device
        there.copy_(part, non_blocking=True)
        return there

    def _output(self, slot: Slot, task: Filling) -> tuple[None, torch.Tensor]:
        return None, self._bytes(task).view(self._dtypes[self._jobs[task.piece.job].output.dtype.name])

    def _fill_without_kernel(self, tasks: Sequence[Filling]) -> list[int]:
        """Copies go from the parent to the result; what else has no kernel is computed by the CPU from mapped files."""
        return [self._copy(task) for task in tasks]

    def _copy(self, task: Filling) -> int:
        piece = task.piece
        with self._slot() as slot:
            parent = self._residence.parent(self._prepared, piece.job, 0) if self._jobs[piece.job].copied else None
            if parent is not None:
                _, out = self._output(slot, task)
                out.copy_(parent[piece.first : piece.first + piece.count], non_blocking=True)
                return int((~out.isfinite()).sum())
            there = self._bytes(task)
            staged = slot.take(there.numel(), there.dtype)
            (count,) = self._host.fill([Filling(piece, task.coefficients, staged.host.data_ptr())])
            there.copy_(staged.host, non_blocking=True)
            return count

    def _bytes(self, task: Filling) -> torch.Tensor:
        nbytes = task.piece.count * self._jobs[task.piece.job].output.dtype.itemsize
        return self._residence.at(task.address, nbytes)


# By what an input is: what reads it, a job that has it, the number of the job, and its place there.
_Inputs = dict[object, "tuple[CpuProcessor, Job, int, int]"]


def _inputs(prepared: Prepared) -> _Inputs:
    """The inputs of a plan that kernels can read."""
    processor = CpuProcessor(prepared.plan.jobs, aligned_rows(prepared.plan, prepared.vocabulary))
    return {
        _key(prepared, job, place): (processor, job, number, place)
        for number, job in enumerate(prepared.plan.jobs)
        for place, item in enumerate(job.inputs)
        if item.dtype.mergeable and job.count
    }


def _key(prepared: Prepared, job: Job, place: int) -> object:
    """What an input is: two that are equal have the same elements."""
    item = job.inputs[place]
    gathered = job.output.name if job.vocabulary and prepared.vocabulary is not None else None
    return item.checkpoint.folder, item.info.name, item.dtype, gathered


def must_stream(least: int, parents: int, device: torch.device) -> bool:
    """Whether parents of so many bytes must stay in the machine's memory, as a device has too little for them.

    least: bytes that are on the device in any case, beside those of a running model. Raises ArcmergeError if they are
    too many, or the machine has too little memory to pin.
    """
    least += _FREE_BYTES
    free = free_memory(device)
    if least + parents <= free:
        return False
    _require("the merged weights and what runs them", least, free, f"the memory of {device}", "use --device cpu")
    advice = f"use --device cpu, or a GPU of {(least + parents) / 1e9:.0f} GB"
    _require(f"the models, which do not fit on {device},", parents, available_memory(), "pinned memory", advice)
    return True


def _require(what: str, nbytes: int, free: int, where: str, advice: str) -> None:
    """Raises ArcmergeError unless there are so many bytes."""
    if nbytes > free:
        raise ArcmergeError(
            f"{what} take {nbytes / 1e9:.1f} GB of {where} and {free / 1e9:.1f} GB are free: "
            f"{(nbytes - free) / 1e9:.1f} GB are missing; end other programs, or {advice}"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that a device has to give."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def available_memory() -> int:
    """Bytes that can be had without pushing others out, as Linux estimates it."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
