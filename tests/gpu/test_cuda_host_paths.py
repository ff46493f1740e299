"""The code that launches kernels in CUDA C++, on two fake GPUs in every order; the emulator executes their PTX."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import arcmerge
import ptx_package
from arcmerge import ops
from arcmerge.cuda import driver
from arcmerge.cuda import slerp as kernel
from arcmerge.dispatch.registry import OPS, backends
from arcmerge.errors import ArcmergeError
from arcmerge.kernels.segments import SEGMENT
from emulation.cuda import Fault, Runtime, cuda
from emulation.evidence import same_values
from fake_devices import needs_fake_devices

pytestmark = [needs_fake_devices, ptx_package.needs_nvcc]

BF16 = torch.bfloat16
T = [0.3, 1.0, 0.0, 0.6, 1.7, 0.5, 0.25, 0.5, 0.5]


@pytest.fixture(autouse=True)
def ptx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    ptx_package.build(monkeypatch, tmp_path)
    return tmp_path


def models() -> tuple[list[Tensor], list[Tensor]]:
    """Whole tiles, parts of one, two segments, one that starts 2 bytes past, strided, empty, parallel, not finite."""
    generator = torch.Generator().manual_seed(7)

    def model() -> list[Tensor]:
        shapes = ((2048,), (33, 5), (9,), (SEGMENT + 40,), (31,), (12, 20), (0,), (300,), (77,))
        found = [torch.randn(shape, generator=generator).to(BF16) for shape in shapes]
        found[4], found[5] = found[4][1:], found[5].T
        return found

    a, b = model(), model()
    b[7] = a[7].clone()
    b[8][3] = math.inf
    return a, b


def on(device: str, *sides: list[Tensor]) -> list[list[Tensor]]:
    return [[tensor.to(device) for tensor in side] for side in sides]


def launches() -> int:
    """Of kernels in CUDA C++, so far."""
    return len(driver.library().launches)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert same_values(one.cpu().contiguous(), other), index


# ---- results


@pytest.mark.parametrize("normalize", [False, True])
def test_the_op_takes_two_launches_and_no_wait(gpus: Runtime, normalize: bool) -> None:
    a, b = models()
    x, y = on("cuda:1", a, b)
    nonfinite = torch.zeros(len(a), dtype=torch.int64, device="cuda:1")
    gpus.counts.clear()
    found = ops.slerp(x, y, T, normalize=normalize, nonfinite=nonfinite)
    # Two copies of transposed tensors, the table, the kernel, and the sum with `nonfinite`.
    assert gpus.counts == {"launches": 5}
    assert launches() == 1
    expected = torch.zeros(len(a), dtype=torch.int64)
    assert_same(found, ops.slerp(a, b, T, normalize=normalize, nonfinite=expected))
    assert torch.equal(nonfinite.cpu(), expected)


def test_it_runs_on_the_stream_that_is_current(gpus: Runtime) -> None:
    a, b = models()
    side = torch.cuda.Stream("cuda:1")
    with torch.cuda.stream(side):
        x, y = on("cuda:1", a, b)
        found = [tensor.float() for tensor in ops.slerp(x, y, 0.4)]
    side.synchronize()
    assert_same(found, [tensor.float() for tensor in ops.slerp(a, b, 0.4)])
    assert driver.library().launches[0][-1] == side.cuda_stream


def test_each_device_has_a_module_of_its_own(gpus: Runtime) -> None:
    a, b = models()
    expected = ops.slerp(a, b, 0.4)
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        assert_same(ops.slerp(*on(device, a, b), 0.4), expected)
    assert (launches(), len(kernel._loaded)) == (3, 2)


def test_a_graph_reads_inputs_and_t_at_every_replay(gpus: Runtime) -> None:
    a, b = models()
    with torch.cuda.device(1):
        x, y = on("cuda:1", a, b)
        t = torch.tensor([0.25], dtype=torch.float64, device="cuda:1")
        ops.slerp(x, y, t)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops.slerp(x, y, t)
        for position in (0.5, 1.0):
            t.fill_(position)
            x[0].neg_()
            a[0].neg_()
            graph.replay()
            assert_same(captured, ops.slerp(a, b, position))
    assert launches() == 2


def test_state_dicts_with_other_dtypes(gpus: Runtime) -> None:
    sides = [{str(index): tensor for index, tensor in enumerate(side)} for side in models()]
    a, b = ({name: tensor.to("cuda:1") for name, tensor in side.items() if name != "8"} for side in sides)
    expected = arcmerge.slerp(*({name: side[name] for name in a} for side in sides), 0.3)
    found = arcmerge.slerp(a, b, 0.3)
    assert_same([*found.values()], [*expected.values()])
    assert launches() == 1


@pytest.mark.usefixtures("latest")
@pytest.mark.parametrize("t", [3e4, 1e17, 1e300, -1e300])
def test_a_position_far_away_has_the_bound_of_the_op(t: float) -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 3000, generator=generator).to(BF16)
    outs = [torch.empty(3000, dtype=BF16, device="cuda")]
    position = torch.tensor([t], dtype=torch.float64, device="cuda")
    (found,) = kernel.slerp(outs, [a.cuda()], [b.cuda()], position)[0].cpu()
    gram = torch.stack([a, b]).double() @ torch.stack([a, b]).double().T
    cosine = float(gram[0, 1] / (gram[0, 0] * gram[1, 1]).sqrt())
    angle = math.acos(cosine)
    exact = torch.tensor([math.sin((1 - t) * angle), math.sin(t * angle)], dtype=torch.float64) / math.sin(angle)
    bound = 2.0**-49 * (1 + abs(t)) / (1 - cosine**2) + 2.0**-24
    assert bool(((found.double() - exact).abs() <= bound).all())
    assert bool((found.double().abs() <= 1 / math.sin(angle) + 2.0**-20).all())


@pytest.mark.usefixtures("latest")
def test_coefficients_of_zero_leave_a_negative_zero() -> None:
    a = torch.ones(50, dtype=BF16)
    # (1 - 2) * 2 + 2 * 1 = 0, the length of the result.
    t = torch.tensor([2.0], dtype=torch.float64)
    b = torch.where(torch.arange(50) < 25, 1.0, 0.0).to(BF16) * 0.5
    b += torch.where(torch.arange(50) < 25, 0.0, 0.5).to(BF16) * torch.where(torch.arange(50) % 2 == 0, 1.0, -1.0).to(
        BF16
    )
    (expected, _), (found, _) = (
        OPS["slerp"]([a.to(device)], [b.to(device)], t.to(device), normalize=True) for device in ("cpu", "cuda")
    )
    assert launches() == 1
    assert same_values(found.cpu(), expected)
    assert bool((expected.view(torch.int16) == -32768).all())


# ---- the choice


@pytest.mark.usefixtures("latest")
@pytest.mark.parametrize(
    ("change", "launched"),
    [
        ("nothing", 1),
        ("a setting names triton", 0),
        ("a tensor is float32", 0),
        ("the cache is small", 0),
        ("the GPU is older", 0),
        ("there is no PTX", 0),
        ("nothing to merge", 0),
    ],
)
def test_the_kernel_is_chosen_where_it_moves_fewer_bytes(
    change: str, launched: int, ptx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 0 if change == "nothing to merge" else 3 * SEGMENT
    a, b = (torch.full((count,), value, dtype=BF16, device="cuda") for value in (1.0, 2.0))
    if change == "a setting names triton":
        monkeypatch.setenv("ARCMERGE_BACKEND_SLERP", "triton")
    if change == "a tensor is float32":
        b = b.float()
    if change == "the cache is small":  # half of it is an eighth of the inputs
        properties = SimpleNamespace(L2_cache_size=3 * SEGMENT)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        assert kernel.traffic([count], 3 * SEGMENT) == pytest.approx(9.5)
        monkeypatch.setattr(kernel, "MOST_BYTES", 9.49)
    if change == "the GPU is older":
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    if change == "there is no PTX":
        (ptx / "slerp.sm_80.ptx").unlink()
    ops.slerp([a], [b], 0.5)
    assert launches() == launched


@pytest.mark.usefixtures("latest")
def test_a_refusal_of_the_driver_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ArcmergeError("'libcuda.so.1' must be installed, got none; install NVIDIA's driver")

    a, b = models()
    x, y = on("cuda:1", a, b)
    library = driver.library
    monkeypatch.setattr(driver, "library", missing)
    with pytest.warns(UserWarning, match=r"slerp runs in Triton on cuda:1, because 'libcuda\.so\.1' must be installed"):
        found = ops.slerp(x, y, T)
    assert_same(found, ops.slerp(a, b, T))
    monkeypatch.setattr(driver, "library", library)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ops.slerp(x, y, T)
        assert launches() == 0
        ops.slerp(*on("cuda:0", a, b), T)  # another device is asked
    assert launches() == 1


@pytest.mark.usefixtures("latest")
def test_a_setting_takes_no_other_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCMERGE_BACKEND_SLERP", "cuda_cpp")
    one = torch.ones(5, device="cuda")
    with pytest.raises(ArcmergeError, match=r"'a\[0\]' must be bfloat16, got float32"):
        ops.slerp([one], [one], 0.5)
    monkeypatch.setattr(kernel, "ptx_of", lambda target: _OTHER)
    one = one.bfloat16()
    with pytest.raises(ArcmergeError, match="'cuModuleGetFunction' must succeed"):
        ops.slerp([one], [one], 0.5)


_OTHER = b".version 8.0\n.target sm_80\n.address_size 64\n.visible .entry other()\n.reqntid 32, 1, 1\n{\n\tret;\n}\n"


def test_the_doctor_tells_why(ptx: Path) -> None:
    assert backends("cuda")["slerp"].startswith("cuda_cpp (CUDA C++, for tensors for which it moves fewer bytes")
    (ptx / "slerp.sm_80.ptx").unlink()
    assert "not cuda_cpp: the package was built without nvcc" in backends("cuda")["slerp"]
    assert "cuda_cpp" not in backends("cuda")["combine"].replace("not cuda_cpp: it has no combine", "")


# ---- planted faults


def merged(device: str) -> list[Tensor]:
    """Two merges on a stream of their own, after one on another device; what the second makes is used at once."""
    a, b = models()
    if device == "cpu":
        return [tensor.float() for tensor in ops.slerp(a, b, T)]
    ops.slerp(*on("cuda:0", a, b), 0.5)
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        x, y = on(device, a, b)
        ops.slerp(y, x, 0.9)
        return [tensor.float().cpu() for tensor in ops.slerp(x, y, T)]


class Planted(NamedTuple):
    """An edit of the source of a function. `error`: how it is found, None for a wrong result."""

    function: Callable[..., Any]
    before: str
    after: str
    error: str | None = None


FAULTS = {
    "the module of another device": Planted(kernel._load, "_loaded.get(device.index)", "_loaded.get(0)", "error 400"),
    "the default stream": Planted(
        kernel.slerp,
        "torch.cuda.current_stream(device).cuda_stream",
        "0",
        "no event or synchronization|does not end|of cuda:1",
    ),
    "the stream of another device": Planted(
        kernel.slerp, "torch.cuda.current_stream(device)", "torch.cuda.current_stream(0)", "with a stream of cuda:0"
    ),
    "the table is freed before the launch": Planted(
        kernel.launch,
        "    kernel.launch_cooperative",
        "    values[0] = ctypes.c_void_p(arguments.segments.clone().data_ptr())\n    kernel.launch_cooperative",
        "the memory was freed before",
    ),
    "scratch memory is freed before the launch": Planted(
        kernel.launch,
        "    kernel.launch_cooperative",
        "    values[4] = ctypes.c_void_p(arguments.partials.clone().data_ptr())\n    kernel.launch_cooperative",
        "the memory was freed before",
    ),
    "pinned memory is used again under its copy": Planted(
        kernel.prepared,
        "values.pin_memory().to(device, non_blocking=True)",
        "(pinned := values.pin_memory()).to(device, non_blocking=True)[0 * pinned.fill_(1).numel() :]",
        "the host wrote memory",
    ),
    "all tensors take the first t": Planted(kernel.prepared, "int(len(t) > 1)", "0", None),
    "a batch is left out": Planted(kernel.prepared, "len(batches) - 1", "len(batches) - 2", None),
    "outputs in the place of inputs": Planted(kernel.slerp, "zip(a, b, outs", "zip(b, a, outs", None),
}


def plant(patch: pytest.MonkeyPatch, fault: Planted) -> None:
    """Replace the code of a function by that of its edited source."""
    source, found = inspect.getsource(fault.function), dict[str, Any]()
    assert source.count(fault.before) == 1, source
    future = "from __future__ import annotations\n"
    exec(future + source.replace(fault.before, fault.after), fault.function.__globals__, found)
    patch.setattr(fault.function, "__code__", found[fault.function.__name__].__code__)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, right = FAULTS[name], merged("cpu")
    monkeypatch.setenv("ARCMERGE_BACKEND_SLERP", "cuda_cpp")
    plant(monkeypatch, fault)
    if fault.error is not None:
        with pytest.raises((Fault, ArcmergeError), match=fault.error), cuda(devices=2, order="latest"):
            merged("cuda:1")
        return
    with cuda(devices=2, order="latest"):
        try:
            found = merged("cuda:1")
        except Fault:
            return
        assert not all(map(same_values, found, right))


@pytest.mark.usefixtures("one_thread")
def test_without_a_fault_the_result_is_right() -> None:
    with cuda(devices=2, order="latest"):
        found = merged("cuda:1")
    assert all(map(same_values, found, merged("cpu")))
