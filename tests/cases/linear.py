"""Cases of linear: the weights of one launch, x and the output each moved once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arcmerge.kernels.linear import linear
from cases.case import Call, Case, Draw, Expected
from cases.gemma import GEMMA_2, Shape
from cases.rmsnorm import half_unit

BF16, F32 = torch.bfloat16, torch.float32


def exact_product(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x W^T in float64, and the error of float32 sums in any order: K roundings, each 2^-24 of at most sum |x||w|."""
    x, weight = x.double(), weight.double()
    return x @ weight.T, x.shape[1] * 2.0**-24 * (x.abs() @ weight.abs().T)


def matrix(draw: Draw, rows: int, columns: int, dtype: torch.dtype, skip: int = 0, scale: float = 1.0) -> Tensor:
    """A matrix that starts `skip` elements past an aligned address."""
    return draw.normal(rows * columns + skip, dtype=dtype, scale=scale)[skip:].view(rows, columns)


def due(x: Tensor, weight: Tensor) -> Expected:
    truth, error = exact_product(x, weight)
    return Expected(truth, half_unit(x.dtype) * (truth.abs() + error) + error)


def build(draw: Draw, tokens: int, columns: int, rows: Sequence[int], dtype: torch.dtype, skip: int = 0) -> Call:
    x = matrix(draw, tokens, columns, dtype, skip)
    weights = [matrix(draw, count, columns, dtype, skip, columns**-0.5) for count in rows]
    out = draw.empty(tokens, sum(rows), dtype=dtype)

    return Call(
        launch=lambda: linear(out, x, weights),
        outputs={"out": out},
        expected=lambda: {"out": due(x, torch.cat(weights))},
        minimum_bytes=(sum(rows) * columns + tokens * (columns + sum(rows))) * dtype.itemsize,
        operations=2 * tokens * columns * sum(rows),
    )


def _case(name: str, *arguments: object) -> Case:
    # Tensor cores add the 16 columns of a product, and a GPU the slices, in another order than the interpreter.
    return Case("linear", name, lambda draw: build(draw, *arguments), exact=False, traffic=1.0)


SMALL = [
    _case("1 token, 1 column", 1, 1, (1,), BF16),
    _case("1 token, 3 weights that end within blocks", 1, 528, (17, 16, 1), BF16),
    _case("7 tokens, 2 weights, misaligned", 7, 515, (15, 18), BF16, 1),
    _case("8 tokens, an aligned tail", 8, 1040, (16,), BF16),
    _case("8 tokens, misaligned, aligned columns", 8, 144, (17,), BF16, 1),
    _case("8 tokens, 8 bytes past, aligned columns", 8, 144, (17,), BF16, 4),
    _case("9 tokens, 3 weights", 9, 512, (16, 1, 16), BF16),
    _case("16 tokens, odd columns", 16, 1033, (19,), BF16),
    _case("17 tokens, 2 weights, an aligned tail", 17, 528, (33, 15), BF16),
    _case("32 tokens, misaligned", 32, 145, (34,), BF16, 1),
    _case("3 tokens, 3 weights, f32", 3, 70, (5, 18, 16), F32),
    _case("12 tokens, f32", 12, 64, (33,), F32),
]


def _projections(shape: Shape) -> dict[str, tuple[int, tuple[int, ...]]]:
    """The columns and rows of every launch for a layer, except for gate and up, which are in linear_geglu."""
    queries, keys = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    return {
        "q|k|v": (shape.hidden_size, (queries, keys, keys)),
        "o": (queries, (shape.hidden_size,)),
        "down": (shape.intermediate_size, (shape.hidden_size,)),
    }


MODELS = [
    _case(f"{shape.name} {name}, {tokens} tokens", tokens, columns, rows, BF16)
    for shape in GEMMA_2
    for name, (columns, rows) in _projections(shape).items()
    for tokens in (1, 8, 32)
]
