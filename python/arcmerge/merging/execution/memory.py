"""The memory of a merge in memory: the result at fixed addresses, and on a GPU also the parents."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

from arcmerge.checkpoint.writer import address_of, aligned_buffer
from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution.choose import aligned_rows, processor_for
from arcmerge.merging.execution.cpu.masks import MaskStore
from arcmerge.merging.execution.cpu.processor import CpuProcessor
from arcmerge.merging.execution.gpu.processor import GpuProcessor
from arcmerge.merging.execution.gpu.resident import MOST_INPUTS, ResidentSums, WeightedSum
from arcmerge.merging.execution.gpu.slots import Slot, SlotPool, slot_bytes, slot_count
from arcmerge.merging.execution.processor import FillTask, Processor
from arcmerge.merging.execution.work_units import PIECE_ELEMENTS, Piece, cut
from arcmerge.merging.execution.workers import drain
from arcmerge.merging.methods.rule import Coefficients
from arcmerge.merging.options import Progress
from arcmerge.merging.prepare import Prepared

if TYPE_CHECKING:
    import torch

    from arcmerge.merging.plan.tensor_job import Job

Key = TypeVar("Key", bound=Hashable)

# Tensors start at multiples of so many bytes, which covers the cache lines of all processors.
ALIGNMENT = 256
# Random masks take up to this part of the size of the result, which is enough for those of four models in bfloat16.
_MASK_SHARE = 4
# So many threads at once copy parents to pinned memory, each through a slot of 16 MB.
_LOADING_SLOTS = 8
# A launch of so many pieces keeps a GPU busy while the next launch is prepared.
_GPU_BATCH_SIZE = 64


def offsets_of(sizes: Mapping[Key, int]) -> tuple[dict[Key, int], int]:
    """The offset of each item when items of these sizes (bytes) lie one after another, and the end of the last."""
    offsets, end = {}, 0
    for key, nbytes in sizes.items():
        offsets[key] = end
        end += -(-nbytes // ALIGNMENT) * ALIGNMENT
    return offsets, end


class Memory(Protocol):
    """The memory of a merge.

    Attributes:
        batch_size: the number of tasks that a processor should get in one call.
        address: the address of the result.
    """

    batch_size: int
    address: int

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        """Bytes of the result, uint8 (nbytes,), not copied."""
        ...

    def processor(self, prepared: Prepared) -> Processor:
        """A processor for the plan of `prepared`, whose results are written to this memory."""
        ...

    def fill_whole(self, processor: Processor, tasks: Sequence[FillTask]) -> dict[int, int]:
        """Compute whole jobs at once, those that this memory can.

        Args:
            processor: that of the plan.
            tasks: a task for each job, of all its elements.

        Returns:
            For each job that is done, by index, the number of results that are NaN or infinite.
        """
        ...

    def wait(self) -> None:
        """Wait until nothing reads the result any more."""
        ...


def allocate(plans: Sequence[Prepared], nbytes: int, progress: Progress, workspace: int = 0) -> Memory:
    """Memory on the device of the plans.

    Args:
        plans: every plan that will be merged; they differ in their parameters alone.
        nbytes: the size of the result.
        progress: called with the bytes of the parents that were loaded, and the bytes in total.
        workspace: bytes of a GPU's memory that are left free for a model that runs.

    Raises:
        ArcmergeError: there is too little memory; it says how much is missing.
    """
    if (device := plans[0].options.resolved_device) == "cpu":
        return CpuMemory(nbytes)
    return GpuMemory(plans, nbytes, device, progress, workspace)


class CpuMemory:
    """The result in RAM. The parents stay mapped."""

    batch_size = 1

    def __init__(self, nbytes: int) -> None:
        free = available_memory()
        _require_memory("memory", nbytes, free, "the merged weights", "merge to disk")
        self._masks = MaskStore(min(nbytes // _MASK_SHARE, (free - nbytes) // 2), keeps=True)
        self._memory = aligned_buffer(nbytes)
        self.address = address_of(self._memory)

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        """See Memory.tensor."""
        import torch

        return torch.frombuffer(self._memory[offset : offset + nbytes], dtype=torch.uint8)

    def processor(self, prepared: Prepared) -> Processor:
        """See Memory.processor."""
        return processor_for(prepared, self._masks)

    def fill_whole(self, processor: Processor, tasks: Sequence[FillTask]) -> dict[int, int]:
        """See Memory.fill_whole. Threads take jobs by pieces."""
        return {}

    def wait(self) -> None:
        """Do nothing: operations on the CPU have ended when they return."""


class _Parent(NamedTuple):
    """A tensor of a parent: input `input_index` of jobs[job_index], which is `job`, of the plan that `reader` reads."""

    reader: CpuProcessor
    job: Job
    job_index: int
    input_index: int


class _LoadTask(NamedTuple):
    parent: _Parent
    piece: Piece
    target: torch.Tensor


class GpuMemory:
    """The result in GPU memory, and the parents there too if they fit, else in pinned memory.

    Args:
        plans: every plan that will be merged.
        nbytes: the size of the result.
        device: a torch device name. With "cpu" the same code runs on CPU tensors, which the Triton interpreter accepts.
        progress: called with the bytes of the parents that were loaded, and the bytes in total.
        workspace: bytes that are left free for a model that runs.

    Attributes:
        streamed: whether the parents are in pinned memory, from which they pass through the GPU at every merge.
    """

    def __init__(
        self, plans: Sequence[Prepared], nbytes: int, device: str, progress: Progress, workspace: int = 0
    ) -> None:
        import torch

        self._torch = torch
        self._device = torch.device(device)
        threads = plans[0].options.thread_count
        parents = {key: parent for plan in plans for key, parent in _parents(plan).items()}
        offsets, end = offsets_of(
            {key: job.count * job.inputs[index].dtype.itemsize for key, (_, job, _, index) in parents.items()}
        )
        slots = slot_count(threads) * max(slot_bytes(plan.plan.jobs) for plan in plans)
        self.streamed = must_stream(nbytes + slots + workspace, end, self._device)
        self.batch_size = 1 if self.streamed else _GPU_BATCH_SIZE
        # Threads that fill them are outside of the caller's inference mode, and may not write to tensors of that mode.
        with torch.inference_mode(False):
            self._result = torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
            self._outputs: dict[tuple[int, int, torch.dtype], torch.Tensor] = {}
            memory, self._parents = self._allocate_parents(end), {}
            for key, (_, job, _, index) in parents.items():
                dtype = job.inputs[index].dtype
                part = memory[offsets[key] : offsets[key] + job.count * dtype.itemsize]
                self._parents[key] = part.view(getattr(torch, dtype.name))
        self.address = self._result.data_ptr()
        self._sums = ResidentSums(self._result)
        self._load(parents, threads, progress)

    def tensor(self, offset: int, nbytes: int) -> torch.Tensor:
        """See Memory.tensor."""
        return self._result[offset : offset + nbytes]

    def output(self, address: int, count: int, dtype: torch.dtype) -> torch.Tensor:
        """`count` elements of the result from an address on, the same tensor for the same arguments."""
        key = address, count, dtype
        if key not in self._outputs:
            part = self.tensor(address - self.address, count * dtype.itemsize)
            self._outputs[key] = part.view(dtype)
        return self._outputs[key]

    def parent(self, prepared: Prepared, job: int, index: int) -> torch.Tensor | None:
        """All elements of an input of a job, cast and with rows matched by token; None if it is not mergeable."""
        return self._parents.get(_key(prepared, prepared.plan.jobs[job], index))

    def processor(self, prepared: Prepared) -> Processor:
        """See Memory.processor."""
        return _GpuMemoryProcessor(prepared, self, str(self._device))

    def fill_whole(self, processor: Processor, tasks: Sequence[FillTask]) -> dict[int, int]:
        """See Memory.fill_whole. It is in order with other work on the caller's stream."""
        assert isinstance(processor, _GpuMemoryProcessor)
        sums = {} if self.streamed else processor.weighted_sums(tasks)
        return dict(zip(sums, self._sums.compute([*sums.values()]), strict=True)) if sums else {}

    def wait(self) -> None:
        """See Memory.wait."""
        if self._device.type == "cuda":
            self._torch.cuda.synchronize(self._device)

    def _allocate_parents(self, nbytes: int) -> torch.Tensor:
        if not self.streamed:
            return self._torch.empty(nbytes, dtype=self._torch.uint8, device=self._device)
        # torch rounds the size of its own pinned memory up to a power of two.
        memory = self._torch.frombuffer(aligned_buffer(nbytes), dtype=self._torch.uint8)
        if self._device.type == "cuda":
            runtime = self._torch.cuda.cudart()
            with self._torch.cuda.device(self._device):  # on another device it would make a context
                error = runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
            if error != runtime.cudaError.success:
                raise ArcmergeError(
                    f"'ulimit -l' must allow {nbytes / 1e9:.1f} GB of pinned memory, got {error}; raise it, or use "
                    "--device cpu"
                )
            weakref.finalize(self, runtime.cudaHostUnregister, memory.data_ptr())
        return memory

    def _load(self, parents: Mapping[object, _Parent], threads: int, progress: Progress) -> None:
        """Read the parents into their memory."""
        tasks = [
            _LoadTask(parent, piece, self._parents[key][piece.first : piece.first + piece.count])
            for key, parent in parents.items()
            for piece in cut(parent.job_index, parent.job.count)
        ]
        slots = SlotPool(self._device, PIECE_ELEMENTS * 4, min(threads, _LOADING_SLOTS))
        self.wait()  # work of the caller's stream may still use the memory that the allocator gave

        def load(task: _LoadTask) -> None:
            parent, piece, target = task
            if self.streamed:
                parent.reader.stage(piece, parent.input_index, target.data_ptr())
            else:
                with slots.take() as slot:
                    staged = slot.allocate(piece.count, target.dtype)
                    parent.reader.stage(piece, parent.input_index, staged.pinned.data_ptr())
                    slot.copy(staged.pinned, target)

        drain(tasks, load, lambda task: task.target.nbytes, threads, progress)


