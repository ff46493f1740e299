"""combine: the linear combination of k tensors in which every merge ends."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.backend import native_dtype, operand, require_alike, require_dtype, require_matrix_dim
from arcmerge.dispatch.registry import op
from arcmerge.errors import ArcmergeError


def combine(
    tensors: Sequence[Tensor],
    coefficients: Sequence[float] | Tensor,
    *,
    dim: int | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """out = c_0 * x_0 + c_1 * x_1 + ..., rounded once.

    tensors: k = 1 to 8 of one shape and device, each bfloat16, float16 or float32. coefficients: k numbers; or with
    dim, (rows, k) for every row (dim 1) or (columns, k) for every column (dim 0) of (rows, columns) tensors; rounded
    to float32. out_dtype: of the same three, by default what torch promotes the inputs to.

    Products and sums are rounded to float32 one by one, from left to right, without FMA; the sum is rounded to
    out_dtype, to nearest even. NaN stays NaN. Returns a new contiguous tensor. Moves the bytes of the inputs and of
    the output once. Raises ArcmergeError for tensors that are not alike and coefficients of another shape.
    """
    require_alike(tensors)
    if out_dtype is None:
        out_dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    factors = torch.as_tensor(coefficients, dtype=torch.float64).to(tensors[0].device, torch.float32)
    return _combine(tensors, factors, dim, out_dtype)


def _check(tensors: Sequence[Tensor], factors: Tensor, dim: int | None, out_dtype: torch.dtype) -> None:
    require_alike(tensors)
    require_dtype("'out_dtype'", out_dtype)
    along = None if dim is None else require_matrix_dim(tensors[0], dim)
    shape = (len(tensors),) if along is None else (tensors[0].shape[1 - along], len(tensors))
    if factors.shape != shape:
        raise ArcmergeError(f"'coefficients' must have the shape {shape}, got {tuple(factors.shape)}")


def _reference(tensors: Sequence[Tensor], factors: Tensor, dim: int | None, out_dtype: torch.dtype) -> Tensor:
    along = None if dim is None else dim % 2
    if along is not None:
        factors = factors.T.unsqueeze(1 + along)
    total = factors[0] * tensors[0].float()
    for factor, tensor in zip(factors[1:], tensors[1:], strict=True):
        total = total + factor * tensor.float()
    return total.to(out_dtype).contiguous()


def _native(tensors: Sequence[Tensor], factors: Tensor, dim: int | None, out_dtype: torch.dtype) -> Tensor:
    along = None if dim is None else dim % 2
    inputs = [tensor.contiguous() for tensor in tensors]
    out = torch.empty(inputs[0].shape, dtype=out_dtype)
    operands = [operand(tensor) for tensor in inputs]
    if along is None:
        _C.combine(out.data_ptr(), native_dtype(out_dtype), operands, factors.tolist(), 0, out.numel())
    elif out.numel():
        factors, columns = factors.contiguous(), out.shape[1]
        _C.combine_vectors(
            out.data_ptr(), native_dtype(out_dtype), operands, factors.data_ptr(), 0, out.numel(), columns, along
        )
    return out


def _triton(tensors: Sequence[Tensor], factors: Tensor, dim: int | None, out_dtype: torch.dtype) -> Tensor:
    along = None if dim is None else dim % 2
    from arcmerge.kernels.combine import combine as launch

    if along == 0:
        return _triton([tensor.t() for tensor in tensors], factors, 1, out_dtype).t().contiguous()
    inputs = [tensor.contiguous() for tensor in tensors]
    out = torch.empty(inputs[0].shape, dtype=out_dtype, device=inputs[0].device)
    vectors = 1 if along is None else out.shape[0]
    nonfinite = torch.zeros(vectors, dtype=torch.int64, device=out.device)
    if out.numel():
        launch([out], [inputs], factors.reshape(vectors, len(inputs)).contiguous(), nonfinite, rows=vectors)
    return out


def _fake(tensors: Sequence[Tensor], factors: Tensor, dim: int | None, out_dtype: torch.dtype) -> Tensor:
    return tensors[0].new_empty(tensors[0].shape, dtype=out_dtype)


_combine = op(
    "combine(Tensor[] tensors, Tensor coefficients, int? dim, ScalarType out_dtype) -> Tensor",
    check=_check,
    reference=_reference,
    fake=_fake,
    native=_native,
    triton=_triton,
)
