"""Cases of rmsnorm: x read once, the output written once."""

from __future__ import annotations

import torch
from torch import Tensor

from arcmerge.kernels.rmsnorm import rmsnorm
from cases.case import Call, Case, Draw, Expected
from cases.gemma import GEMMA_2

BF16, F32 = torch.bfloat16, torch.float32
EPSILON = 1e-6

# The relative error of a norm before it is rounded, in units of 2^-24: half the error of a sum of squares, from 16
# additions in a thread and 9 across threads; 2 by rsqrt (2^-22.9); and five more roundings.
FLOAT32_ERROR = 24 * 2.0**-24


def exact(x: Tensor, weight: Tensor) -> Tensor:
    """The norm of rows in float64."""
    values = x.double()
    return values / (values.square().mean(-1, keepdim=True) + EPSILON).sqrt() * (1 + weight.double())


def half_unit(dtype: torch.dtype) -> float:
    """The relative error of rounding to a dtype: 2^-8 for bf16, 2^-24 for f32. That of truncation is twice as large."""
    return torch.finfo(dtype).eps / 2


def due(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Expected:
    truth = exact(x, weight)
    return Expected(truth, truth.abs() * (half_unit(dtype) + FLOAT32_ERROR))


def build(
    draw: Draw, rows: int, columns: int, dtype: torch.dtype, out: torch.dtype, scale: float = 1.0, skip: int = 0
) -> Call:
    """A call with rows of `dtype`, weight and output of dtype `out`; all tensors start `skip` elements past an aligned
    address."""
    x = draw.normal(rows * columns + skip, dtype=dtype, scale=scale)[skip:].view(rows, columns)
    weight = draw.normal(columns + skip, dtype=out, scale=0.5)[skip:]
    filled = draw.empty(rows * columns + skip, dtype=out)[skip:].view(rows, columns)

    return Call(
        launch=lambda: rmsnorm(filled, x, weight, EPSILON),
        outputs={"out": filled},
        expected=lambda: {"out": due(x, weight, out)},
        minimum_bytes=rows * columns * (dtype.itemsize + out.itemsize) + columns * out.itemsize,
    )


def _case(name: str, *arguments: object, traffic: float | None = 1.0) -> Case:
    # A GPU sums over lanes and warps, the interpreter over neighbours.
    return Case("rmsnorm", name, lambda draw: build(draw, *arguments), exact=False, traffic=traffic)


SMALL = [
    # At a scale of 1e-3 the mean square is eps, so that the result depends on where eps is added.
    _case("bf16, 2.6B, of the scale of eps", 2, 2304, BF16, BF16, 1e-3),
    _case("f32 to bf16, 3 rows of 257", 3, 257, F32, BF16),
    _case("f32 to bf16, 8 warps", 1, 2304, F32, BF16),
    _case("bf16, 16 warps", 1, 4608, BF16, BF16),
    _case("f32, 4 rows of 512", 4, 512, F32, F32, 1e-3),
    _case("f32, 4097 columns", 1, 4097, F32, F32),
    _case("bf16, misaligned", 2, 1031, BF16, BF16, 1.0, 3),
    _case("bf16, 1 column", 3, 1, BF16, BF16),
    _case("bf16 to f32, 7 columns", 2, 7, BF16, F32),
]

# These have thousands of programs; their traffic is that of the few above.
MODELS = [
    _case(f"{shape.name} {number} rows of {str(dtype)[6:]}", number, shape.hidden_size, dtype, BF16, traffic=None)
    for shape in GEMMA_2
    for number in (1, 2048)
    for dtype in (F32, BF16)
]
