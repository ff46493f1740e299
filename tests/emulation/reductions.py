"""Reductions and scans of the interpreter, by halves as on a GPU.

Triton's stock interpreter calls the function once an element, and passes sum, min, max, cumsum and cumprod to numpy,
also for codes of bfloat16. Here those take the general way, in which every step rounds, as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as stock_interpreter
from numpy.typing import NDArray
from triton.runtime.interpreter import ReduceOps, ScanOps

Array = NDArray[Any]
Stock = Callable[..., Any]


def reduce(stock: Stock, reduction: ReduceOps, tensors: Sequence[tl.tensor]) -> Any:
    if any(tensor.dtype == tl.bfloat16 for tensor in tensors):
        return reduction.generic_reduce(tensors)
    return stock(reduction, tensors)


def generic_reduce(stock: Stock, reduction: ReduceOps, tensors: Sequence[tl.tensor]) -> list[tl.tensor]:
    arrays = [tensor.handle.data for tensor in tensors]
    axis = reduction.axis
    kept = [1 if axis in (None, number) else size for number, size in enumerate(arrays[0].shape)]
    arrays = [array.ravel() if axis is None else np.moveaxis(array, axis, 0) for array in arrays]
    dtypes = [tensor.dtype for tensor in tensors]
    while half := len(arrays[0]) // 2:
        arrays = _combined(reduction, dtypes, [array[:half] for array in arrays], [array[half:] for array in arrays])
    reduced = [array[0].reshape(kept) if reduction.keep_dims else array[0] for array in arrays]
    return [reduction.to_tensor(array, dtype) for array, dtype in zip(reduced, dtypes, strict=True)]


def cumulate(stock: Stock, scan: ScanOps, tensor: tl.tensor) -> list[tl.tensor]:
    """cumsum and cumprod."""
    return scan.generic_scan((tensor,)) if tensor.dtype == tl.bfloat16 else stock(scan, tensor)


def generic_scan(stock: Stock, scan: ScanOps, tensors: Sequence[tl.tensor]) -> list[tl.tensor]:
    dtypes = [tensor.dtype for tensor in tensors]
    arrays = [np.moveaxis(tensor.handle.data, scan.axis, 0) for tensor in tensors]
    step = 1
    while step < len(arrays[0]):
        # Hillis and Steele. Rolled, and cut afterwards, because the size of a block must be a power of two.
        earlier = [np.roll(array, step, axis=0) for array in arrays]
        combined = _combined(scan, dtypes, earlier, arrays)
        arrays = [np.concatenate([old[:step], new[step:]]) for old, new in zip(arrays, combined, strict=True)]
        step *= 2
    moved = [np.ascontiguousarray(np.moveaxis(array, 0, scan.axis)) for array in arrays]
    return [scan.to_tensor(array, dtype) for array, dtype in zip(moved, dtypes, strict=True)]


def _combined(
    operation: ReduceOps | ScanOps, dtypes: Sequence[tl.dtype], left: Sequence[Array], right: Sequence[Array]
) -> list[Array]:
    def tensors(arrays: Sequence[Array]) -> Iterator[tl.tensor]:
        for array, dtype in zip(arrays, dtypes, strict=True):
            yield operation.to_tensor(np.ascontiguousarray(array), dtype)

    results = operation.combine_fn(*tensors(left), *tensors(right))
    results = results if isinstance(results, tuple) else (results,)
    semantic = stock_interpreter.interpreter_semantic
    casts = (semantic.cast(semantic.to_tensor(result), dtype) for result, dtype in zip(results, dtypes, strict=True))
    return [np.broadcast_to(cast.handle.data, left[0].shape) for cast in casts]
