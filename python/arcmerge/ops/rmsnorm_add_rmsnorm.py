"""rmsnorm_add_rmsnorm: a norm, the sum with the residual stream and the next norm, in one pass over a row."""

from __future__ import annotations

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.checks import require_activations, require_same_dtype, shapes
from arcmerge.dispatch.native import native_dtype
from arcmerge.dispatch.registry import op
from arcmerge.ops.rmsnorm import normalized


@op()
def rmsnorm_add_rmsnorm(
    branch: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor, *, eps: float
) -> tuple[Tensor, Tensor]:
    """total = residual + rmsnorm(branch, post_weight); normed = rmsnorm(total, pre_weight).

    Arithmetic is in float32. Between the norms, values are rounded to the dtype of residual: not at all if it is
    float32; if it is bfloat16, as in transformers, the first norm and the sum are each rounded, and the second norm is
    that of the rounded sum. A row has the same bits whatever the other rows are. Moves the bytes of branch, residual,
    both outputs and both weights once; inputs are copied first if they are not contiguous.
    Source: Gemma2DecoderLayer of transformers.

    Args:
        branch: [..., D], the output of attention or of the MLP, in the dtype of the weights.
        residual: [..., D], the residual stream, bfloat16 or float32.
        post_weight: [D], bfloat16 or float32, of the norm that ends the branch.
        pre_weight: [D], of the norm that begins the next branch, in the dtype of post_weight.
        eps: as in `rmsnorm`.

    Returns:
        (total, normed), both [..., D] and contiguous: the new residual stream in the dtype of residual, and normed in
        the dtype of pre_weight.

    Raises:
        ArcmergeError: for other shapes, dtypes and devices.
    """
    total = residual + normalized(branch, post_weight, eps).to(residual.dtype)
    normed = normalized(total, pre_weight, eps).to(pre_weight.dtype)
    return total.contiguous(), normed.contiguous()


@rmsnorm_add_rmsnorm.check
def _check(branch: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor, **_: object) -> None:
    require_activations(branch=branch, residual=residual, post_weight=post_weight, pre_weight=pre_weight)
    require_same_dtype(branch=branch, post_weight=post_weight, pre_weight=pre_weight)
    tensors = {"branch": branch, "residual": residual, "post_weight": post_weight, "pre_weight": pre_weight}
    shapes("... D, ... D, D, D", **tensors)


@rmsnorm_add_rmsnorm.fake
def _fake(branch: Tensor, residual: Tensor, *_: Tensor, **__: object) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(residual, memory_format=torch.contiguous_format),
        torch.empty_like(branch, memory_format=torch.contiguous_format),
    )


@rmsnorm_add_rmsnorm.native
def _native(*tensors: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total, normed = _fake(*tensors)
    if total.numel():
        branch, residual, post_weight, pre_weight = (tensor.contiguous() for tensor in tensors)
        columns = post_weight.shape[0]
        _C.rmsnorm_add_rmsnorm(
            total.data_ptr(),
            normed.data_ptr(),
            branch.data_ptr(),
            residual.data_ptr(),
            native_dtype(residual.dtype),
            post_weight.data_ptr(),
            pre_weight.data_ptr(),
            native_dtype(branch.dtype),
            branch.numel() // columns,
            columns,
            eps,
        )
    return total, normed


@rmsnorm_add_rmsnorm.triton
def _triton(*tensors: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from arcmerge.kernels.rmsnorm_add_rmsnorm import rmsnorm_add_rmsnorm as launch

    total, normed = _fake(*tensors)
    if total.numel():
        branch, residual, post_weight, pre_weight = (tensor.contiguous() for tensor in tensors)
        rows = (-1, len(post_weight))
        launch(
            total.view(rows), normed.view(rows), branch.view(rows), residual.view(rows), post_weight, pre_weight, eps
        )
    return total, normed
