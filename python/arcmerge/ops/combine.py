"""combine: the linear combination of k tensors, the last step of methods whose rule is one."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.checks import WEIGHTS, require_alike, require_dtype, require_matrix_dim, shapes
from arcmerge.dispatch.native import native_dtype, operand
from arcmerge.dispatch.registry import op


def combine(
    tensors: Sequence[Tensor],
    coefficients: Sequence[float] | Tensor,
    *,
    dim: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """out = c_0 * x_0 + c_1 * x_1 + ..., rounded once.

    Products and sums are rounded to float32 one by one, from left to right, without FMA; the sum is rounded to
    out_dtype, to nearest even. NaN stays NaN. Moves the bytes of the inputs and of the output once; on a GPU,
    8 bytes an element more for every seven inputs beyond the first eight.

    Args:
        tensors: k tensors, any number, of one shape and device, each bfloat16, float16 or float32.
        coefficients: [k]; or with dim, for tensors [R, C], one row of k for every row, [R, k] (dim 1), or for every
            column, [C, k] (dim 0). They are rounded to float32.
        dim: the dimension that shares coefficients; None if all elements do.
        out_dtype: bfloat16, float16 or float32; by default what torch promotes the inputs to.

    Returns:
        A new contiguous tensor of the shape and on the device of the tensors.

    Raises:
        ArcmergeError: for tensors of different shapes or devices, other dtypes, and coefficients of another shape.
    """
    require_alike(tensors)
    if out_dtype is None:
        out_dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    factors = torch.as_tensor(coefficients, dtype=torch.float64).to(tensors[0].device, torch.float32)
    return _combine(tensors, factors, dim=dim, out_dtype=out_dtype)


@op("combine")
def _combine(tensors: Sequence[Tensor], coefficients: Tensor, *, dim: int | None, out_dtype: torch.dtype) -> Tensor:
    """The op `combine`, of coefficients in a float32 tensor."""
    if dim is not None:
        coefficients = coefficients.T.unsqueeze(1 + dim % 2)
    total = coefficients[0] * tensors[0].float()
    for factor, tensor in zip(coefficients[1:], tensors[1:], strict=True):
        total = total + factor * tensor.float()
    return total.to(out_dtype).contiguous()


@_combine.check
def _check(tensors: Sequence[Tensor], coefficients: Tensor, *, dim: int | None, out_dtype: torch.dtype) -> None:
    require_alike(tensors)
    require_dtype(WEIGHTS, out_dtype=out_dtype)
    require_matrix_dim(tensors[0], dim)
    if dim is None:
        shapes("k", coefficients=coefficients, k=len(tensors))
    elif dim % 2:
        shapes("R k", coefficients=coefficients, R=len(tensors[0]), k=len(tensors))
    else:
        shapes("C k", coefficients=coefficients, C=tensors[0].shape[1], k=len(tensors))


@_combine.fake
def _fake(tensors: Sequence[Tensor], *_: Tensor, out_dtype: torch.dtype, **__: object) -> Tensor:
    return tensors[0].new_empty(tensors[0].shape, dtype=out_dtype)


@_combine.native
def _native(tensors: Sequence[Tensor], coefficients: Tensor, *, dim: int | None, out_dtype: torch.dtype) -> Tensor:
    inputs = [tensor.contiguous() for tensor in tensors]
    out = _fake(tensors, out_dtype=out_dtype)
    operands = [operand(tensor) for tensor in inputs]
    if dim is None:
        _C.combine(out.data_ptr(), native_dtype(out_dtype), operands, coefficients.tolist(), 0, out.numel())
    elif out.numel():
        coefficients, columns = coefficients.contiguous(), out.shape[1]
        _C.combine_vectors(
            out.data_ptr(),
            native_dtype(out_dtype),
            operands,
            coefficients.data_ptr(),
            0,
            out.numel(),
            columns,
            dim % 2,
        )
    return out


@_combine.triton
def _triton(tensors: Sequence[Tensor], coefficients: Tensor, *, dim: int | None, out_dtype: torch.dtype) -> Tensor:
    from arcmerge.kernels.combine import combine as launch

    if dim in (0, -2):
        turned = [tensor.t() for tensor in tensors]
        return _triton(turned, coefficients, dim=1, out_dtype=out_dtype).t().contiguous()
    inputs = [tensor.contiguous() for tensor in tensors]
    out = _fake(tensors, out_dtype=out_dtype)
    vectors = 1 if dim is None else out.shape[0]
    nonfinite = torch.zeros(vectors, dtype=torch.int64, device=out.device)
    if out.numel():
        launch([out], [inputs], coefficients.reshape(vectors, len(inputs)).contiguous(), nonfinite, rows=vectors)
    return out
