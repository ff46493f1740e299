"""Faults that are planted into the code that drives a GPU: each must end in an error or in another result."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

import arcmerge
import host_paths
from arcmerge.dispatch import registry
from arcmerge.gemma2.runtime import bandwidth
from arcmerge.gemma2.runtime.arrival import Arrival
from arcmerge.gemma2.runtime.decode_graph import DecodeGraph
from arcmerge.merging.execution import memory
from arcmerge.merging.execution.gpu import kept
from arcmerge.merging.execution.gpu.kept import KeptInputs
from arcmerge.merging.execution.gpu.processor import GpuProcessor
from arcmerge.merging.execution.gpu.resident import ResidentSums
from arcmerge.merging.execution.gpu.slots import ResultBuffers, Slot, SlotPool
from arcmerge.merging.execution.in_memory import InMemoryMerge
from arcmerge.merging.execution.memory import GpuMemory
from arcmerge.merging.options import Options
from emulation.cuda import cuda
from fake_devices import needs_fake_devices
from host_paths import same

pytestmark = needs_fake_devices


class Planted(NamedTuple):
    """An edit of the source of a function, and what runs it. `error`: how it is found, None for a wrong result."""

    owner: Any
    function: str
    before: str
    after: str
    scenario: str
    error: str | None = None


# ---- what runs the code, as a function of the pair of models, a folder and a device


def to_disk(pair: Path, folder: Path, device: str, method: str = "slerp") -> Any:
    return host_paths.merged_to_disk(pair, folder / device.replace(":", ""), device, method)


def in_small_pieces(pair: Path, folder: Path, device: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        host_paths.cut_small(patch, elements=512)
        return to_disk(pair, folder, device)


def in_memory(pair: Path, folder: Path, device: str) -> Any:
    return host_paths.remerged(pair, device)


def in_use(pair: Path, folder: Path, device: str) -> Any:
    """A merge of weights that pending work still reads."""
    model = host_paths.model_of(pair, device)
    used = [tensor.float() for tensor in model.network.weights.tensors]
    model.set_t(0.5)
    return [tensor.cpu() for tensor in used] + host_paths.weights_of(model)


def streamed(pair: Path, folder: Path, device: str, scenario: Callable[[Path, Path, str], Any]) -> Any:
    """The same with parents in pinned memory, which pass through slots at every merge."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "must_stream", lambda required, parents, device: True)
        return scenario(pair, folder, device)


def current(pair: Path, folder: Path, device: str) -> Any:
    """A merge on the device that is current, as scripts for several GPUs choose it."""
    if device == "cpu":
        return to_disk(pair, folder, device)
    with torch.cuda.device(device):
        return to_disk(pair, folder, "cuda")


def on_its_own_stream(pair: Path, folder: Path, device: str) -> Any:
    """A merge in memory on a stream that the caller has made."""
    if device == "cpu":
        return in_memory(pair, folder, device)
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream()):
        return in_memory(pair, folder, device)


def answers(pair: Path, folder: Path, device: str) -> Any:
    return host_paths.answered(host_paths.model_of(pair, device))


def second_answers(pair: Path, folder: Path, device: str) -> Any:
    """Answers of a model, after those of one on another device."""
    if device != "cpu":
        answers(pair, folder, "cuda:0")
    return answers(pair, folder, device)


def beside_another_thread(pair: Path, folder: Path, device: str) -> Any:
    """Answers, while another thread waits for another device in the middle of the capture."""
    model = host_paths.model_of(pair, device)
    layers = model.network.layers

    def interrupted(*arguments: Any) -> Any:
        if device != "cpu" and torch.cuda.is_current_stream_capturing():
            host_paths.at_once(lambda other: torch.cuda.default_stream(other).synchronize(), ["cuda:0"])
        return layers(*arguments)

    model.network.layers = interrupted  # type: ignore[method-assign]
    return host_paths.answered(model)


def bytes_a_second(pair: Path, folder: Path, device: str) -> Any:
    return bandwidth.read_bandwidth(host_paths.model_of(pair, device).network.weights) > 0


def state_dicts(pair: Path, folder: Path, device: str) -> Any:
    parents = [load_file(pair / name / "model.safetensors") for name in ("a", "b")]
    on_device = ({name: tensor.to(device) for name, tensor in each.items()} for each in parents)
    return [tensor.cpu() for tensor in arcmerge.slerp(*on_device, 0.3).values()]


SCENARIOS: dict[str, Callable[[Path, Path, str], Any]] = {
    "to disk": to_disk,
    "to disk, in small pieces": in_small_pieces,
    "consensus to disk": partial(to_disk, method="dare_ties"),
    "in memory": in_memory,
    "streamed": partial(streamed, scenario=in_memory),
    "in use": in_use,
    "in use, streamed": partial(streamed, scenario=in_use),
    "on the current device": current,
    "on a stream of its own": on_its_own_stream,
    "answers": answers,
    "second answers": second_answers,
    "answers beside another thread": beside_another_thread,
    "bandwidth": bytes_a_second,
    "state dicts": state_dicts,
}

