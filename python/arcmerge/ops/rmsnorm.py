"""rmsnorm: a row divided by its root mean square, times 1 + weight."""

from __future__ import annotations

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.checks import require_activations, shapes
from arcmerge.dispatch.native import native_dtype
from arcmerge.dispatch.registry import op


@op()
def rmsnorm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """out = x * rsqrt(mean(x^2) + eps) * (1 + weight), the mean over the last dimension.

    Arithmetic is in float32 and rounded once. A row has the same bits whatever the other rows are. Moves the bytes of
    x, of the output and of weight once; x is copied first if it is not contiguous.
    Source: Gemma2RMSNorm of transformers, which multiplies by the weight before it rounds.

    Args:
        x: [..., D], bfloat16 or float32.
        weight: [D], bfloat16 or float32, zero-centred as Gemma stores it.
        eps: added to the mean.

    Returns:
        [..., D], contiguous, in the dtype of weight.

    Raises:
        ArcmergeError: for other shapes, dtypes and devices.
    """
    return normalized(x, weight, eps).to(weight.dtype).contiguous()


def normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition before it is rounded: float32, or float64 if x is float64."""
    working = torch.promote_types(x.dtype, torch.float32)
    values = x.to(working)
    return values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps) * (1 + weight.to(working))


@rmsnorm.check
def _check(x: Tensor, weight: Tensor, **_: object) -> None:
    require_activations(x=x, weight=weight)
    shapes("... D, D", x=x, weight=weight)


@rmsnorm.fake
def _fake(x: Tensor, weight: Tensor, **_: object) -> Tensor:
    return torch.empty_like(x, dtype=weight.dtype, memory_format=torch.contiguous_format)


@rmsnorm.native
def _native(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    out = _fake(x, weight)
    if elements := out.numel():
        x, weight, columns = x.contiguous(), weight.contiguous(), weight.shape[0]
        dtypes = native_dtype(x.dtype), native_dtype(weight.dtype)
        rows = elements // columns
        _C.rmsnorm(out.data_ptr(), x.data_ptr(), dtypes[0], weight.data_ptr(), dtypes[1], rows, columns, eps)
    return out


@rmsnorm.triton
def _triton(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    from arcmerge.kernels.rmsnorm import rmsnorm as launch

    out = _fake(x, weight)
    if out.numel():
        columns = len(weight)
        launch(out.view(-1, columns), x.contiguous().view(-1, columns), weight.contiguous(), eps)
    return out
