"""Copies between tensors of the host and of fake devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .runtime import Runtime

if TYPE_CHECKING:
    from .tensor import CudaTensor


def copy(runtime: Runtime, out: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """out.copy_(source), of which one or both are on a fake device."""
    from .tensor import CudaTensor

    if not isinstance(source, CudaTensor):
        assert isinstance(out, CudaTensor)
        _from_host(runtime, out, source, non_blocking)
    elif not isinstance(out, CudaTensor):
        _to_host(runtime, out, source, non_blocking)
    else:
        _between(runtime, out, source)
    return out


def _from_host(runtime: Runtime, out: CudaTensor, source: Tensor, non_blocking: bool) -> None:
    stream, inner = runtime.current_stream(out.device), out.inner
    pinned = source.is_contiguous() and runtime.host_memory.is_pinned(source)
    captured = runtime.capture_of(stream) is not None
    accesses = list(runtime.space.access(inner, writes=True))
    runtime.copied["to devices"] += inner.nbytes
    if pinned and non_blocking:
        pinned_source = _pending(runtime, source, captured, writes=False)
        runtime.enqueue(stream, "a copy from the host", lambda: inner.copy_(pinned_source()), accesses)
        return
    if captured:
        runtime.refuse("a copy that waits, or of memory that is not pinned, in the capture of a graph")
    staged = source.detach().clone()  # by the driver, before the call returns
    runtime.enqueue(stream, "a copy from the host", lambda: inner.copy_(staged), accesses)
    if not non_blocking:
        stream.synchronize()


def _to_host(runtime: Runtime, out: Tensor, source: CudaTensor, non_blocking: bool) -> None:
    stream, inner = runtime.current_stream(source.device), source.inner
    accesses = list(runtime.space.access(inner, writes=False))
    runtime.copied["to the host"] += inner.nbytes
    if non_blocking and out.is_contiguous() and runtime.host_memory.is_pinned(out):
        captured = runtime.capture_of(stream) is not None
        pinned_target = _pending(runtime, out, captured, writes=True)
        runtime.enqueue(stream, "a copy to the host", lambda: pinned_target().copy_(inner), accesses)
        return
    target = out.detach()
    runtime.enqueue(stream, "a copy to the host", lambda: target.copy_(inner), accesses)
    stream.synchronize()


def _pending(runtime: Runtime, tensor: Tensor, captured: bool, writes: bool) -> Callable[[], Tensor]:
    """The tensor at the end of a copy. Those of a graph are not followed: it runs many times."""
    return (lambda: tensor) if captured or not tensor.numel() else runtime.host_memory.pending(tensor, writes)


def blank(tensor: Tensor, device: str) -> Tensor:
    """A tensor of the same sizes, strides and dtype on the CPU or on meta."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _between(runtime: Runtime, out: CudaTensor, source: CudaTensor) -> None:
    """Within a device, or between two, whose current streams then wait for each other, as torch makes them."""
    streams = [runtime.current_stream(tensor.device) for tensor in (source, out)]
    target, inner = out.inner, source.inner
    accesses = [*runtime.space.access(inner, writes=False), *runtime.space.access(target, writes=True)]
    if streams[0] is not streams[1]:
        streams[0].wait_stream(streams[1])
    runtime.enqueue(streams[0], "a copy", lambda: target.copy_(inner), accesses)
    if streams[0] is not streams[1]:
        streams[1].wait_stream(streams[0])


def to_copy(runtime: Runtime, source: Tensor, **options: object) -> Tensor:
    """aten::_to_copy: a new tensor of another dtype, device or layout."""
    non_blocking = bool(options.pop("non_blocking", False))
    device = torch.device(options.pop("device", None) or source.device)  # type: ignore[arg-type]
    options.pop("pin_memory", None)
    like = torch.ops.aten._to_copy.default(blank(source, "meta"), **options)
    if device.type == "cpu":
        out = blank(like, "cpu")
        if non_blocking:
            out = runtime.host_memory.pinned(out)
    else:
        out = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=device)
    return copy(runtime, out, source, non_blocking)
