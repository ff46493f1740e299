"""Tensors of a fake device: their values lie in a block, and operations on them are appended to the current stream.

Sizes and strides of results are known at once, from torch's meta tensors; values appear when the stream executes the
operation on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map_only

from . import copies
from .allocator import Allocation
from .runtime import Runtime, active
from .stream import Stream

aten = torch.ops.aten


class CudaTensor(Tensor):
    """A tensor whose device is cuda.

    Attributes:
        inner: the elements, a tensor on the CPU in the memory of a block.
        allocation: keeps the block.
    """

    inner: Tensor
    allocation: Allocation

    @staticmethod
    def __new__(cls, inner: Tensor, allocation: Allocation) -> CudaTensor:
        tensor: CudaTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            storage_size=inner.untyped_storage().nbytes(),
            dtype=inner.dtype,
            device=allocation.block.stream.device,
        )
        tensor.inner, tensor.allocation = inner, allocation
        return tensor

    def __init__(self, *_: Any) -> None:
        pass

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"CudaTensor({list(self.shape)}, {self.dtype}, {self.device})"

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.detach().clone()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {self.device} device type tensor to numpy")
        return self.detach().cpu().numpy()

    def is_pinned(self, *_: Any) -> bool:
        return False

    def record_stream(self, stream: Stream) -> None:
        block = self.allocation.block
        if stream is not block.stream:
            block.recorded[stream.id] = stream.ticks

    # Results of operations are what the dispatch below returns, also tensors of the CPU.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, *args, **kwargs or {})


def call(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation of torch of which an argument, or the result, is on a fake device."""
    runtime = active()
    if func.namespace == "arcmerge":  # the implementation for CUDA, which launches kernels
        return func._op_dk(torch._C.DispatchKey.CUDA, *args, **kwargs)
    if special := _SPECIAL.get(func):
        return special(runtime, *args, **kwargs)
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return func.decompose(*args, **kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, CudaTensor)]
    if torch.Tag.inplace_view in func.tags:
        return _reshaped(func, *args, **kwargs)
    if not tensors or _makes(func):
        return _made(runtime, func, args, kwargs)
    returns = [each.alias_info for each in func._schema.returns]
    if returns and all(alias is not None and not alias.is_write for alias in returns):
        return _view(func, tensors[0], args, kwargs)
    return _enqueued(runtime, func, tensors, args, kwargs)


def _inner(values: Any) -> Any:
    return tree_map_only(CudaTensor, lambda tensor: tensor.inner, values)


def _like(func: Any, args: Any, kwargs: Any) -> Any:
    """The results without values, on the device meta."""
    args, kwargs = tree_map_only(Tensor, lambda tensor: copies.blank(tensor, "meta"), (args, kwargs))
    return func(*args, **({**kwargs, "device": "meta"} if "device" in kwargs else kwargs))


def empty(like: Tensor, device: torch.device | None) -> CudaTensor:
    """Memory for a tensor of the sizes and strides of `like`, on the current stream."""
    runtime = active()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    nbytes = (extent if like.numel() else 0) * like.element_size()
    allocation = runtime.allocators[runtime.index_of(device)].allocate(nbytes)
    with torch.inference_mode(False):
        elements = allocation.block.data[:nbytes].view(like.dtype).as_strided(like.shape, like.stride())
    return CudaTensor(elements, allocation)


def _makes(func: Any) -> bool:
    name = func._schema.name.removeprefix("aten::")
    return name.startswith("new_") or name.endswith("_like")


def _made(runtime: Runtime, func: Any, args: Any, kwargs: Any) -> Tensor:
    """A new tensor that depends on no values of others: empty, arange, zeros_like and so on."""
    device = kwargs.get("device") or next(leaf.device for leaf in tree_leaves(args) if isinstance(leaf, Tensor))
    like = _like(func, args, {**kwargs, "device": device})
    args = tree_map_only(Tensor, lambda tensor: copies.blank(tensor, "cpu"), args)
    values = lambda: func(*args, **{**kwargs, "device": "cpu"})  # noqa: E731
    if device.type == "cpu":
        return values()
    out = empty(like, device)
    if "empty" not in func._schema.name:
        target = out.inner
        _append(runtime, func, out.device, lambda: target.copy_(values()), [], [out])
    return out


