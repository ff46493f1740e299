"""The launcher of csrc/cuda/slerp.cu: spherical interpolation of a list of pairs of bfloat16 tensors, in one launch."""

from __future__ import annotations

import ctypes
import itertools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import arcmerge.cuda
from arcmerge.cuda import driver
from arcmerge.cuda.driver import Kernel
from arcmerge.cuda.targets import TARGETS
from arcmerge.errors import ArcmergeError
from arcmerge.kernels.segments import SEGMENT, Launch, tabulated

# As in csrc/cuda/ring.cuh: a ring of four tiles of two inputs, a barrier for each, the sums of eight warps, the result.
THREADS = 256
SHARED = 4 * 2 * 4096 + 4 * 8 + 8 * 3 * 8 + 8
# The bytes an element that the kernels of Triton move, and the most that this one may move to be chosen.
TRITON_BYTES, MOST_BYTES = 10.0, 9.5
# The share of the L2 cache that a batch may fill. An H100 keeps lines in both halves of it, so half is used well.
L2_SHARE = 0.5


def target_of(capability: tuple[int, int]) -> str:
    """The PTX for a device of this compute capability."""
    exact = f"sm_{capability[0]}{capability[1]}a"
    return exact if exact in TARGETS else "sm_120" if capability >= (12, 0) else "sm_80"


def ptx_of(target: str) -> bytes:
    """Raises ArcmergeError if the package was built without nvcc."""
    file = arcmerge.cuda.FOLDER / f"slerp.{target}.ptx"
    if not file.exists():
        raise ArcmergeError(f"'{file.name}' must be in the package, got none; build arcmerge where nvcc is installed")
    return file.read_bytes()


