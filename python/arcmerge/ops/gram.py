"""gram: the dot products of k tensors, from which every merge method takes its coefficients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.backend import operand, require_alike, require_matrix_dim
from arcmerge.dispatch.registry import op


def gram(tensors: Sequence[Tensor], *, base: Tensor | None = None, dim: int | None = None) -> Tensor:
    """G[i, j] = sum of x_i * x_j, or of (x_i - base) * (x_j - base).

    tensors: k = 1 to 8 of one shape and device, each bfloat16, float16 or float32. base: one more of that kind, whose
    differences are rounded to float32. dim: None for the sum over everything; 1 for a matrix G of each row of
    (rows, columns) tensors, 0 for one of each column.

    Returns float64 (k, k), or (rows or columns, k, k), on the device of the tensors, within 1e-9 of |x_i||x_j| at 21
    million elements: products are exact, in float64 or for bfloat16 and float16 in float32; sums are in float64, on a
    GPU in compensated float32 where eight neighbours meet.
    Reads each tensor once. Raises ArcmergeError for tensors that are not alike.
    """
    return _gram(tensors, base, dim)


def _check(tensors: Sequence[Tensor], base: Tensor | None, dim: int | None) -> None:
    require_alike(tensors, base)
    if dim is not None:
        require_matrix_dim(tensors[0], dim)


def _reference(tensors: Sequence[Tensor], base: Tensor | None, dim: int | None) -> Tensor:
    along = None if dim is None else dim % 2
    values = [tensor.double() if base is None else (tensor.float() - base.float()).double() for tensor in tensors]
    if along is None:
        stacked = torch.stack(values).reshape(1, len(values), -1)
    else:
        stacked = torch.stack([value.movedim(along, -1) for value in values], dim=-2)
    products = stacked @ stacked.mT
    return products[0] if along is None else products


def _native(tensors: Sequence[Tensor], base: Tensor | None, dim: int | None) -> Tensor:
    along = None if dim is None else dim % 2
    k = len(tensors)
    inputs = [tensor.contiguous() for tensor in tensors]
    operands = [operand(tensor) for tensor in inputs]
    subtracted = None if base is None else base.contiguous()
    base_operand = None if subtracted is None else operand(subtracted)
    if along is None:
        return torch.tensor(_C.gram(operands, base_operand, 0, inputs[0].numel()), dtype=torch.float64).reshape(k, k)
    rows, columns = inputs[0].shape
    out = torch.zeros(rows if along == 1 else columns, k, k, dtype=torch.float64)
    if columns:
        _C.gram_vectors(operands, base_operand, rows, columns, along, out.data_ptr())
    return out


def _triton(tensors: Sequence[Tensor], base: Tensor | None, dim: int | None) -> Tensor:
    along = None if dim is None else dim % 2
    from arcmerge.kernels.gram import gram as launch

    k = len(tensors)
    if along == 0:
        tensors, base = [tensor.t() for tensor in tensors], None if base is None else base.t()
    vectors = 1 if along is None else tensors[0].shape[0]
    out = torch.zeros(vectors, k, k, dtype=torch.float64, device=tensors[0].device)
    if tensors[0].numel():
        bases = None if base is None else [base.contiguous()]
        launch([[tensor.contiguous() for tensor in tensors]], out, bases=bases, rows=vectors)
    return out[0] if along is None else out


def _fake(tensors: Sequence[Tensor], base: Tensor | None, dim: int | None) -> Tensor:
    along = None if dim is None else dim % 2
    vectors = [] if along is None else [tensors[0].shape[1 - along]]
    return tensors[0].new_empty([*vectors, len(tensors), len(tensors)], dtype=torch.float64)


_gram = op(
    "gram(Tensor[] tensors, Tensor? base, int? dim) -> Tensor",
    check=_check,
    reference=_reference,
    fake=_fake,
    native=_native,
    triton=_triton,
)
