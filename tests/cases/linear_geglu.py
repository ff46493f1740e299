"""Cases of linear_geglu: both weights, x and the output each moved once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arcmerge.kernels.linear_geglu import linear_geglu
from cases.case import Call, Case, Draw, Expected
from cases.gemma import GEMMA_2
from cases.linear import exact_product, matrix
from cases.rmsnorm import half_unit

BF16, F32 = torch.bfloat16, torch.float32


def gelu_and_error(gate: Tensor) -> tuple[Tensor, Tensor]:
    """gelu of float64 values, and the relative error of the kernel's gelu."""
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return gate * torch.sigmoid(2 * inner), 2.0**-22 * (2 + 2 * math.log2(math.e) * inner.abs())


def build(draw: Draw, tokens: int, columns: int, rows: int, dtype: torch.dtype, skip: int = 0) -> Call:
    x = matrix(draw, tokens, columns, dtype, skip)
    gate_weight, up_weight = (matrix(draw, rows, columns, dtype, skip, columns**-0.5) for _ in range(2))
    out = draw.empty(tokens, rows, dtype=dtype)

    def expected() -> dict[str, Expected]:
        (gate, gate_error), (up, up_error) = (exact_product(x, weight) for weight in (gate_weight, up_weight))
        activated, relative = gelu_and_error(gate)
        # The slope of gelu is at most 1.13.
        activated_error = 1.13 * gate_error + activated.abs() * relative
        error = activated_error * (up.abs() + up_error) + activated.abs() * up_error
        truth = activated * up
        return {"out": Expected(truth, half_unit(dtype) * (truth.abs() + error) + error)}

    return _call(x, gate_weight, up_weight, out, False, expected)


def build_stepwise(draw: Draw, tokens: int, columns: int, rows: int) -> Call:
    """A call with eighths, whose products and sums are exact in float32, so that the rounded products are known."""
    generator = torch.Generator().manual_seed(columns)
    x, gate_weight, up_weight = (
        draw.exact((torch.randn(count, columns, generator=generator) * scale).round().div(scale * unit).to(BF16))
        for count, scale, unit in ((tokens, 8, 1), (rows, 8, 16), (rows, 8, 16))
    )
    out = draw.empty(tokens, rows)

    def expected() -> dict[str, Expected]:
        gate, up = (exact_product(x, weight)[0].to(BF16).double() for weight in (gate_weight, up_weight))
        activated, relative = gelu_and_error(gate)
        # Equal bits, except where float32 errors of gelu can cross a tie. Rounding is monotonic.
        ends = [((activated * (1 + side * relative)).to(BF16).double() * up).to(BF16).double() for side in (-1, 1)]
        return {"out": Expected(ends[0], (ends[0] - ends[1]).abs())}

    return _call(x, gate_weight, up_weight, out, True, expected)


def _call(x: Tensor, gate_weight: Tensor, up_weight: Tensor, out: Tensor, stepwise: bool, expected) -> Call:
    (tokens, columns), rows = x.shape, len(gate_weight)
    return Call(
        launch=lambda: linear_geglu(out, x, gate_weight, up_weight, stepwise),
        outputs={"out": out},
        expected=expected,
        minimum_bytes=(2 * rows * columns + tokens * (columns + rows)) * x.element_size(),
        operations=4 * tokens * columns * rows,
    )


def _case(name: str, *arguments: object) -> Case:
    # Tensor cores add the 16 columns of a product, and a GPU the slices, in another order than the interpreter.
    return Case(
        "linear_geglu",
        name,
        lambda draw: (build_stepwise if "stepwise" in name else build)(draw, *arguments),
        exact=False,
        traffic=1.0,
    )


SMALL = [
    _case("1 token", 1, 528, 17, BF16),
    _case("1 token, stepwise", 1, 272, 16),
    _case("5 tokens, misaligned", 5, 515, 15, BF16, 1),
    _case("8 tokens, stepwise, odd columns", 8, 257, 35),
    _case("9 tokens, an aligned tail", 9, 1040, 16, BF16),
    _case("10 tokens, misaligned, aligned columns", 10, 144, 17, BF16, 1),
    _case("10 tokens, 8 bytes past, aligned columns", 10, 144, 17, BF16, 4),
    _case("16 tokens, stepwise", 16, 272, 18),
    _case("11 tokens, stepwise, odd columns", 11, 77, 5),
    _case("17 tokens, an aligned tail", 17, 208, 33, BF16),
    _case("32 tokens, misaligned", 32, 77, 18, BF16, 1),
    _case("33 tokens, misaligned, aligned columns", 33, 144, 35, BF16, 1),
    _case("64 tokens", 64, 272, 34, BF16),
    _case("2 tokens, f32", 2, 70, 18, F32),
    _case("12 tokens, f32", 12, 64, 16, F32),
]

MODELS = [
    _case(f"{shape.name} gate|up, {tokens} tokens", tokens, shape.hidden_size, shape.intermediate_size, BF16)
    for shape in GEMMA_2
    for tokens in (1, 8, 32, 64)
]
