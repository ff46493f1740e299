"""rmsnorm: a row divided by its root mean square, times 1 + weight."""

from __future__ import annotations

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.backend import native_dtype
from arcmerge.dispatch.checks import require_activations, require_shape
from arcmerge.dispatch.registry import op


def rmsnorm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """out = x * rsqrt(mean(x^2) + eps) * (1 + weight), the mean over the last dimension.

    x: [..., D]. weight: [D], zero-centred as Gemma stores it. Each bfloat16 or float32.

    Returns [..., D], contiguous, in the dtype of weight. Arithmetic is in float32 and rounded once. A row has the same
    bits whatever rows are beside it. Moves the bytes of x, of the output and of weight once; x is copied first if it is
    not contiguous. Raises ArcmergeError for other shapes and dtypes.
    Source: Gemma2RMSNorm of transformers, which multiplies by the weight before it rounds.
    """
    return _rmsnorm(x, weight, eps)


def normalized(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition, not yet rounded: float32, or float64 if x is."""
    working = torch.promote_types(x.dtype, torch.float32)
    values = x.to(working)
    return values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps) * (1 + weight.to(working))


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    require_activations(x=x, weight=weight)
    require_shape(x.shape[-1:], weight=weight)


def _reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return normalized(x, weight, eps).to(weight.dtype).contiguous()


def _native(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = _fake(x, weight, eps)
    if out.numel():
        x, weight, columns = x.contiguous(), weight.contiguous(), len(weight)
        dtypes = native_dtype(x.dtype), native_dtype(weight.dtype)
        _C.rmsnorm(
            out.data_ptr(), x.data_ptr(), dtypes[0], weight.data_ptr(), dtypes[1], x.numel() // columns, columns, eps
        )
    return out


def _triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from arcmerge.kernels.rmsnorm import rmsnorm as launch

    out = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    if out.numel():
        columns = len(weight)
        launch(out.view(-1, columns), x.contiguous().view(-1, columns), weight.contiguous(), eps)
    return out


def _fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape, dtype=weight.dtype)


_rmsnorm = op(
    "rmsnorm(Tensor x, Tensor weight, float eps) -> Tensor",
    check=_check,
    reference=_reference,
    fake=_fake,
    native=_native,
    triton=_triton,
)
