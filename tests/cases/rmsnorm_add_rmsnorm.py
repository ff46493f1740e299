"""Cases of rmsnorm_add_rmsnorm: branch and residual read once, both outputs written once."""

from __future__ import annotations

import torch
from torch import Tensor

from arcmerge.kernels.rmsnorm_add_rmsnorm import rmsnorm_add_rmsnorm
from cases.case import Call, Case, Draw, Expected
from cases.gemma import GEMMA_2
from cases.rmsnorm import BF16, EPSILON, F32, FLOAT32_ERROR, exact, half_unit


def exact_total(branch: Tensor, residual: Tensor, post_weight: Tensor) -> Expected:
    """The new residual stream, with the exact bits of its steps where float32 errors cannot cross a tie.

    For a float32 stream, the errors of the norm and of the sum are part of the tolerance.
    """
    post, dtype = exact(branch, post_weight), residual.dtype
    if dtype == F32:
        total = residual.double() + post
        return Expected(total, post.abs() * FLOAT32_ERROR + total.abs() * 2.0**-24)
    # bf16 sums of bf16 are exact in float64. Rounding is monotonic: values in between stay in between.
    ends = [
        (residual.double() + (post * (1 + error)).to(dtype).double()).to(dtype).double()
        for error in (-FLOAT32_ERROR, FLOAT32_ERROR)
    ]
    return Expected(ends[0], (ends[0] - ends[1]).abs())


def due(branch: Tensor, residual: Tensor, post_weight: Tensor, pre_weight: Tensor) -> dict[str, Expected]:
    total = exact_total(branch, residual, post_weight)
    truth = exact(total.value, pre_weight)
    # An error of the sum changes its own element of the norm and, by the length of the row, all others.
    value, error = total.value, torch.as_tensor(total.tolerance)
    length = (value * error).abs().sum(-1, keepdim=True) / value.square().sum(-1, keepdim=True)
    share = error / value.abs().clamp(min=1e-30) + length
    tolerance = truth.abs() * (half_unit(branch.dtype) + FLOAT32_ERROR + share)
    return {"total": total, "normed": Expected(truth, tolerance)}


def build(
    draw: Draw,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    stream: torch.dtype,
    scale: float = 1.0,
    skip: int = 0,
) -> Call:
    """A call with branch, weights and normed of `dtype` and the residual of `stream`; all tensors start `skip` elements
    past an aligned address."""

    def matrix(of: torch.dtype, scale: float) -> Tensor:
        return draw.normal(rows * columns + skip, dtype=of, scale=scale)[skip:].view(rows, columns)

    def empty(of: torch.dtype) -> Tensor:
        return draw.empty(rows * columns + skip, dtype=of)[skip:].view(rows, columns)

    branch, residual = matrix(dtype, scale), matrix(stream, 3.0)
    post_weight, pre_weight = (draw.normal(columns + skip, dtype=dtype, scale=0.5)[skip:] for _ in range(2))
    total, normed = empty(stream), empty(dtype)

    return Call(
        launch=lambda: rmsnorm_add_rmsnorm(total, normed, branch, residual, post_weight, pre_weight, EPSILON),
        outputs={"total": total, "normed": normed},
        expected=lambda: due(branch, residual, post_weight, pre_weight),
        minimum_bytes=2 * rows * columns * (dtype.itemsize + stream.itemsize) + 2 * columns * dtype.itemsize,
    )


def _case(name: str, *arguments: object, traffic: float | None = 1.0) -> Case:
    # A GPU sums over lanes and warps, the interpreter over neighbours.
    return Case(
        "rmsnorm_add_rmsnorm",
        name,
        lambda draw: build(draw, *arguments),
        exact=False,
        traffic=traffic,
    )


SMALL = [
    # At a scale of 1e-3 the mean square is eps, so that the result depends on where eps is added.
    _case("bf16 on f32, 2.6B, of the scale of eps", 2, 2304, BF16, F32, 1e-3),
    _case("bf16 chain, 2.6B", 2, 2304, BF16, BF16),
    _case("bf16 on f32, 16 warps", 1, 4608, BF16, F32),
    _case("bf16 chain, 16 warps", 1, 8192, BF16, BF16),
    _case("f32, 3 rows of 257", 3, 257, F32, F32),
    _case("bf16 chain, misaligned", 2, 1031, BF16, BF16, 1.0, 3),
    _case("bf16 on f32, 7 columns", 3, 7, BF16, F32),
]

# These have thousands of programs; their traffic is that of the few above.
MODELS = [
    _case(f"{shape.name} {number} rows on {str(stream)[6:]}", number, shape.hidden_size, BF16, stream, traffic=None)
    for shape in GEMMA_2
    for number in (1, 2048)
    for stream in (F32, BF16)
]