class _GpuMemoryProcessor(GpuProcessor):
    """Reads the parents and writes the results where GpuMemory has them."""

    def __init__(self, prepared: Prepared, memory: GpuMemory, device: str) -> None:
        rows = aligned_rows(prepared.plan, prepared.vocabulary)
        super().__init__(prepared.plan.jobs, rows, device, prepared.options.thread_count)
        self._prepared = prepared
        self._memory = memory

    def weighted_sums(self, tasks: Sequence[FillTask]) -> dict[int, WeightedSum]:
        """The jobs, by index, that are sums of parents in GPU memory. Each task is of a whole job."""
        sums = {}
        for task in tasks:
            index, job = task.piece.job, self._jobs[task.piece.job]
            if not isinstance(task.rule, Coefficients) or not self._is_sum(task, job):
                continue
            inputs = [self._memory.parent(self._prepared, index, number) for number in range(len(job.inputs))]
            if present := [each for each in inputs if each is not None]:
                assert len(present) == len(inputs)
                sums[index] = WeightedSum(present, task.rule.values, self._output_of(task))
        return sums

    def _is_sum(self, task: FillTask, job: Job) -> bool:
        # 1 x has the bits of x, but for the payload of a NaN, which is refused unless it is allowed.
        if job.copied:
            return not self._prepared.options.allow_nonfinite and not job.setting
        return 0 < self._kernel_inputs(task) <= MOST_INPUTS

    def _input(self, slot: Slot, piece: Piece, index: int, place: torch.Tensor | None) -> torch.Tensor:
        parent = self._memory.parent(self._prepared, piece.job, index)
        if parent is None:
            return super()._input(slot, piece, index, place)
        part = parent[piece.first : piece.first + piece.count]
        if not self._memory.streamed:
            return part
        on_gpu = slot.allocate(piece.count, part.dtype).gpu
        slot.copy(part, on_gpu)
        return on_gpu

    def _output(self, slot: Slot, task: FillTask) -> tuple[None, torch.Tensor]:
        return None, self._output_of(task)

    def _output_of(self, task: FillTask) -> torch.Tensor:
        dtype = self._dtypes[self._jobs[task.piece.job].output.dtype.name]
        return self._memory.output(task.address, task.piece.count, dtype)

    def _fill_without_kernel(self, tasks: Sequence[FillTask]) -> list[int]:
        return [self._copy(task) for task in tasks]

    def _copy(self, task: FillTask) -> int:
        """Copy a parent to the result, or compute the result on the CPU, from mapped files, and copy it."""
        piece = task.piece
        with self._slots.take() as slot:
            parent = self._memory.parent(self._prepared, piece.job, 0) if self._jobs[piece.job].copied else None
            if parent is not None:
                _, out = self._output(slot, task)
                slot.copy(parent[piece.first : piece.first + piece.count], out)
                return int((~out.isfinite()).sum())
            on_gpu = self._bytes(task)
            staged = slot.allocate(on_gpu.numel(), on_gpu.dtype)
            (count,) = self._cpu.fill([FillTask(piece, task.rule, staged.pinned.data_ptr())])
            slot.copy(staged.pinned, on_gpu)
            return count

    def _bytes(self, task: FillTask) -> torch.Tensor:
        nbytes = task.piece.count * self._jobs[task.piece.job].output.dtype.itemsize
        return self._memory.tensor(task.address - self._memory.address, nbytes)


