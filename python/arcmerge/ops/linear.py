"""linear: the projections of a network, which are read anew for every token that is generated."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.backend import native_dtype
from arcmerge.dispatch.checks import require_activations, require_dtype_of
from arcmerge.dispatch.registry import op
from arcmerge.errors import ArcmergeError

# Past these rows of x, weights are no longer what takes the time, and a tiled product is the better program.
MOST_TOKENS = 16


def linear(x: Tensor, weights: Sequence[Tensor], *, stepwise: bool = False) -> Tensor:
    """out = x [W_0 | W_1 | ...]^T: the products with several weights side by side, as of query, key and value.

    x: [T, K]. weights: one to three of [M_i, K]. All bfloat16 or all float32, on one device.

    Returns [T, sum M_i], contiguous, in their dtype: sums are in float32 and rounded once. Moves the bytes of weights,
    x and output once where T is at most 16. There the bits of a row of the output depend on neither the other rows nor
    their number; past that torch.mm is called once a weight, with its settings for the precision of sums, but native
    code on processors without instructions for bfloat16. stepwise: by torch.mm in any case, whose sums are those of
    transformers. Raises ArcmergeError for other shapes and dtypes.
    Source: torch.nn.Linear without bias.
    """
    return _linear(x, weights, stepwise)


def require_linear(x: Tensor, **weights: Tensor) -> None:
    """x [T, K] and weights [M, K] of one dtype, bfloat16 or float32, on one device; ArcmergeError if not."""
    require_activations(x=x, **weights)
    require_dtype_of("x", x, **weights)
    if x.dim() != 2:
        raise ArcmergeError(f"'x' must have the shape (T, K), got {tuple(x.shape)}")
    for name, weight in weights.items():
        if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
            raise ArcmergeError(f"'{name}' must have the shape (M, {x.shape[1]}), got {tuple(weight.shape)}")


def _check(x: Tensor, weights: Sequence[Tensor], stepwise: bool) -> None:
    if not 1 <= len(weights) <= 3:
        raise ArcmergeError(f"'weights' must be 1 to 3 tensors, got {len(weights)}")
    require_linear(x, **{f"weights[{number}]": weight for number, weight in enumerate(weights)})


def _reference(x: Tensor, weights: Sequence[Tensor], stepwise: bool) -> Tensor:
    working = torch.promote_types(x.dtype, torch.float32)
    return (x.to(working) @ torch.cat(list(weights)).to(working).T).to(x.dtype)


def _native(x: Tensor, weights: Sequence[Tensor], stepwise: bool) -> Tensor:
    if stepwise or (x.shape[0] > MOST_TOKENS and torch_multiplies(x.dtype)):
        return _products(x, weights)
    out, (tokens, columns) = _fake(x, weights, stepwise), x.shape
    x, weights = x.contiguous(), [weight.contiguous() for weight in weights]
    matrices = [(weight.data_ptr(), len(weight)) for weight in weights]
    _C.linear(out.data_ptr(), x.data_ptr(), tokens, columns, matrices, native_dtype(x.dtype))
    return out


def _triton(x: Tensor, weights: Sequence[Tensor], stepwise: bool) -> Tensor:
    from arcmerge.kernels.linear import linear as launch

    if stepwise or x.shape[0] > MOST_TOKENS:
        return _products(x, weights)
    out = _fake(x, weights, stepwise)
    if out.numel():
        launch(out, x.contiguous(), [weight.contiguous() for weight in weights])
    return out


def torch_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch.mm of many rows is fast on this processor: by oneDNN, which needs instructions for bfloat16.

    Without them a thread of an EPYC 7003 does 11 GFLOP/s there, and native code 90.
    """
    return dtype != torch.bfloat16 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _products(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """By torch.mm, which is the better program where there are many rows."""
    out = _fake(x, weights, True)
    for columns, weight in zip(out.split([len(weight) for weight in weights], dim=1), weights, strict=True):
        with torch.no_grad():  # out= is refused where gradients are recorded
            torch.mm(x, weight.T, out=columns)
    return out


def _fake(x: Tensor, weights: Sequence[Tensor], stepwise: bool) -> Tensor:
    return x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))


_linear = op(
    "linear(Tensor x, Tensor[] weights, bool stepwise) -> Tensor",
    check=_check,
    reference=_reference,
    fake=_fake,
    native=_native,
    triton=_triton,
)
