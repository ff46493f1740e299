"""rmsnorm_add_rmsnorm: total = residual + rmsnorm(branch, post_weight); normed = rmsnorm(total, pre_weight).

Arithmetic is in float32; the first norm and the sum are rounded to the dtype of the residual stream, normed to that of
branch. Reads branch and residual and writes total and normed once. One program a row, which stays in registers from
the first norm to the second; all loads are issued before the first sum, so that the program waits for memory once.

FMA is off, as in rmsnorm.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import dependent_launch
from .rmsnorm import normalize, row_launch


@triton.jit
def _rmsnorm_add_rmsnorm_kernel(
    total_ptr,
    normed_ptr,
    branch_ptr,
    residual_ptr,
    post_weight_ptr,
    pre_weight_ptr,
    eps,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dependent_launch.wait()
    columns = tl.arange(0, BLOCK)
    offsets = tl.program_id(0).to(tl.int64) * COLUMNS + columns
    within = columns < COLUMNS
    branch = tl.load(branch_ptr + offsets, mask=within, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + offsets, mask=within, other=0.0)
    post_weight = tl.load(post_weight_ptr + columns, mask=within, other=0.0).to(tl.float32)
    pre_weight = tl.load(pre_weight_ptr + columns, mask=within, other=0.0).to(tl.float32)
    post = normalize(branch, post_weight, eps, COLUMNS).to(residual.dtype)
    total = (residual.to(tl.float32) + post.to(tl.float32)).to(residual.dtype)
    tl.store(total_ptr + offsets, total, mask=within)
    normed = normalize(total.to(tl.float32), pre_weight, eps, COLUMNS)
    tl.store(normed_ptr + offsets, normed, mask=within)


def rmsnorm_add_rmsnorm(
    total: Tensor,
    normed: Tensor,
    branch: Tensor,
    residual: Tensor,
    post_weight: Tensor,
    pre_weight: Tensor,
    eps: float,
) -> None:
    """Fill total and normed [T, D] from branch and residual [T, D] and two weights [D].

    All tensors are contiguous, each bf16 or f32; total has the dtype of residual.
    """
    rows, columns = branch.shape
    _rmsnorm_add_rmsnorm_kernel[(rows,)](
        total,
        normed,
        branch,
        residual,
        post_weight,
        pre_weight,
        eps,
        COLUMNS=columns,
        **row_launch(branch),
    )
