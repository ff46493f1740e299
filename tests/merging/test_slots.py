"""Slots: their memory, their stream and their bounds, on a GPU of which only the streams are imitated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import arcmerge
from arcmerge.merging.execution import memory
from arcmerge.merging.execution.gpu import slots
from arcmerge.merging.execution.gpu.slots import Slot, SlotPool
from arcmerge.merging.execution.memory import GpuMemory
from arcmerge.merging.options import Options
from arcmerge.merging.prepare import Prepared, prepare

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")


class Streams:
    """Streams that only have names, and what is allocated while one of them is current."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current, self.count = "default", 0
        self.allocated: list[tuple[str, str]] = []
        self.synchronized: list[str] = []
        self.error: Exception | None = None
        empty = torch.empty
        monkeypatch.setattr(torch.cuda, "Stream", self.made)
        monkeypatch.setattr(torch.cuda, "stream", self.using)

        def recorded(
            nbytes: int, *, device: torch.device = CPU, pin_memory: bool = False, **named: Any
        ) -> torch.Tensor:
            self.allocated.append(("pinned" if pin_memory else device.type, self.current))
            return empty(nbytes, **named)

        monkeypatch.setattr(torch, "empty", recorded)

    def made(self, device: torch.device) -> Stream:
        self.count += 1
        return Stream(f"stream {self.count} of {device}", self)

    @contextmanager
    def using(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream.name
        yield
        self.current = before


class Stream:
    def __init__(self, name: str, streams: Streams) -> None:
        self.name, self._streams = name, streams

    def synchronize(self) -> None:
        self._streams.synchronized.append(self.name)
        if self._streams.error is not None:
            raise self._streams.error


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    return Streams(monkeypatch)


def test_memory_is_allocated_on_the_stream_of_the_slot_when_it_is_used(streams: Streams) -> None:
    slot = Slot(GPU, 4096)
    staged = slot.allocate(16, torch.bfloat16)
    assert streams.allocated == []
    assert staged.gpu.shape == staged.gpu.shape == (16,)
    assert streams.allocated == [("cuda", "stream 1 of cuda:1")]
    assert staged.pinned.dtype == torch.bfloat16
    assert streams.allocated[1:] == [("pinned", "default")]


def test_a_slot_has_bounds() -> None:
    slot = Slot(CPU, 1024)
    first, second = slot.allocate(100, torch.float32), slot.allocate(256, torch.bfloat16)
    assert (first.start, second.start) == (0, 512)
    assert second.pinned.data_ptr() - first.pinned.data_ptr() == second.gpu.data_ptr() - first.gpu.data_ptr() == 512
    assert len(second.gpu) == len(second.pinned) == 256
    with pytest.raises(arcmerge.ArcmergeError, match="must fit into a slot of 1024 bytes, got 1025"):
        slot.allocate(1, torch.uint8)
    slot.clear()
    with pytest.raises(arcmerge.ArcmergeError, match="must fit into a slot of 1024 bytes, got 1026"):
        slot.allocate(513, torch.bfloat16)


def test_a_slot_copies_to_no_other_device() -> None:
    slot = Slot(CPU, 1024)
    here, elsewhere = slot.allocate(4, torch.float32).gpu.zero_(), torch.empty(4, device="meta")
    for source, target in ((here, elsewhere), (elsewhere, here)):
        with pytest.raises(AssertionError, match="meta"):
            slot.copy(source, target)
    copied = torch.ones(4)
    slot.copy(here, copied)
    assert copied.tolist() == [0.0] * 4


class Target:
    """A tensor of a GPU: notes the stream of each copy to it."""

    device = GPU

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self.copies: list[tuple[str, bool]] = []

    def copy_(self, source: torch.Tensor, non_blocking: bool) -> None:
        self.copies.append((self._streams.current, non_blocking))


def test_a_slot_copies_on_its_stream_without_waiting(streams: Streams) -> None:
    slot, target = Slot(GPU, 64), Target(streams)
    slot.copy(torch.zeros(1), target)  # type: ignore[arg-type]
    assert target.copies == [("stream 1 of cuda:1", True)]
    assert streams.synchronized == []
    slot.clear()
    assert streams.synchronized == ["stream 1 of cuda:1"]


class Runtime:
    """cudart: notes the current device of each call."""

    cudaError = SimpleNamespace(success=0)

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 0
        self.registered: list[int] = []
        monkeypatch.setattr(torch.cuda, "cudart", lambda: self)
        monkeypatch.setattr(torch.cuda, "_exchange_device", self._exchange)
        monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", self._exchange)

    def _exchange(self, index: int) -> int:
        before, self.current = self.current, index
        return before

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.registered.append(self.current)
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        return 0


def test_parents_are_pinned_by_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, parents = Runtime(monkeypatch), GpuMemory.__new__(GpuMemory)
    parents._torch, parents._device, parents.streamed = torch, GPU, True
    assert len(parents._allocate_parents(1000)) >= 1000
    assert (runtime.registered, runtime.current) == ([1], 0)


@pytest.mark.parametrize("where", ["in the block", "in the wait"])
def test_a_slot_is_given_back_after_an_error(streams: Streams, where: str) -> None:
    pool, error = SlotPool(GPU, 64, 1), RuntimeError("an illegal access")
    streams.error = error if where == "in the wait" else None

    def work() -> None:
        assert streams.current == "stream 1 of cuda:1"
        if where == "in the block":
            raise error

    with pytest.raises(RuntimeError, match="an illegal access"), pool.take():
        work()
    streams.error = None
    assert not pool._free.empty()
    with pool.take() as slot:
        assert slot.device == GPU
    assert streams.synchronized == ["stream 1 of cuda:1"] * 2


@pytest.fixture
def prepared(models: Path) -> Prepared:
    config = {"merge_method": "linear", "parameters": {"weight": 0.5}, "dtype": "bfloat16"}
    config["models"] = [{"model": str(models / name)} for name in ("gemma-a", "gemma-b")]  # type: ignore[assignment]
    return prepare(config, Options(threads=64), lambda sentence: None)


def test_parents_are_loaded_through_few_slots_without_memory_of_the_gpu(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Slot] = []
    log: list[str] = []

    class Watched(Slot):
        def __init__(self, device: torch.device, nbytes: int) -> None:
            super().__init__(device, nbytes)
            made.append(self)

        def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
            log.append("copy")
            super().copy(source, target)

    monkeypatch.setattr(slots, "Slot", Watched)
    monkeypatch.setattr(memory, "must_stream", lambda *_: False)
    monkeypatch.setattr(GpuMemory, "wait", lambda self: log.append("wait"))
    GpuMemory([prepared], 1 << 20, "cpu", lambda done, total: None)
    assert 1 <= len(made) <= 8
    assert not any("gpu" in vars(slot) for slot in made)
    assert log[:2] == ["wait", "copy"]


def test_free_memory_includes_what_the_allocator_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"mem_get_info": (100, 900), "memory_reserved": 70, "memory_allocated": 30}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.free_memory(GPU) == 140