def _view(func: Any, base: CudaTensor, args: Any, kwargs: Any) -> Any:
    with torch.inference_mode(False):
        found = func(*_inner(args), **_inner(kwargs))
    with torch.inference_mode(base.is_inference()):  # a view of a normal tensor is one, also in that mode
        return tree_map_only(Tensor, lambda view: CudaTensor(view, base.allocation), found)


def _reshaped(func: Any, tensor: CudaTensor, *args: Any, **kwargs: Any) -> CudaTensor:
    """A change of sizes and strides in place, such as squeeze_. What is enqueued keeps the old ones."""
    with no_dispatch():
        func(tensor, *args, **kwargs)
    with torch.inference_mode(False):
        tensor.inner = func(tensor.inner.detach(), *args, **kwargs)
    return tensor


def _enqueued(runtime: Runtime, func: Any, tensors: list[CudaTensor], args: Any, kwargs: Any) -> Any:
    device = tensors[0].device
    on_host = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.device.type == "cpu"]
    if any(tensor.device != device for tensor in tensors) or (
        any(tensor.dim() for tensor in on_host) and "index" not in func._schema.name
    ):
        devices = sorted({str(tensor.device) for tensor in (*tensors, *on_host)})
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {', '.join(devices)}")
    # A launch takes the values that tensors of the host have now.
    staged = tree_map_only(Tensor, lambda tensor: tensor if isinstance(tensor, CudaTensor) else tensor.clone(), args)
    inner, named = _inner(staged), _inner(kwargs)
    written = list(_written(func, args, kwargs))
    read = [tensor for tensor in tensors if not any(tensor is each for each in written)]
    if written:
        _append(runtime, func, device, lambda: func(*inner, **named), read, written)
        several = len(func._schema.returns) > 1
        return tuple(written) if several else written[0] if func._schema.returns else None
    if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
        _append(runtime, func, device, lambda: None, read, [])
        runtime.current_stream(device).synchronize()
        found = func(*inner, **named)
        stored = lambda tensor: copies.to_copy(runtime, tensor, device=device, non_blocking=True)  # noqa: E731
        return tree_map_only(Tensor, stored, found)
    found = tree_map_only(Tensor, lambda like: empty(like, device), _like(func, args, kwargs))
    outputs = [leaf for leaf in tree_leaves(found) if isinstance(leaf, CudaTensor)]
    targets = _inner(outputs)

    def run() -> None:
        results = [leaf for leaf in tree_leaves(func(*inner, **named)) if isinstance(leaf, Tensor)]
        for target, result in zip(targets, results, strict=True):
            target.copy_(result)

    _append(runtime, func, device, run, read, outputs)
    return found


def _append(
    runtime: Runtime,
    func: Any,
    device: torch.device,
    run: Callable[[], Any],
    read: list[CudaTensor],
    written: list[CudaTensor],
) -> None:
    accesses = [
        access
        for tensors, writes in ((read, False), (written, True))
        for tensor in tensors
        for access in runtime.space.access(tensor.inner, writes)
    ]
    runtime.counts["launches"] += 1
    runtime.enqueue(runtime.current_stream(device), str(func), run, accesses)


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[CudaTensor]:
    """The arguments that the schema says are changed."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, CudaTensor))


def _item(runtime: Runtime, tensor: CudaTensor) -> Any:
    return copies.to_copy(runtime, tensor, device=torch.device("cpu")).item()


_SPECIAL: dict[Any, Callable[..., Any]] = {
    aten.copy_.default: copies.copy,
    aten._to_copy.default: copies.to_copy,
    aten._local_scalar_dense.default: _item,
}
