"""linear: the projections of a network, whose weights are read for every token that is generated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.checks import require, require_activations, require_same_dtype, shapes
from arcmerge.dispatch.native import native_dtype
from arcmerge.dispatch.registry import op

# With more rows of x, a product is no longer bound by the bandwidth of its weights, and torch.mm is faster. On a GPU
# that holds for matrix units, which multiply bfloat16.
MAX_ROWS = 16
MAX_ROWS_ON_GPU = 32


@op()
def linear(x: Tensor, weights: Sequence[Tensor], *, stepwise: bool = False) -> Tensor:
    """out = x [W_0 | W_1 | ...]^T: the products with several weights side by side, as of query, key and value.

    Sums are in float32 and rounded once. Moves the bytes of weights, x and output once where T is at most 16, in
    bfloat16 on a GPU 32. There the bits of a row of the output depend on neither the other rows nor their number. For
    larger T, torch.mm is called once a weight, with its settings for the precision of sums; on a GPU once for all
    weights that lie side by side in memory; but native code on processors that have no instructions for bfloat16.
    Source: torch.nn.Linear without bias.

    Args:
        x: [T, K], bfloat16 or float32.
        weights: one to three of [M_i, K], in the dtype and on the device of x.
        stepwise: call torch.mm for any T, whose sums are those of transformers.

    Returns:
        [T, sum M_i], contiguous, in the dtype of x.

    Raises:
        ArcmergeError: for other shapes, dtypes and devices.
    """
    working = torch.promote_types(x.dtype, torch.float32)
    return (x.to(working) @ torch.cat(list(weights)).to(working).T).to(x.dtype)


@linear.check
def _check(x: Tensor, weights: Sequence[Tensor], **_: object) -> None:
    require(1 <= len(weights) <= 3, "weights", "be 1 to 3 tensors", len(weights))
    named = {f"weights[{index}]": weight for index, weight in enumerate(weights)}
    require_activations(x=x, **named)
    require_same_dtype(x=x, **named)
    shapes(", ".join(["T K", "M_0 K", "M_1 K", "M_2 K"][: len(named) + 1]), x=x, **named)


@linear.fake
def _fake(x: Tensor, weights: Sequence[Tensor], **_: object) -> Tensor:
    return x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))


@linear.native
def _native(x: Tensor, weights: Sequence[Tensor], *, stepwise: bool) -> Tensor:
    if stepwise or (x.shape[0] > MAX_ROWS and torch_multiplies(x.dtype)):
        return _products(x, weights)
    out, (rows, columns) = _fake(x, weights), x.shape
    x, weights = x.contiguous(), [weight.contiguous() for weight in weights]
    matrices = [(weight.data_ptr(), weight.shape[0]) for weight in weights]
    _C.linear(out.data_ptr(), x.data_ptr(), rows, columns, matrices, native_dtype(x.dtype))
    return out


@linear.triton
def _triton(x: Tensor, weights: Sequence[Tensor], *, stepwise: bool) -> Tensor:
    from arcmerge.kernels.linear import linear as launch

    if stepwise:
        return _products(x, weights)
    if x.shape[0] > (MAX_ROWS_ON_GPU if x.dtype == torch.bfloat16 else MAX_ROWS):
        whole = side_by_side(weights)
        return _products(x, weights if whole is None else [whole])
    out = _fake(x, weights)
    if out.numel():
        launch(out, x.contiguous(), [weight.contiguous() for weight in weights])
    return out


def torch_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch.mm of many rows is fast on this processor: by oneDNN, which needs instructions for bfloat16.

    Without them a thread of an EPYC 7003 does 11 GFLOP/s in torch.mm, and 90 in native code.
    """
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def side_by_side(weights: Sequence[Tensor]) -> Tensor | None:
    """The tensor [sum M_i, K] of which weights [M_i, K] are the parts; None if they are not side by side in memory."""
    first, end = weights[0], weights[0].data_ptr()
    for weight in weights:
        if not weight.is_contiguous() or weight.data_ptr() != end:
            return None
        end += weight.nbytes
    # Tensors that were allocated apart may be neighbours by chance; the memory of the first must reach to the end.
    storage = first.untyped_storage()
    if first.storage_offset() * first.element_size() + end - first.data_ptr() > storage.nbytes():
        return None
    return first.detach().as_strided((sum(map(len, weights)), first.shape[1]), first.stride())


def _products(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The products by torch.mm."""
    out = _fake(x, weights)
    for columns, weight in zip(out.split([len(weight) for weight in weights], dim=1), weights, strict=True):
        with torch.no_grad():  # out= is refused where gradients are recorded
            torch.mm(x, weight.T, out=columns)
    return out
