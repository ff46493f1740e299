"""slerp: spherical interpolation of lists of tensors, whole models at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.backend import is_forced
from arcmerge.dispatch.checks import WEIGHTS, require, require_dtype, require_same_device
from arcmerge.dispatch.native import native_dtype, operand
from arcmerge.dispatch.registry import op
from arcmerge.errors import ArcmergeError
from arcmerge.geometry import NEARLY_PARALLEL, NEARLY_ZERO, slerp_coefficients

# Outputs share one allocation, each at a multiple of so many bytes.
_ALIGNMENT = 256


def slerp(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    t: float | Sequence[float] | Tensor,
    *,
    normalize: bool = False,
    nonfinite: Tensor | None = None,
) -> list[Tensor]:
    """out_i = the point at t_i on the arc from a_i to b_i, each tensor taken as one vector.

    With cos θ = <a_i, b_i> / (|a_i| |b_i|),

        out = sin((1 - t) θ) / sin θ · a + sin(t θ) / sin θ · b        (1 - t) a + t b  where |cos θ| > 0.9995

    and with `normalize` as under the parameter `slerp_normalize` of the merge method. Dot products are those of the op
    `gram`. Coefficients are computed in float64 and rounded to float32; without the rounding, those of a GPU are within
    2^-49 (1 + |t|) / sin² θ of those of the CPU for the same dot products; with `normalize`, for a, within that times
    (1 + |t|) max(|a|, |b|) / |a|, and likewise for b. Products and sums are those of the op `combine`, but an input
    whose coefficient is zero has no effect, whatever values it has. So t = 0 and t = 1 copy a and b, apart from the
    payloads of NaN.

    Moves the bytes of both inputs twice and those of the output once: 10 bytes an element of bfloat16. On a GPU the
    host does not wait, four kernels are launched for each combination of dtypes, and with torch 2.11 or newer a CUDA
    graph can capture the call: a replay reads the inputs anew, and t if that is a tensor. Inputs that are not
    contiguous are copied first.

    If all tensors are bfloat16, the package was built with nvcc, and the L2 cache of the GPU is so large that at most
    9.5 bytes an element are predicted to move, a kernel in CUDA C++ does all but the table: two launches.
    ARCMERGE_BACKEND_SLERP=triton or cuda_cpp names one. The dot products of the two may differ in the last bit.

    Args:
        a: n tensors, of any shapes, on one device, each bfloat16, float16 or float32.
        b: n tensors of the same shapes, on the same device.
        t: a number, or n numbers; or a float64 tensor [1] or [n], on the device of the tensors. Not clamped.
        normalize: interpolate the directions on the arc and the lengths linearly.
        nonfinite: int64 [n] on the device of the tensors. The number of elements of each output that are NaN or
            infinite is added to it. A tensor with one in its inputs has no angle: all of the output is NaN, unless t
            is 0 or 1.

    Returns:
        n new contiguous tensors of the promoted dtypes, rounded once. On a GPU they share one allocation.

    Raises:
        ArcmergeError: for lists of different lengths, tensors of different shapes or devices, and other dtypes; in a
            capture with an older torch.

    Source: K. Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985.
    """
    _require_capturable()
    if not isinstance(t, Tensor):
        device = a[0].device if a else torch.device("cpu")
        numbers = [float(each) for each in t] if isinstance(t, Sequence) else [float(t)]
        t = _copied(torch.tensor(numbers, dtype=torch.float64), device)
    *outs, counts = _slerp(a, b, t, normalize=normalize)
    if nonfinite is not None:
        require(nonfinite.shape == counts.shape, "nonfinite", f"have the shape {[*counts.shape]}", [*nonfinite.shape])
        nonfinite += counts
    return outs


@op("slerp")
def _slerp(a: Sequence[Tensor], b: Sequence[Tensor], t: Tensor, *, normalize: bool) -> Sequence[Tensor]:
    """The op `slerp`, of t in a tensor. It returns the outputs and, last, int64 [n]: how many elements of each output
    are NaN or infinite."""
    outs = []
    for pair, position in zip(zip(a, b, strict=True), t.expand(len(a)).tolist(), strict=True):
        x, y = (tensor.double().flatten() for tensor in pair)
        gram = torch.stack([x @ x, x @ y, x @ y, y @ y]).reshape(2, 2)
        weights = _coefficients(gram.numpy(force=True), position, normalize)
        used = [float(weight) * tensor.float() for weight, tensor in zip(weights, pair, strict=True) if weight != 0]
        total = sum(used[1:], used[0]) if used else torch.full_like(pair[0], -0.0)
        outs.append(total.to(torch.promote_types(*(tensor.dtype for tensor in pair))).contiguous())
    return [*outs, torch.stack([(~out.isfinite()).sum() for out in outs])]


def _coefficients(gram: np.ndarray, t: float, normalize: bool) -> np.ndarray:
    """The coefficients of a pair, float32."""
    if t in (0, 1):
        return np.array([1 - t, t], np.float32)
    with np.errstate(all="ignore"):
        if not np.isfinite(gram.sum()):
            return np.full(2, np.nan, np.float32)
        return slerp_coefficients(gram, t, normalize)[0].astype(np.float32)


@_slerp.check
def _check(a: Sequence[Tensor], b: Sequence[Tensor], t: Tensor, **_: object) -> None:
    require(len(a) > 0, "a", "be 1 or more tensors", 0)
    require(len(a) == len(b), "b", f"have as many tensors as 'a', {len(a)}", len(b))
    for index, (one, other) in enumerate(zip(a, b, strict=True)):
        for name, tensor in (("a", one), ("b", other)):
            if tensor.dtype not in WEIGHTS or tensor.device != a[0].device:
                require_dtype(WEIGHTS, **{f"{name}[{index}]": tensor})
                require_same_device(**{"a[0]": a[0], f"{name}[{index}]": tensor})
        if one.shape != other.shape:
            require(False, f"b[{index}]", f"have the shape of 'a[{index}]', {list(one.shape)}", list(other.shape))
    require(t.numel() in (1, len(a)) and t.dim() <= 1, "t", f"have 1 or {len(a)} elements", list(t.shape))
    require_dtype((torch.float64,), t=t)
    require_same_device(**{"a[0]": a[0]}, t=t)


@_slerp.fake
def _fake(a: Sequence[Tensor], b: Sequence[Tensor], *_: Tensor, **__: object) -> list[Tensor]:
    dtypes = [torch.promote_types(one.dtype, other.dtype) for one, other in zip(a, b, strict=True)]
    outs = [one.new_empty(one.shape, dtype=dtype) for one, dtype in zip(a, dtypes, strict=True)]
    return [*outs, a[0].new_zeros(len(a), dtype=torch.int64)]


@_slerp.native
def _native(a: Sequence[Tensor], b: Sequence[Tensor], t: Tensor, *, normalize: bool) -> list[Tensor]:
    *outs, counts = _fake(a, b)
    positions = t.expand(len(a)).tolist()
    for index, (out, *pair, position) in enumerate(zip(outs, a, b, positions, strict=True)):
        inputs = [tensor.contiguous() for tensor in pair]
        operands = [operand(tensor) for tensor in inputs]
        gram = np.array(_C.gram(operands, None, 0, out.numel())).reshape(2, 2)
        weights = _coefficients(gram, position, normalize)
        used = np.flatnonzero(weights) if weights.any() else [0]
        chosen, factors = [operands[each] for each in used], weights[used].tolist()
        counts[index] = _C.combine(out.data_ptr(), native_dtype(out.dtype), chosen, factors, 0, out.numel())
    return [*outs, counts]


@_slerp.triton
def _triton(a: Sequence[Tensor], b: Sequence[Tensor], t: Tensor, *, normalize: bool) -> list[Tensor]:
    from arcmerge.kernels.slerp import slerp as launch

    _require_capturable()
    outs = _in_one_allocation(a, b)
    counts = _copied(torch.zeros(len(a), dtype=torch.int64), t.device)  # a copy, and no launch of a kernel
    launch(
        outs,
        [(one.contiguous(), other.contiguous()) for one, other in zip(a, b, strict=True)],
        t.reshape(-1).contiguous(),
        counts,
        normalize=normalize,
        nearly_parallel=NEARLY_PARALLEL,
        nearly_zero=NEARLY_ZERO,
    )
    return [*outs, counts]


def _cuda_cpp_is_best(a: Sequence[Tensor], b: Sequence[Tensor], *_: Tensor, **__: object) -> bool:
    from arcmerge.cuda.slerp import is_best

    return is_best(a, b)


@_slerp.cuda_cpp(_cuda_cpp_is_best)
def _cuda_cpp(a: Sequence[Tensor], b: Sequence[Tensor], t: Tensor, *, normalize: bool) -> list[Tensor]:
    from arcmerge.cuda import slerp as kernel

    _require_capturable()
    for name, side in (("a", a), ("b", b)):
        require_dtype((torch.bfloat16,), **{f"{name}[{index}]": tensor for index, tensor in enumerate(side)})
    outs = _in_one_allocation(a, b)
    x, y = ([tensor.contiguous() for tensor in side] for side in (a, b))
    try:
        _, counts = kernel.slerp(outs, x, y, t.reshape(-1).contiguous(), normalize=normalize)
    except ArcmergeError as error:
        if is_forced("slerp"):
            raise
        kernel.refuse(t.device, error)
        return _triton(a, b, t, normalize=normalize)
    return [*outs, counts]


def _copied(values: Tensor, device: torch.device) -> Tensor:
    """Values of the host on a device, without a wait."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _require_capturable() -> None:
    """Check that torch keeps pinned memory from which a captured graph copies, if there is a capture."""
    older = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11)
    if older and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        require(False, "torch", "be 2.11 or newer for slerp in a CUDA graph", torch.__version__)


def _in_one_allocation(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """Outputs one after another, because to allocate hundreds takes longer than to launch the kernels."""
    dtypes = [torch.promote_types(one.dtype, other.dtype) for one, other in zip(a, b, strict=True)]
    sizes = [one.numel() * dtype.itemsize for one, dtype in zip(a, dtypes, strict=True)]
    ends = [*itertools.accumulate(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)]
    memory = a[0].new_empty(ends[-1], dtype=torch.uint8)
    return [
        memory[first : first + size].view(dtype).view(one.shape)
        for first, size, dtype, one in zip([0, *ends], sizes, dtypes, a, strict=False)
    ]