def _parents(prepared: Prepared) -> dict[object, _Parent]:
    """The inputs of a plan that kernels can read, each once."""
    reader = CpuProcessor(prepared.plan.jobs, aligned_rows(prepared.plan, prepared.vocabulary))
    return {
        _key(prepared, job, index): _Parent(reader, job, job_index, index)
        for job_index, job in enumerate(prepared.plan.jobs)
        for index, item in enumerate(job.inputs)
        if item.dtype.mergeable and job.count
    }


def _key(prepared: Prepared, job: Job, index: int) -> object:
    """A key of an input: inputs with equal keys have equal elements."""
    item = job.inputs[index]
    matched = job.output.name if job.vocabulary and prepared.vocabulary is not None else None
    return item.checkpoint.folder, item.info.name, item.dtype, matched


def must_stream(required: int, parents: int, device: torch.device) -> bool:
    """Whether the parents must stay in pinned memory, because the device has too little memory for them.

    Args:
        required: bytes that are needed on the device in any case, also by a model that runs.
        parents: the size of the parents in bytes.
        device: the device of the result.

    Raises:
        ArcmergeError: the required bytes do not fit on the device, or the parents do not fit into RAM.
    """
    free = free_memory(device)
    if required + parents <= free:
        return False
    _require_memory(
        f"the memory of {device}", required, free, "the merged weights and a running model", "use --device cpu"
    )
    advice = f"use --device cpu, or a GPU of {(required + parents) / 1e9:.0f} GB"
    _require_memory("pinned memory", parents, available_memory(), f"the models, which do not fit on {device}", advice)
    return True


def _require_memory(memory: str, nbytes: int, free: int, content: str, advice: str) -> None:
    """Raises ArcmergeError unless so many bytes are free."""
    if nbytes > free:
        raise ArcmergeError(
            f"{memory} must have {nbytes / 1e9:.1f} GB free for {content}, got {free / 1e9:.1f} GB, "
            f"{(nbytes - free) / 1e9:.1f} GB too little; end other programs, or {advice}"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device, with those that torch's allocator holds free."""
    import torch

    if device.type != "cuda":
        return available_memory()
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def available_memory() -> int:
    """Bytes of RAM that can be allocated without swapping, as Linux estimates them."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
