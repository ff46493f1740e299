"""The launcher of csrc/cuda/slerp.cu: spherical interpolation of a list of pairs of bfloat16 tensors, in one launch."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from arcmerge.cuda.driver import Kernel, library
from arcmerge.errors import ArcmergeError
from arcmerge.kernels.segments import SEGMENT, launches

# As in csrc/cuda/ring.cuh: a ring of four tiles of two inputs, a barrier for each, the sums of eight warps, the result.
THREADS = 256
SHARED = 4 * 2 * 4096 + 4 * 8 + 8 * 3 * 8 + 8
# Code for one architecture has a letter, and runs on no other; the others run on all that are newer.
TARGETS = ("sm_80", "sm_90a", "sm_100a", "sm_120")
# The share of the L2 cache that a batch may fill. An H100 keeps lines in both halves of it, so half is used well.
L2_SHARE = 0.5


def target_of(capability: tuple[int, int]) -> str:
    """The PTX for a device of this compute capability."""
    exact = f"sm_{capability[0]}{capability[1]}a"
    return exact if exact in TARGETS else "sm_120" if capability >= (12, 0) else "sm_80"


def ptx_of(target: str) -> bytes:
    """Raises ArcmergeError if the package was built without nvcc."""
    file = Path(__file__).with_name(f"slerp.{target}.ptx")
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


@cache
def _kernel(device: int) -> Kernel:
    with torch.cuda.device(device):
        return Kernel(library(), ptx_of(target_of(torch.cuda.get_device_capability(device))), "slerp")


def slerp(
    outs: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], t: Tensor, *, normalize: bool = False
) -> tuple[Tensor, Tensor]:
    """Fill outs[i] with the interpolation from a[i] to b[i] at t[i], as the merge method slerp defines it.

    One launch, nothing waits. The result has the bits of `combine` with the coefficients that are returned.

    Args:
        outs, a, b: bfloat16 tensors, contiguous, outs[i], a[i] and b[i] of one length, all on one GPU.
        t: float64 [V], on that GPU, of magnitudes below 1e4. 0 and 1 copy every bit of an input.
        normalize: interpolate the directions on the arc and the lengths linearly.

    Returns:
        float32 [V, 2] coefficients; int64 [V], how many values written are infinite or NaN.

    Raises:
        ArcmergeError: if the driver is missing or refuses the kernel.
    """
    device = outs[0].device
    with torch.cuda.device(device):
        properties = torch.cuda.get_device_properties(device)
        kernel = _kernel(device.index)
        resident = kernel.resident_blocks(THREADS, SHARED) * properties.multi_processor_count
        arguments = prepared(outs, a, b, t, normalize, properties.L2_cache_size)
        launch(kernel, arguments, resident, torch.cuda.current_stream(device).cuda_stream)
    return arguments.coefficients, arguments.nonfinites


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


def prepared(
    outs: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], t: Tensor, normalize: bool, cache_bytes: int
) -> Arguments:
    """The arguments for a device with so large an L2 cache: tables, scratch memory and results."""
    device = outs[0].device
    ((_, segments, runs),) = launches(list(zip(a, b, outs, strict=True)))
    batches = torch.tensor(batches_of([out.numel() for out in outs], cache_bytes), dtype=torch.int32)
    return Arguments(
        segments,
        # A copy from pageable memory would wait for the stream.
        batches if device.type == "cpu" else batches.pin_memory().to(device, non_blocking=True),
        runs,
        t,
        partials=torch.empty(len(segments), 3, dtype=torch.float64, device=device),
        arrived=torch.zeros(1, dtype=torch.int32, device=device),
        coefficients=torch.empty(len(outs), 2, dtype=torch.float32, device=device),
        nonfinites=torch.zeros(len(outs), dtype=torch.int64, device=device),
        batch_count=len(batches) - 1,
        normalize=normalize,
    )


def launch(kernel: Kernel, arguments: Arguments, resident: int, stream: int) -> None:
    """Launch the kernel. resident: blocks that fit on the device at a time."""
    values = [
        ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else ctypes.c_int(value) for value in arguments
    ]
    kernel.launch_cooperative(min(resident, len(arguments.segments)), THREADS, SHARED, stream, values)
