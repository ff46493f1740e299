"""The device that a name means: of a merge to disk, and of a model in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import arcmerge
from arcmerge.merging import options
from arcmerge.merging.execution import memory
from arcmerge.merging.execution.choose import processor_for
from arcmerge.merging.execution.cpu.processor import CpuProcessor
from arcmerge.merging.options import Options
from arcmerge.merging.prepare import Prepared, prepare


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with three GPUs, of which the second is current."""
    monkeypatch.setattr(options, "_DRIVERS", ("/dev/null",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("name", "in_memory", "to_disk"),
    [
        ("cpu", "cpu", "cpu"),
        ("auto", "cuda:1", "cpu"),
        ("cuda", "cuda:1", "cuda:1"),
        ("cuda:0", "cuda:0", "cuda:0"),
        ("cuda:02", "cuda:2", "cuda:2"),
    ],
)
def test_a_device_has_an_index(name: str, in_memory: str, to_disk: str) -> None:
    given = Options(device=name)
    assert (given.resolved_device, given.merge_device) == (in_memory, to_disk)


@pytest.mark.usefixtures("gpus")
def test_a_device_that_does_not_exist_is_named() -> None:
    with pytest.raises(arcmerge.ArcmergeError, match=r"one of the 3 CUDA devices of this machine, got 'cuda:3'"):
        _ = Options(device="cuda:3").resolved_device
    for name in ("cuda:", "cuda1", "cuda:x", "gpu"):
        with pytest.raises(arcmerge.ArcmergeError, match="'device' must be auto, cpu, cuda or cuda:N, got"):
            _ = Options(device=name).resolved_device


def test_without_a_gpu_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "_DRIVERS", ("/dev/null",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Options().resolved_device == Options().merge_device == "cpu"


@pytest.fixture
def prepared(models: Path) -> Prepared:
    config = {"merge_method": "passthrough", "models": [{"model": str(models / "gemma-a")}]}
    return prepare(config, Options(), lambda sentence: None)


@pytest.mark.usefixtures("gpus")
def test_auto_merges_to_disk_on_the_cpu_and_in_memory_on_the_gpu(
    prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[Any] = []
    monkeypatch.setattr(memory, "GpuMemory", lambda plans, nbytes, device, progress, workspace: chosen.append(device))
    assert isinstance(processor_for(prepared), CpuProcessor)
    memory.allocate([prepared], 1, lambda done, total: None)
    assert chosen == ["cuda:1"]