_TO_BUFFER = "slot.copy(on_gpu.view(self._torch.uint8), pinned)"
_ON_DEFAULT_STREAM = (
    "with self._torch.cuda.stream(self._torch.cuda.default_stream(self._device)): "
    "pinned.copy_(on_gpu.view(self._torch.uint8), non_blocking=True)"
)
_STAGE = "self._cpu.stage(piece, index, staged.pinned.data_ptr())\n"
_COPY = "    slot.copy(staged.pinned, on_gpu)\n"
_COPY_IN = "out.copy_(padded, non_blocking=True)\n"

FAULTS = {
    "results are copied to a file's buffer on another stream": Planted(
        GpuProcessor, "_combine", _TO_BUFFER, _ON_DEFAULT_STREAM, "to disk", "no event"
    ),
    "results of a consensus are copied to a file's buffer on another stream": Planted(
        GpuProcessor, "_consensus", _TO_BUFFER, _ON_DEFAULT_STREAM, "consensus to disk", "no event"
    ),
    "a result goes to the place of another one": Planted(
        ResultBuffers,
        "at",
        "start : start + nbytes]",
        "2 * start : 2 * start + nbytes]",
        "to disk",
        "must match the size",
    ),
    "memory for inputs is used before the allocator's stream has come to it": Planted(
        KeptInputs, "_allocated", "self._stream.synchronize()", "pass", "to disk", "an allocation"
    ),
    "inputs are measured in memory that is not theirs": Planted(
        kept,
        "_parts",
        "piece.first : piece.first + piece.count",
        ": piece.count",
        "to disk, in small pieces",
        "must fit into bfloat16",
    ),
    "inputs are kept that have not arrived": Planted(
        KeptInputs,
        "find",
        "held is None or not held.whole",
        "held is None",
        "to disk, in small pieces",
        "must fit into bfloat16",
    ),
    "a slot is cleared without a wait": Planted(
        Slot, "clear", "self._stream.synchronize()", "pass", "in memory", "must fit|the host wrote memory"
    ),
    "a slot is free before its stream has ended": Planted(
        SlotPool, "take", "slot.clear()", "slot._used = 0", "in memory", "must fit|the host wrote memory"
    ),
    "memory of a slot comes from another stream": Planted(
        Slot,
        "gpu",
        "with self.stream():",
        "with self._torch.cuda.stream(self._torch.cuda.default_stream()):",
        "to disk",
        "an allocation",
    ),
    "all inputs of a piece share the start of a slot": Planted(
        Slot, "allocate", "self._used = -(-end // 256) * 256", "pass", "to disk", "the host wrote memory while a copy"
    ),
    "an input is staged after its copy": Planted(
        GpuProcessor,
        "_input",
        _STAGE + _COPY,
        _COPY.strip() + "\n    " + _STAGE,
        "to disk",
        "the host wrote memory while a copy from it",
    ),
    "copies run on a stream for which the slot does not wait": Planted(
        Slot,
        "copy",
        "with self.stream():",
        "with self._torch.cuda.stream(self._torch.cuda.default_stream(self.device)):",
        "in memory",
        "the host wrote memory while a copy from it",
    ),
    "a Gram matrix is read before it has arrived": Planted(
        GpuProcessor,
        "measure",
        "out.cpu().numpy()",
        "self._torch.empty(out.shape, dtype=out.dtype, pin_memory=True).copy_(out, non_blocking=True).numpy().copy()",
        "to disk",
    ),
    "parents are loaded into memory that is still in use": Planted(
        GpuMemory, "_load", "self.wait()", "pass", "in memory", "an allocation"
    ),
    "a model is merged again while it runs": Planted(
        InMemoryMerge, "_fill", "self._memory.wait()", "pass", "in use, streamed", "no event"
    ),
    "the current device is waited for": Planted(
        GpuMemory, "wait", "synchronize(self._device)", "synchronize()", "in use", "no event"
    ),
    "work of a slot is enqueued on the stream of the caller": Planted(
        SlotPool, "take", "with slot.stream():\n            yield slot", "yield slot", "to disk", "on cuda:0"
    ),
    "a device has no index": Planted(
        Options,
        "resolved_device",
        'f"cuda:{torch.cuda.current_device() if named[1] is None else int(named[1])}"',
        "self.device",
        "on the current device",
        r"device\(type='cuda'\)",
    ),
    "an op runs on the current device": Planted(
        registry,
        "_on_device",
        "torch.cuda.device((first if isinstance(first, Tensor) else first[0]).device)",
        "nullcontext()",
        "state dicts",
        "is launched on cuda:0 with a tensor of cuda:1",
    ),
    "lengths are not advanced": Planted(
        DecodeGraph, "_advance", "self._batch.lengths.add_(self._more)", "pass", "answers"
    ),
    "a graph is captured on the stream of the first one": Planted(
        DecodeGraph, "_captured", "stream=side, ", "", "second answers"
    ),
    "a graph is never replayed": Planted(DecodeGraph, "_replayed", "graph.replay()", "pass", "answers"),
    "kernels are compiled without the caller's stream": Planted(
        DecodeGraph, "_captured", "side.wait_stream(current)", "pass", "answers", "no event"
    ),
    "a value is read in a capture": Planted(
        DecodeGraph,
        "_captured",
        "result = step()",
        "result = step()\n            result.sum().item()",
        "answers",
        "in the capture of a graph",
    ),
    "a capture forbids other threads to wait": Planted(
        DecodeGraph,
        "_captured",
        'capture_error_mode="thread_local"',
        'capture_error_mode="global"',
        "answers beside another thread",
        "the host waits in the capture of a graph",
    ),
    "lengths are overwritten under their copy": Planted(
        DecodeGraph,
        "_fill",
        _COPY_IN,
        "padded = padded.pin_memory()\n    " + _COPY_IN + "    padded.zero_()\n",
        "answers",
        "the host wrote memory while a copy from it",
    ),
    "pinned memory is freed while it is registered": Planted(
        GpuMemory,
        "_allocate_parents",
        "weakref.finalize(self, runtime.cudaHostUnregister, memory.data_ptr())",
        "pass",
        "streamed",
        "freed while it was registered",
    ),
    "a time is taken on the current device": Planted(
        bandwidth, "_seconds_on_gpu", "torch.cuda.device(tensor.device)", "torch.cuda.device(0)", "bandwidth", "by zero"
    ),
    "counts are read behind an event of another stream": Planted(
        ResidentSums,
        "compute",
        "done.record()",
        "done.record(torch.cuda.default_stream(self._result.device))",
        "on a stream of its own",
        "got an overflow",
    ),
    "a token is read before it has arrived": Planted(Arrival, "lists", "self._event.synchronize()", "pass", "answers"),
    "a time is read before its end": Planted(
        bandwidth, "_seconds_on_gpu", "end.synchronize()", "pass", "bandwidth", "completed before"
    ),
}


