"""A CUDA runtime without a GPU, behind torch.cuda's interface.

    with cuda(devices=2, order="latest"):
        arcmerge.merge(recipe, folder, device="cuda:1")

Tensors, streams, events, pinned memory, the caching allocator and graphs behave as on GPUs, but an operation on a
device is executed on the CPU as late as the rules of CUDA allow, or as early, or in random orders. Kernels run in
Triton's interpreter. `Fault` is raised for a program whose result depends on chance:

- memory that two streams use, one of them to write, without an event or a wait between the two uses;
- memory that is used after it was freed, or handed out again while another stream uses it;
- memory of the host that is written while a copy from or to it is pending, or unregistered;
- a launch with tensors of another device than the current one;
- a wait, or a copy of memory that is not pinned, while a graph is captured.

A program that reads a result too early, or never replays a graph, computes with poison: NaN in every format.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch._dynamo import trace_rules

from .fault import Fault
from .guard import guarded
from .interface import replacements
from .runtime import ORDERS, Runtime, _active

__all__ = ["ORDERS", "Fault", "Runtime", "cuda", "is_possible"]

# Operations that make or fill a tensor where the dispatch to subclasses does not see it, or for which torch has an
# implementation that writes to a tensor of another size. Builds for CUDA have all of these.
_REPLACED = (
    *("empty.memory_format", "empty_strided", "copy_"),
    *("arange", "arange.start", "arange.start_step", "eye", "eye.m"),
)


@contextmanager
def cuda(devices: int = 1, order: str = "latest", seed: int = 0, memory: int = 8 << 30) -> Iterator[Runtime]:
    """Replace torch.cuda by fake devices in this process, for tests.

    Args:
        devices: their number.
        order: one of ORDERS.
        seed: of the random order.
        memory: bytes of each device.

    Yields:
        The runtime, with its counts of launches and waits.

    Raises:
        Fault: at the end at the latest, if one was found.
    """
    # torch.compile lists the functions of torch once, and must not list those that replace them.
    trace_rules.get_torch_obj_rule_map()
    runtime = Runtime(devices, order, seed, memory)
    overwrite = torch.__future__.set_overwrite_module_params_on_conversion
    with ExitStack() as stack:
        _active.append(runtime)
        stack.callback(_active.remove, runtime)
        runtime.open()
        for owner, name, replacement in replacements(runtime):
            stack.enter_context(mock.patch.object(owner, name, replacement, create=True))
        stack.enter_context(_kernels())
        stack.enter_context(guarded(lambda: runtime.current_device))
        # Modules that move to a device get new parameters: a tensor of the CPU cannot become one of a subclass.
        stack.callback(overwrite, torch.__future__.get_overwrite_module_params_on_conversion())
        overwrite(True)
        yield runtime
        runtime.finish()
        if runtime.faults:
            raise runtime.faults[0]


@contextmanager
def _kernels() -> Iterator[None]:
    """Operations of torch on CUDA, of which a build for the CPU has none, and others replace few."""
    from .tensor import aten, call

    fallback, kernels = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    try:
        fallback.fallback(lambda func, *args, **kwargs: call(func, *args, **kwargs), "CUDA")
        for name in _REPLACED:
            packet, _, overload = name.partition(".")
            func = getattr(getattr(aten, packet), overload or "default")
            kernels.impl(name, lambda *args, func=func, **kwargs: call(func, *args, **kwargs), "CUDA")
        yield
    finally:
        fallback._destroy()
        kernels._destroy()


def is_possible() -> bool:
    """Whether this build of torch, which may have a CUDA of its own, lets it be replaced."""
    try:
        with cuda(), torch.inference_mode():
            return bool((torch.tensor([1.0], device="cuda").to(torch.bfloat16) + 1).tolist() == [2.0])
    except Exception:
        if torch.version.cuda is None and torch.version.hip is None:
            raise
        return False
