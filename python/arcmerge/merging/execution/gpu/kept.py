"""Inputs that stay in GPU memory from their measure to the result, so that they cross the bus once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from arcmerge.merging.execution.work_units import Piece
from arcmerge.merging.plan.tensor_job import Job

if TYPE_CHECKING:
    import torch

# What a merge to disk may measure before it is merged: enough to hide the measures behind the writing.
AHEAD_BYTES = 1 << 30
_ALIGNMENT = 256


def kept_bytes(jobs: Sequence[Job], free: int) -> int:
    """The GPU memory for inputs: AHEAD_BYTES and two of the largest jobs, but at most three quarters of what is free.

    With less than that the largest jobs are not kept: they are staged for every measure and for the result.
    """
    return min(AHEAD_BYTES + 2 * max((_bytes_of(job) for job in jobs), default=0), free // 4 * 3)


def _sizes(job: Job) -> list[int]:
    return [-(-job.count * item.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for item in job.inputs]


def _bytes_of(job: Job) -> int:
    return sum(_sizes(job))


@dataclass
class _Held:
    """The inputs of a job. arrived: ranges of elements that were copied, which may overlap; whole: if those are all."""

    inputs: list[torch.Tensor]
    nbytes: int
    arrived: set[tuple[int, int]] = field(default_factory=set)
    whole: bool = False


class KeptInputs:
    """The inputs of jobs, whole, from the first piece that is measured to the last that is filled.

    Every method may be called from several threads at once.

    Args:
        jobs: the jobs of the plan.
        device: where the inputs are kept.
        nbytes: the most memory that they may take. Jobs that do not fit are not kept.
    """

    def __init__(self, jobs: Sequence[Job], device: torch.device, nbytes: int) -> None:
        import torch

        self._torch = torch
        self._jobs = jobs
        self._device = device
        self._room = nbytes
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" and nbytes else None
        self._held: dict[int, _Held | None] = {}
        self._unfilled: dict[int, int] = {}
        self._lock = threading.Lock()

    def find(self, piece: Piece) -> list[torch.Tensor] | None:
        """The piece of every input, if the whole job has arrived."""
        held = self._held.get(piece.job)
        return None if held is None or not held.whole else _parts(held, piece)

    def place(self, piece: Piece) -> list[torch.Tensor] | None:
        """Where the piece of every input is to be copied; None if the job does not fit."""
        with self._lock:
            if piece.job not in self._held:
                self._held[piece.job] = self._allocated(self._jobs[piece.job])
            held = self._held[piece.job]
        return None if held is None else _parts(held, piece)

    def arrived(self, piece: Piece) -> None:
        """Note that the copies to a place have ended: the host has waited for them."""
        with self._lock:
            if (held := self._held.get(piece.job)) is not None:
                held.arrived.add((piece.first, piece.first + piece.count))
                held.whole = _reach(held.arrived) == self._jobs[piece.job].count

    def filled(self, piece: Piece) -> None:
        """Note that a piece of the result is complete; free the inputs of a job after its last one."""
        with self._lock:
            left = self._unfilled.pop(piece.job, self._jobs[piece.job].count) - piece.count
            if left:
                self._unfilled[piece.job] = left
            elif (held := self._held.pop(piece.job, None)) is not None:
                self._room += held.nbytes

    def _allocated(self, job: Job) -> _Held | None:
        sizes = _sizes(job)
        if sum(sizes) > self._room:
            return None
        self._room -= sum(sizes)
        if self._stream is None:
            memory = self._torch.empty(sum(sizes), dtype=self._torch.uint8, device=self._device)
        else:
            # The allocator hands out memory in the order of a stream. The host waits, so that any stream may use it.
            with self._torch.cuda.stream(self._stream):
                memory = self._torch.empty(sum(sizes), dtype=self._torch.uint8, device=self._device)
            self._stream.synchronize()
        inputs = [
            part[: job.count * item.dtype.itemsize].view(getattr(self._torch, item.dtype.name))
            for part, item in zip(memory.split(sizes), job.inputs, strict=True)
        ]
        return _Held(inputs, sum(sizes))


def _reach(ranges: set[tuple[int, int]]) -> int:
    """How far ranges go from element 0 without a gap. The CPU may have measured those between."""
    reach = 0
    for first, end in sorted(ranges):
        if first > reach:
            break
        reach = max(reach, end)
    return reach


def _parts(held: _Held, piece: Piece) -> list[torch.Tensor]:
    return [each[piece.first : piece.first + piece.count] for each in held.inputs]