def batches_of(elements: Sequence[int], cache_bytes: int) -> list[int]:
    """The first segment of each batch, and the end of the last: as many whole pairs as half of the cache holds.

    Args:
        elements: of each tensor.
        cache_bytes: of the L2 cache.
    """
    starts, segments, filled = [0], 0, 0
    for count in elements:
        if filled and filled + 4 * count > L2_SHARE * cache_bytes:
            starts.append(segments)
            filled = 0
        segments += max(1, -(-count // SEGMENT))
        filled += 4 * count
    return [*starts, segments]


def traffic(elements: Sequence[int], cache_bytes: int) -> float:
    """The bytes of DRAM for each element that the order of the segments leaves: a prediction, with half of L2 in use.

    Inputs are read for their products, then again, except for what the cache has kept of the end of a batch; outputs
    are written.
    """
    starts = batches_of(elements, cache_bytes)
    total, moved, first, segments, size = sum(elements), 6.0 * sum(elements), iter(starts[1:]), 0, 0
    end = next(first)
    for count in elements:
        segments += max(1, -(-count // SEGMENT))
        size += 4 * count
        if segments == end:
            moved += max(0.0, size - L2_SHARE * cache_bytes)
            end, size = next(first, -1), 0
    return moved / total


class _Loaded(NamedTuple):
    """The kernel on one device."""

    kernel: Kernel
    resident: int  # blocks that fit on the device at a time
    cache_bytes: int


# By the index of the device: the kernel, or why the driver has refused it.
_loaded: dict[int, _Loaded | ArcmergeError] = {}


def is_best(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Whether this kernel is chosen for pairs on a GPU: the rule, in one place.

    It is if all tensors are bfloat16, the package has the PTX for the device, the driver has not refused it, and the
    L2 cache is large enough that at most MOST_BYTES bytes an element are predicted to move, where Triton moves
    TRITON_BYTES.
    """
    device, elements = a[0].device, [tensor.numel() for tensor in a]
    if any(tensor.dtype != torch.bfloat16 for tensor in itertools.chain(a, b)) or not sum(elements):
        return False
    if isinstance(_loaded.get(device.index), ArcmergeError):
        return False
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0) or not (arcmerge.cuda.FOLDER / f"slerp.{target_of(capability)}.ptx").exists():
        return False
    return traffic(elements, torch.cuda.get_device_properties(device).L2_cache_size) <= MOST_BYTES


def refuse(device: torch.device, error: ArcmergeError) -> None:
    """Choose this kernel no more on a device, and warn of the reason."""
    if not isinstance(_loaded.get(device.index), ArcmergeError):
        warnings.warn(f"slerp runs in Triton on {device}, because {error}", stacklevel=2)
    _loaded[device.index] = error


def slerp(
    outs: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], t: Tensor, *, normalize: bool = False
) -> tuple[Tensor, Tensor]:
    """Fill outs[i] with the interpolation from a[i] to b[i] at t[i], by the formula of the op `slerp`.

    Two launches, of which one makes the table of segments. They are enqueued on torch's current stream of the device,
    the host does not wait, and a graph can capture them. The result has the bits of `combine` with the coefficients
    that are returned, but an input whose coefficient is zero has no effect.

    Args:
        outs, a, b: bfloat16 tensors, contiguous, outs[i], a[i] and b[i] of one length, all on the current GPU.
        t: float64 [V] or [1], on that GPU. 0 and 1 copy an input, apart from the payloads of NaN.
        normalize: interpolate the directions on the arc and the lengths linearly.

    Returns:
        float32 [V, 2] coefficients; int64 [V], how many values written are infinite or NaN.

    Raises:
        ArcmergeError: if the package was built without nvcc, or the driver is missing or refuses the kernel.
    """
    device = outs[0].device
    (table,) = tabulated([*zip(a, b, outs, strict=True)], outs[0])
    # A thread has no context for the driver before torch or Triton has used the device in it.
    loaded = _load(device)
    arguments = prepared(table, outs, t, normalize, loaded.cache_bytes)
    launch(loaded.kernel, arguments, loaded.resident, torch.cuda.current_stream(device).cuda_stream)
    return arguments.coefficients, arguments.nonfinites


def _load(device: torch.device) -> _Loaded:
    """The kernel on the current device, compiled at its first use."""
    found = _loaded.get(device.index)
    if not isinstance(found, _Loaded):
        properties = torch.cuda.get_device_properties(device)
        code = ptx_of(target_of(torch.cuda.get_device_capability(device)))
        kernel = Kernel(driver.library(), code, "slerp")
        resident = kernel.resident_blocks(THREADS, SHARED) * properties.multi_processor_count
        found = _loaded[device.index] = _Loaded(kernel, resident, properties.L2_cache_size)
    return found


class Arguments(NamedTuple):
    """The arguments of the kernel, as csrc/cuda/slerp.cu describes them."""

    segments: Tensor
    batches: Tensor
    runs: Tensor
    t: Tensor
    partials: Tensor
    arrived: Tensor
    coefficients: Tensor
    nonfinites: Tensor
    batch_count: int
    normalize: bool
    run_stride: int
    t_stride: int


def prepared(table: Launch, outs: Sequence[Tensor], t: Tensor, normalize: bool, cache_bytes: int) -> Arguments:
    """The arguments for a device with so large an L2 cache: tables, scratch memory and results."""
    device, count = outs[0].device, len(outs)
    batches = batches_of([out.numel() for out in outs], cache_bytes)
    # One copy writes counts and the barrier, zero, and the batches. From pageable memory it would wait for the stream.
    values = torch.tensor([0] * (2 * count + 1) + batches, dtype=torch.int32)
    copied = values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)
    return Arguments(
        table.table,
        copied[2 * count + 1 :],
        table.runs,
        t,
        partials=torch.empty(len(table.table), 3, dtype=torch.float64, device=device),
        arrived=copied[2 * count : 2 * count + 1],
        coefficients=torch.empty(count, 2, dtype=torch.float32, device=device),
        nonfinites=copied[: 2 * count].view(torch.int64),
        batch_count=len(batches) - 1,
        normalize=normalize,
        run_stride=table.runs.stride(0),
        t_stride=int(len(t) > 1),
    )


def launch(kernel: Kernel, arguments: Arguments, resident: int, stream: int) -> None:
    """Launch the kernel. resident: blocks that fit on the device at a time."""
    values = [
        ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else ctypes.c_int(value) for value in arguments
    ]
    kernel.launch_cooperative(min(resident, len(arguments.segments)), THREADS, SHARED, stream, values)
