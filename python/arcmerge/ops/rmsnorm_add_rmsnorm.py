"""rmsnorm_add_rmsnorm: what lies between two linear layers of Gemma-2, in one reading of a row."""

from __future__ import annotations

from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.backend import native_dtype
from arcmerge.dispatch.checks import require_activations, require_dtype_of, require_shape
from arcmerge.dispatch.registry import op
from arcmerge.ops.rmsnorm import normalized


def rmsnorm_add_rmsnorm(
    branch: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """total = residual + rmsnorm(branch, post_weight); normed = rmsnorm(total, pre_weight).

    branch: [..., D], what attention or the MLP gave. residual: [..., D], the residual stream. post_weight: [D], of the
    norm that ends the branch; pre_weight: [D], of the norm that begins the next. Each bfloat16 or float32; branch has
    the dtype of post_weight, and the weights have one dtype.

    Returns (total, normed), both [..., D] and contiguous: the new residual stream in the dtype of residual, and normed
    in that of pre_weight. Arithmetic is in float32. What is between the norms is rounded to the dtype of residual: not
    at all if that is float32; if it is bfloat16, as in transformers, the first norm and the sum are each rounded, and
    the second norm is that of the rounded sum. A row has the same bits whatever rows are beside it. Moves the bytes of
    branch, residual, both outputs and both weights once; inputs are copied first if they are not contiguous. Raises
    ArcmergeError for other shapes and dtypes.
    Source: Gemma2DecoderLayer of transformers.
    """
    return _rmsnorm_add_rmsnorm(branch, residual, post_weight, pre_weight, eps)


def _check(branch: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor, eps: float) -> None:
    require_activations(branch=branch, residual=residual, post_weight=post_weight, pre_weight=pre_weight)
    require_dtype_of("branch", branch, post_weight=post_weight, pre_weight=pre_weight)
    require_shape(branch.shape, residual=residual)
    require_shape(branch.shape[-1:], post_weight=post_weight, pre_weight=pre_weight)


def _reference(
    branch: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = residual + normalized(branch, post_weight, eps).to(residual.dtype)
    normed = normalized(total, pre_weight, eps).to(pre_weight.dtype)
    return total.contiguous(), normed.contiguous()


def _native(
    branch: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total, normed = _fake(branch, residual, post_weight, pre_weight, eps)
    if branch.numel():
        branch, residual = branch.contiguous(), residual.contiguous()
        post_weight, pre_weight = post_weight.contiguous(), pre_weight.contiguous()
        columns = len(post_weight)
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


def _triton(
    branch: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    from arcmerge.kernels.rmsnorm_add_rmsnorm import rmsnorm_add_rmsnorm as launch

    total, normed = _fake(branch, residual, post_weight, pre_weight, eps)
    if branch.numel():
        rows = (-1, len(post_weight))
        launch(
            total.view(rows),
            normed.view(rows),
            branch.contiguous().view(rows),
            residual.contiguous().view(rows),
            post_weight.contiguous(),
            pre_weight.contiguous(),
            eps,
        )
    return total, normed


def _fake(
    branch: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    shape = branch.shape
    return residual.new_empty(shape), branch.new_empty(shape, dtype=pre_weight.dtype)


_rmsnorm_add_rmsnorm = op(
    "rmsnorm_add_rmsnorm(Tensor branch, Tensor residual, Tensor post_weight, Tensor pre_weight, float eps)"
    " -> (Tensor residual, Tensor normed)",
    check=_check,
    reference=_reference,
    fake=_fake,
    native=_native,
    triton=_triton,
)
