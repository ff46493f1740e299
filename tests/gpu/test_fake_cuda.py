"""The fake CUDA runtime: it computes as torch does on a GPU, in every order, and graphs record."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from emulation.cuda import Runtime, cuda
from fake_devices import busy, copied_to_pinned, needs_fake_devices, range_on, refused

pytestmark = needs_fake_devices


# ---- what a program computes


PROGRAMS: dict[str, Callable[[str], object]] = {
    "views and changes in place": lambda device: range_on(device).view(2, 4)[1].mul_(2).sum() + range_on(device)[1:3],
    "other strides": lambda device: range_on(device).view(2, 4).t().contiguous() @ range_on(device).view(4, 2).t(),
    "casts": lambda device: range_on(device).to(torch.bfloat16).float() / 3,
    "bytes as another dtype": lambda device: range_on(device).view(torch.int32)[2:4],
    "an output that exists": lambda device: torch.sub(range_on(device), 1, out=torch.empty(8, device=device)),
    "assignment": lambda device: range_on(device).index_fill_(0, torch.tensor([1, 3], device=device), 9),
    "several outputs": lambda device: torch.cat((*range_on(device).view(2, 4).max(dim=1)[:1], range_on(device))),
    "results of a size that only values tell": lambda device: range_on(device).remainder(3).nonzero(),
    "a mask": lambda device: range_on(device)[range_on(device) > 3],
    "a copy by Python": lambda device: copy.deepcopy(torch.eye(3, device=device)),
    "attention of torch": lambda device: scaled_dot_product_attention(*[range_on(device, 64).view(1, 2, 4, 8)] * 3),
    "values from Python": lambda device: torch.tensor([[1, 2], [3, 4]], dtype=torch.float16, device=device) * 2,
    "a module": lambda device: torch.nn.functional.linear(range_on(device), torch.eye(8).to(device)),
    "like another": lambda device: torch.zeros_like(range_on(device)) + range_on(device).new_full((8,), 3),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_has_the_result_of_the_cpu(gpus: Runtime, program: str, inference: bool) -> None:
    with torch.inference_mode(inference):
        found, expected = PROGRAMS[program]("cuda:1"), PROGRAMS[program]("cpu")
        assert isinstance(found, torch.Tensor)
        assert found.is_cuda
        assert found.device == torch.device("cuda:1")
        assert (found.dtype, found.shape, found.stride()) == (expected.dtype, expected.shape, expected.stride())
        assert torch.equal(found.cpu(), expected)


def test_values_come_to_the_host_in_every_way(gpus: Runtime) -> None:
    x = range_on("cuda")
    assert x.tolist() == list(range(8))
    assert (x[3].item(), int(x[4]), bool(x[0]), float(x.sum())) == (3.0, 4, False, 28.0)
    assert x.numpy(force=True).tolist() == x.cpu().tolist()
    assert torch.equal(x, range_on("cuda"))
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        x.numpy()


def test_a_tensor_goes_from_one_device_to_another(gpus: Runtime) -> None:
    first, second = (torch.cuda.Stream(index) for index in (0, 1))
    with torch.cuda.stream(first):
        x = range_on("cuda:0") + 1
        with torch.cuda.stream(second):
            y = x.to("cuda:1") * 2
            assert y.tolist() == [2.0 * (each + 1) for each in range(8)]
    with pytest.raises(RuntimeError, match=r"on the same device, but .* cuda:0, cuda:1"):
        x + y
    with pytest.raises(RuntimeError, match=r"on the same device, but .* cpu, cuda:1"):
        y + range_on("cpu")


def test_devices_and_streams_are_current_for_a_thread(latest: Runtime) -> None:
    stream = torch.cuda.Stream(1)
    found = []
    with torch.cuda.stream(stream):
        assert torch.cuda.current_device() == 1
        assert torch.cuda.current_stream() is stream
        assert torch.empty(1, device="cuda").device == torch.device("cuda:1")
        thread = threading.Thread(
            target=lambda: found.append((torch.cuda.current_device(), torch.cuda.current_stream()))
        )
        thread.start()
        thread.join()
    assert found == [(0, torch.cuda.default_stream(0))]
    assert torch.cuda.current_device() == 0
    with torch.cuda.device("cuda:1"):
        assert torch.tensor([1.0]).to("cuda").device == torch.device("cuda:1")
    with pytest.raises(RuntimeError, match="invalid device ordinal 2"):
        torch.cuda.set_device(2)


def test_torch_has_no_gpu_afterwards() -> None:
    with cuda():
        assert torch.cuda.is_available()
        assert torch.cuda.device_count() == 1
    assert not torch.cuda.is_available()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


# ---- when operations are executed


def test_the_latest_order_executes_at_the_wait(latest: Runtime) -> None:
    pinned = copied_to_pinned()
    assert pinned.tolist() != list(range(8))
    torch.cuda.current_stream().synchronize()
    assert pinned.tolist() == list(range(8))


def test_the_earliest_order_executes_at_once() -> None:
    with cuda(order="earliest"):
        assert copied_to_pinned().tolist() == list(range(8))


def test_random_orders_differ_by_their_seed_and_all_end_alike() -> None:
    seen = set()
    for seed in range(8):
        with cuda(order="random", seed=seed):
            streams = [busy() for _ in range(4)]
            seen.add(tuple(stream.done for stream, _ in streams))
            for stream, x in streams:
                torch.cuda.current_stream().wait_stream(stream)
                assert x.tolist() == list(range(8))
    assert len(seen) > 3


def test_a_wait_executes_what_it_waits_for_and_nothing_else(latest: Runtime) -> None:
    (first, _), (second, _) = busy(), busy()
    event = first.record_event()
    second.wait_event(event)
    with torch.cuda.stream(first):
        range_on("cuda")
    second.synchronize()
    assert event.query()
    assert second.done == second.ticks
    assert 0 < first.done < first.ticks


def test_a_program_can_ask_until_an_event_has_happened(gpus: Runtime) -> None:
    stream, x = busy()
    event = stream.record_event()
    while not event.query():
        pass
    assert x.tolist() == list(range(8))


def test_times_are_read_after_their_events(latest: Runtime) -> None:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    range_on("cuda")
    end.record()
    with pytest.raises(RuntimeError, match="completed before"):
        start.elapsed_time(end)
    end.synchronize()
    assert start.elapsed_time(end) > 0


def test_launches_and_waits_are_counted(gpus: Runtime) -> None:
    gpus.counts.clear()
    x = range_on("cuda") + 1
    assert gpus.counts == {"launches": 2}
    x.tolist()
    torch.cuda.synchronize()
    assert gpus.counts == {"launches": 2, "waits": 2}


# ---- graphs


def captured(x: torch.Tensor, mode: str = "thread_local") -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
        assert torch.cuda.is_current_stream_capturing()
        y = x * 2 + 1
    assert not torch.cuda.is_current_stream_capturing()
    return graph, y


def test_a_capture_records_and_a_replay_computes(gpus: Runtime) -> None:
    x = range_on("cuda:1")
    graph, y = captured(x)
    torch.cuda.synchronize("cuda:1")
    assert y.isnan().all()
    for start in (0, 5):
        x.copy_(range_on("cuda:1") + start)
        graph.replay()
        assert y.tolist() == [2 * (each + start) + 1 for each in range(8)]


def forked(x: torch.Tensor, *, joined: bool = True, ordered: bool = True) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    """A graph of two streams, of which the second one adds to what the first one has computed."""
    graph, first, second = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.Stream()
    first.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=first, capture_error_mode="thread_local"):
        if not ordered:
            second.wait_stream(first)
        y = x * 2
        if ordered:
            second.wait_stream(first)
        with torch.cuda.stream(second):
            y += 1
        if joined:
            first.wait_stream(second)
        y *= 3 if joined else 1
    return graph, y


def test_streams_take_part_in_a_capture(gpus: Runtime) -> None:
    x = range_on("cuda")
    graph, y = forked(x)
    for start in (0, 5):
        x.copy_(range_on("cuda") + start)
        graph.replay()
        assert y.tolist() == [3 * (2 * (each + start) + 1) for each in range(8)]


def test_streams_return_to_a_capture_and_are_ordered_in_it(order: str) -> None:
    refused("does not wait for it", order, lambda: forked(range_on("cuda"), joined=False))

    def program() -> None:
        x = range_on("cuda")
        graph, _ = forked(x, ordered=False)
        graph.replay()
        torch.cuda.synchronize()
        del x

    refused("no event", order, program)


def test_what_a_graph_reads_is_kept(order: str) -> None:
    refused("the memory was freed before", order, lambda: captured(range_on("cuda"))[0].replay())


def test_memory_of_a_graph_stays_its_own(gpus: Runtime) -> None:
    x = range_on("cuda")
    graph, y = captured(x)
    others = [torch.full((8,), 7.0, device="cuda") for _ in range(4)]
    graph.replay()
    assert y[0].item() == 1
    assert all(other.tolist() == [7.0] * 8 for other in others)


@pytest.mark.parametrize(
    "action",
    [
        lambda x: x.sum().item(),
        lambda x: torch.cuda.synchronize(),
        lambda x: torch.cuda.Event().record() or torch.cuda.current_stream().synchronize(),
        lambda x: x.copy_(torch.zeros(8)),
        lambda x: torch.tensor([1.0], device="cuda"),
        lambda x: x.nonzero(),
        lambda x: torch.cuda.current_stream().wait_stream(torch.cuda.default_stream()),
    ],
    ids=["item", "synchronize", "stream", "copy of pageable memory", "tensor", "nonzero", "event from outside"],
)
def test_a_capture_refuses_what_waits(order: str, action: Callable[[torch.Tensor], object]) -> None:
    def program() -> None:
        x = range_on("cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream):
            action(x)

    refused("in the capture of a graph|from the other side of a capture", order, program)


@pytest.mark.parametrize("mode", ["global", "thread_local"])
def test_a_capture_of_all_threads_refuses_the_waits_of_others(order: str, mode: str) -> None:
    def program() -> None:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=torch.cuda.Stream(), capture_error_mode=mode):
            thread = threading.Thread(target=lambda: caught.append(outcome(torch.cuda.default_stream().synchronize)))
            thread.start()
            thread.join()

    caught: list[str] = []
    if mode == "global":
        refused("the host waits in the capture of a graph .* mode global", order, program)
        assert caught == ["Fault"]
    else:
        with cuda(order=order):
            program()
        assert caught == ["None"]


def outcome(function: Callable[[], object]) -> str:
    try:
        return str(function())
    except Exception as error:
        return type(error).__name__


def test_a_graph_is_captured_beside_the_default_stream(latest: Runtime) -> None:
    with pytest.raises(RuntimeError, match="non-default stream"):
        torch.cuda.CUDAGraph().capture_begin()
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        torch.cuda.CUDAGraph().replay()


def test_by_default_torch_captures_every_graph_on_the_first_stream(latest: Runtime) -> None:
    for index in (0, 1):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(index), torch.cuda.graph(graph):
            x = torch.zeros(8, device=f"cuda:{index}")
        assert bool(graph.operations) == (index == 0)
        assert x.device.index == index
