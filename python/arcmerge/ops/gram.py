"""gram: the dot products of k tensors, from which every merge method takes its coefficients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.checks import require_alike, require_matrix_dim
from arcmerge.dispatch.native import operand
from arcmerge.dispatch.registry import op


@op()
def gram(tensors: Sequence[Tensor], *, base: Tensor | None = None, dim: int | None = None) -> Tensor:
    """G[i, j] = sum of x_i * x_j, or of (x_i - base) * (x_j - base).

    Products are exact, in float64 or for bfloat16 and float16 in float32; sums are in float64, on a GPU in compensated
    float32 where eight neighbours meet. The error is within 1e-9 of |x_i||x_j| at 21 million elements. Reads each
    tensor once; on a GPU, (k - 1) // 4 times if there are more than eight.

    Args:
        tensors: k tensors, any number, of one shape and device, each bfloat16, float16 or float32.
        base: a tensor of that shape, device and kind; differences from it are rounded to float32.
        dim: None for the sum over all elements; 1 for a matrix G of each row of tensors [R, C], 0 for one of each
            column.

    Returns:
        float64 [k, k], or [R or C, k, k], on the device of the tensors.

    Raises:
        ArcmergeError: for tensors of different shapes or devices, other dtypes, and another `dim`.
    """
    values = [tensor.double() if base is None else (tensor.float() - base.float()).double() for tensor in tensors]
    if dim is None:
        stacked = torch.stack(values).reshape(1, len(values), -1)
    else:
        stacked = torch.stack([value.movedim(dim, -1) for value in values], dim=-2)
    products = stacked @ stacked.mT
    return products[0] if dim is None else products


@gram.check
def _check(tensors: Sequence[Tensor], *, base: Tensor | None, dim: int | None) -> None:
    require_alike(tensors, base)
    require_matrix_dim(tensors[0], dim)


@gram.fake
def _fake(tensors: Sequence[Tensor], *, dim: int | None, **_: object) -> Tensor:
    groups = [] if dim is None else [tensors[0].shape[1 - dim % 2]]
    return tensors[0].new_empty([*groups, len(tensors), len(tensors)], dtype=torch.float64)


@gram.native
def _native(tensors: Sequence[Tensor], *, base: Tensor | None, dim: int | None) -> Tensor:
    inputs = [tensor.contiguous() for tensor in tensors]
    operands = [operand(tensor) for tensor in inputs]
    subtracted = None if base is None else base.contiguous()
    base_operand = None if subtracted is None else operand(subtracted)
    k = len(inputs)
    if dim is None:
        return torch.tensor(_C.gram(operands, base_operand, 0, inputs[0].numel()), dtype=torch.float64).view(k, k)
    rows, columns = inputs[0].shape
    out = torch.zeros(rows if dim % 2 else columns, k, k, dtype=torch.float64)
    if columns:
        _C.gram_vectors(operands, base_operand, rows, columns, dim % 2, out.data_ptr())
    return out


@gram.triton
def _triton(tensors: Sequence[Tensor], *, base: Tensor | None, dim: int | None) -> Tensor:
    from arcmerge.kernels.gram import gram as launch

    k = len(tensors)
    if dim in (0, -2):
        tensors, base = [tensor.t() for tensor in tensors], None if base is None else base.t()
    groups = 1 if dim is None else tensors[0].shape[0]
    out = torch.zeros(groups, k, k, dtype=torch.float64, device=tensors[0].device)
    if tensors[0].numel():
        bases = None if base is None else [base.contiguous()]
        launch([[tensor.contiguous() for tensor in tensors]], out, bases=bases, rows=groups)
    return out[0] if dim is None else out