def plant(patch: pytest.MonkeyPatch, fault: Planted) -> None:
    """Replace the code of a function by that of its edited source, wherever the function is referred to."""
    function = undecorated(inspect.getattr_static(fault.owner, fault.function))
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(fault.before) == 1, source
    found: dict[str, Any] = {}
    future = "from __future__ import annotations\n"
    exec(future + source.replace(fault.before, fault.after), function.__globals__, found)
    patch.setattr(function, "__code__", undecorated(found[fault.function]).__code__)


def undecorated(function: Any) -> Any:
    """The function in a property, a cached property, a context manager and so on."""
    return getattr(function, "fget", None) or getattr(function, "func", None) or inspect.unwrap(function)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return host_paths.make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def expected(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The result of a scenario on the CPU, computed once."""
    known: dict[str, Any] = {}

    def result(scenario: str) -> Any:
        if scenario not in known:
            with pytest.MonkeyPatch.context() as patch:
                if "answers" in scenario:  # native kernels add in another order
                    patch.setenv("ARCMERGE_BACKEND", "triton")
                known[scenario] = SCENARIOS[scenario](pair, tmp_path_factory.mktemp("cpu"), "cpu")
        return known[scenario]

    return result


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_without_a_fault_the_result_is_right(
    pair: Path, tmp_path: Path, expected: Callable[[str], Any], scenario: str
) -> None:
    with cuda(devices=2, order="latest"):
        found = SCENARIOS[scenario](pair, tmp_path, "cuda:1")
    assert same(found, expected(scenario))


@pytest.mark.filterwarnings("ignore:All-NaN slice")
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(
    pair: Path, tmp_path: Path, expected: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fault, right = FAULTS[name], expected(FAULTS[name].scenario)
    plant(monkeypatch, fault)
    if fault.error is None:
        with cuda(devices=2, order="latest"):
            assert not same(SCENARIOS[fault.scenario](pair, tmp_path, "cuda:1"), right)
        return
    with (
        pytest.raises((AssertionError, RuntimeError, ArithmeticError, arcmerge.ArcmergeError), match=fault.error),
        cuda(devices=2, order="latest"),
    ):
        SCENARIOS[fault.scenario](pair, tmp_path, "cuda:1")
