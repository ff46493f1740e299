"""The faults that the fake CUDA runtime finds: unordered streams, memory in use, wrong devices."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

import pytest
import torch

from emulation.cuda import Runtime, cuda
from fake_devices import busy, copied_to_pinned, needs_fake_devices, range_on, refused

pytestmark = needs_fake_devices


# ---- faults between streams


def read_without_an_event() -> object:
    _, x = busy()
    return x + 1


def write_without_an_event() -> None:
    _, x = busy()
    x.zero_()


def write_under_a_reader() -> None:
    stream, x = busy()
    reader = torch.cuda.Stream()
    reader.wait_stream(stream)
    with torch.cuda.stream(reader):
        x + 1
    with torch.cuda.stream(stream):
        x.zero_()


def event_recorded_too_early() -> object:
    stream, x = busy()
    event = stream.record_event()
    with torch.cuda.stream(stream):
        x.add_(1)
    torch.cuda.current_stream().wait_event(event)
    return x + 1


def allocated_on_another_stream() -> None:
    x = torch.empty(8, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        x.zero_()


@pytest.mark.parametrize(
    ("match", "program"),
    [
        ("reads memory that was written by", read_without_an_event),
        ("writes memory that was written by", write_without_an_event),
        ("writes memory that was read by", write_under_a_reader),
        ("reads memory that was written by aten.add_", event_recorded_too_early),
        ("writes memory that was written by an allocation", allocated_on_another_stream),
    ],
)
def test_streams_that_nothing_orders_are_refused(order: str, match: str, program: Callable[[], object]) -> None:
    # "writes" and "reads" name the later of the two in the order in which they were executed.
    refused(f"{match}|memory that was (written|read) by" if order == "latest" else match, order, program)


@pytest.mark.parametrize(
    "order_them",
    [
        lambda stream: torch.cuda.current_stream().wait_stream(stream),
        lambda stream: torch.cuda.current_stream().wait_event(stream.record_event()),
        lambda stream: stream.record_event().synchronize(),
        lambda stream: stream.synchronize(),
        lambda stream: torch.cuda.synchronize(),
    ],
    ids=["wait_stream", "wait_event", "event.synchronize", "stream.synchronize", "synchronize"],
)
def test_streams_that_something_orders_are_not(gpus: Runtime, order_them: Callable[[torch.cuda.Stream], None]) -> None:
    stream, x = busy()
    order_them(stream)
    assert (x + 1).tolist() == list(range(1, 9))
    x.zero_()


def test_parts_of_a_tensor_may_be_written_by_two_streams(gpus: Runtime) -> None:
    x = range_on("cuda", 64)
    torch.cuda.synchronize()
    for part in (x[:32], x[32:]):
        with torch.cuda.stream(torch.cuda.Stream()):
            part.zero_()
    torch.cuda.synchronize()
    assert x.sum().item() == 0


# ---- faults of the host's memory


def pinned_source() -> torch.Tensor:
    pinned = torch.arange(8.0).pin_memory()
    torch.empty(8, device="cuda").copy_(pinned, non_blocking=True)
    return pinned


def write_the_source() -> None:
    pinned_source().zero_()


def move_over_the_source() -> None:
    other = torch.zeros(8)
    ctypes.memmove(pinned_source().data_ptr(), other.data_ptr(), 4)


def read_the_target() -> None:
    other = torch.zeros(8)
    ctypes.memmove(other.data_ptr(), copied_to_pinned().data_ptr() + 28, 4)


def write_the_target() -> None:
    copied_to_pinned().zero_()


def unregister_the_source() -> None:
    memory = torch.arange(8.0)
    runtime = torch.cuda.cudart()
    assert runtime.cudaHostRegister(memory.data_ptr(), 32, 0) == runtime.cudaError.success
    torch.empty(8, device="cuda").copy_(memory, non_blocking=True)
    runtime.cudaHostUnregister(memory.data_ptr())


def free_the_source() -> None:
    memory = torch.arange(8.0)
    torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), 32, 0)
    torch.empty(8, device="cuda").copy_(memory, non_blocking=True)


def free_registered_memory() -> None:
    memory = torch.arange(8.0)
    torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), 32, 0)
    torch.empty(8, device="cuda").copy_(memory, non_blocking=True)
    torch.cuda.synchronize()


@pytest.mark.parametrize(
    ("match", "program"),
    [
        ("memory of the host was freed while a copy", free_the_source),
        ("memory of the host was freed while it was registered", free_registered_memory),
        ("the host wrote memory while a copy from it was pending", write_the_source),
        ("host memory is written while a copy", move_over_the_source),
        ("host memory is read while a copy", read_the_target),
        ("the host wrote memory while a copy to it was pending", write_the_target),
        ("unregistered while a copy", unregister_the_source),
    ],
)
def test_memory_of_the_host_under_a_copy_is_left_alone(match: str, program: Callable[[], object]) -> None:
    refused(match, "latest", program)


def test_memory_that_is_not_pinned_is_copied_before_the_call_returns(gpus: Runtime) -> None:
    source = torch.arange(8.0)
    x = torch.empty(8, device="cuda")
    x.copy_(source, non_blocking=True)
    source.zero_()
    assert x.tolist() == list(range(8))


def test_pinned_memory_of_torch_lives_until_its_copies_have_ended(gpus: Runtime) -> None:
    x = torch.empty(8, device="cuda")
    x.copy_(torch.arange(8.0).pin_memory(), non_blocking=True)
    gc.collect()
    assert x.tolist() == list(range(8))


# ---- faults of devices


def test_a_kernel_is_launched_on_the_device_of_its_tensors(gpus: Runtime) -> None:
    from arcmerge.kernels.geglu import geglu

    gate, up = (torch.rand(2, 16) for _ in range(2))
    on_cpu = torch.empty_like(gate)
    geglu(on_cpu, gate, up, stepwise=False)
    out, *inputs = (tensor.to("cuda:1") for tensor in (torch.empty_like(gate), gate, up))
    with torch.cuda.device("cuda:1"):
        geglu(out, *inputs, stepwise=False)
    assert torch.equal(out.cpu(), on_cpu)


@pytest.mark.parametrize("device", ["cuda:1", "cpu"])
def test_a_tensor_of_another_device_is_refused(order: str, device: str) -> None:
    from arcmerge.kernels.geglu import geglu

    def program() -> None:
        tensors = [torch.zeros(2, 16, device=each) for each in ("cuda:0", device, "cuda:0")]
        geglu(*tensors, stepwise=False)

    refused(f"is launched on cuda:0 with a tensor of {device}", order, program)


def test_addresses_in_tables_count_as_accesses(order: str) -> None:
    from arcmerge.kernels.combine import combine

    def program() -> None:
        _, x = busy()
        factors, nonfinite = torch.ones(1, 1, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
        combine([torch.empty(8, device="cuda")], [[x]], factors, nonfinite)

    refused(
        "_combine_kernel .* reads memory that was written by|memory that was read by _combine_kernel", order, program
    )


@pytest.mark.parametrize("device", ["cuda:1", "cpu"])
def test_an_address_of_another_device_is_refused(order: str, device: str) -> None:
    from arcmerge.kernels.combine import combine

    def program() -> None:
        x, y, out = range_on(device), range_on("cuda"), torch.empty(8, device="cuda")
        factors, nonfinite = torch.ones(1, 2, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
        combine([out], [[y, x]], factors, nonfinite)

    where = "no device" if device == "cpu" else device
    refused(f"_combine_kernel uses the address 0x[0-9a-f]+ of {where} on cuda:0", order, program)


def test_a_fault_names_the_line_of_the_program() -> None:
    refused(
        r"aten.add.Tensor \(test_fake_cuda_faults.py:\d+\) on stream 1 of cuda:0 reads",
        "earliest",
        read_without_an_event,
    )


# ---- memory


def test_freed_memory_is_handed_out_again_to_its_stream(gpus: Runtime) -> None:
    x = range_on("cuda")
    address = x.data_ptr()
    y = x + 1
    del x
    z = torch.full((8,), 5.0, device="cuda")
    assert z.data_ptr() == address
    assert y.tolist() == list(range(1, 9))
    assert torch.cuda.memory_allocated() == 1024


def reuse_under_another_stream() -> None:
    x = range_on("cuda")
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        x + 1
    del x
    torch.zeros(8, device="cuda")


def test_memory_that_another_stream_uses_is_not_handed_out_unrecorded(order: str) -> None:
    refused(
        "an allocation .* writes memory that was read by|reads memory that was written by|freed",
        order,
        reuse_under_another_stream,
    )


def test_memory_that_is_recorded_waits_for_the_other_stream(gpus: Runtime, order: str) -> None:
    x = range_on("cuda")
    address = x.data_ptr()
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(other):
        y = x + 1
        x.record_stream(other)
    del x
    early = torch.zeros(8, device="cuda")
    if order == "latest":
        assert early.data_ptr() != address
    other.synchronize()
    late = torch.zeros(8, device="cuda")
    assert address in (early.data_ptr(), late.data_ptr())
    torch.cuda.current_stream().wait_stream(other)
    assert y.tolist() == list(range(1, 9))


def test_memory_that_was_freed_is_not_used_by_its_address(order: str) -> None:
    from arcmerge.kernels.combine import _combine_kernel

    def program() -> None:
        out, x = range_on("cuda"), range_on("cuda", 4096)
        table = torch.tensor([[out.data_ptr(), x.data_ptr(), 8, 0, 0]], device="cuda")
        factors, nonfinite = torch.ones(1, 1, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
        del x
        import triton.language as tl

        dtypes = (tl.float32, tl.float32)
        _combine_kernel[(1,)](table, factors, nonfinite, DTYPES=dtypes, K=1, TILE=2048, SKIP_ZEROS=False, num_warps=4)

    refused("the memory was freed before", order, program)


def test_memory_has_an_end() -> None:
    with cuda(memory=1 << 20):
        free, total = torch.cuda.mem_get_info()
        assert free == total == 1 << 20
        x = torch.empty(1 << 19, dtype=torch.uint8, device="cuda")
        assert torch.cuda.mem_get_info()[0] == 1 << 19
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
        del x
        assert torch.cuda.memory_reserved() == 1 << 19
        torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
