"""Ops and launchers on one of several GPUs, with tensors that have a device and a shape but no memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import triton
from torch import Tensor
from torch._subclasses import FakeTensorMode

import arcmerge.ops  # noqa: F401, registers them
from arcmerge.dispatch.registry import OPS
from arcmerge.gemma2.runtime import bandwidth
from arcmerge.kernels import target

CALLS: dict[str, tuple[Callable[[Callable[..., Tensor]], list[Any]], dict[str, Any]]] = {
    "rmsnorm": (lambda new: [new(2, 8), new(8)], {"eps": 1e-6}),
    "linear": (lambda new: [new(2, 8), [new(4, 8)]], {}),
    "gram": (lambda new: [[new(6), new(6)]], {"base": None, "dim": None}),
}


class Gpus:
    """The current device of the process, as torch.cuda keeps it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 0
        monkeypatch.setattr(torch.cuda, "_exchange_device", self.exchange)
        monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", self.exchange)

    def exchange(self, index: int) -> int:
        before, self.current = self.current, index
        return before


@pytest.mark.parametrize("name", CALLS)
def test_an_op_runs_with_the_device_of_its_tensors_as_the_current_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = Gpus(monkeypatch)
    seen: list[int] = []
    monkeypatch.setitem(OPS[name].implementations, "triton", lambda *_, **__: seen.append(gpus.current))
    arguments, named = CALLS[name]
    with FakeTensorMode():
        given = arguments(lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="cuda:1"))
        OPS[name]._runner("cuda")(*given, **named)
    assert (seen, gpus.current) == ([1], 0)


class Event:
    """An event that knows on which device it was recorded."""

    recorded: ClassVar[list[int]] = []
    gpus: ClassVar[Gpus]

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.recorded.append(self.gpus.current)

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return 2000.0


def test_a_tensor_is_read_between_events_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Event, "gpus", Gpus(monkeypatch), raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    with FakeTensorMode():
        assert bandwidth._seconds_on_gpu(torch.empty(8, device="cuda:1")) == 2.0
    assert Event.recorded == [1, 1]


class Properties(NamedTuple):
    gcnArchName: str


def test_the_architecture_is_that_of_the_device_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = {0: (8, 0), 1: (9, 0), 2: (12, 0)}
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    devices = [torch.device("cuda", index) for index in capabilities]
    assert [target.architecture(device) for device in devices] == ["sm_80", "sm_90", "sm_120"]
    assert [target.configuration({"sm_80": 1, "sm_90": 2}, device) for device in devices] == [1, 2, 2]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties("gfx942:sramecc+:xnack-"))
    assert target.architecture(devices[1]) == "gfx942"
