"""Cases of geglu: gate and up read once, the output written once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arcmerge.kernels.geglu import geglu
from cases.case import Call, Case, Draw, Expected
from cases.gemma import GEMMA_2
from cases.rmsnorm import half_unit

BF16, F32 = torch.bfloat16, torch.float32


def due(gate: Tensor, up: Tensor, stepwise: bool) -> Expected:
    dtype, exact_gate, exact_up = gate.dtype, gate.double(), up.double()
    inner = math.sqrt(2 / math.pi) * (exact_gate + 0.044715 * exact_gate**3)
    activated = exact_gate * torch.sigmoid(2 * inner)
    # The bound of the kernel: where z > 0, a relative error of z becomes one of 2^z.
    error = 2.0**-22 * (2 + 2 * math.log2(math.e) * (-inner).clamp(min=0))
    if stepwise:
        # Equal bits, except where float32 errors can cross a tie. Rounding is monotonic.
        ends = [((activated * (1 + side * error)).to(dtype).double() * exact_up).to(dtype).double() for side in (-1, 1)]
        return Expected(ends[0], (ends[0] - ends[1]).abs())
    truth = activated * exact_up
    return Expected(truth, truth.abs() * (half_unit(dtype) + error))


def build(
    draw: Draw, rows: int, columns: int, dtype: torch.dtype, stepwise: bool, gap: int = 0, scale: float = 1.0
) -> Call:
    """gate and up are halves of one tensor; or, with a gap, two tensors whose rows begin that many elements late."""
    if gap:
        gate = draw.normal(rows, gap + columns, dtype=dtype, scale=scale)[:, gap:]
        up = draw.normal(rows, 2 * gap + columns, dtype=dtype, scale=scale)[:, 2 * gap :]
    else:
        gate, up = draw.normal(rows, 2 * columns, dtype=dtype, scale=scale).split(columns, 1)
    out = draw.empty(rows, columns, dtype=dtype)

    return Call(
        launch=lambda: geglu(out, gate, up, stepwise),
        outputs={"out": out},
        expected=lambda: {"out": due(gate, up, stepwise)},
        minimum_bytes=3 * rows * columns * dtype.itemsize,
    )


def _case(name: str, *arguments: object, traffic: float | None = 1.0) -> Case:
    # A GPU approximates 2^z and the quotient.
    return Case("geglu", name, lambda draw: build(draw, *arguments), exact=False, traffic=traffic)


SMALL = [
    _case("bf16, whole blocks", 2, 2048, BF16, False),
    _case("bf16, stepwise", 1, 1024, BF16, True),
    _case("bf16, 1025 columns", 2, 1025, BF16, False),
    _case("bf16, stepwise, misaligned", 3, 1023, BF16, True, 3),
    _case("bf16, aligned, of rows apart", 3, 48, BF16, False, 16),
    _case("bf16, near zero", 1, 1024, BF16, False, 0, 1e-4),
    _case("f32", 2, 1000, F32, False),
    _case("f32, 1 column", 2, 1, F32, False, 1),
]

# These have thousands of programs; their traffic is that of the few above.
MODELS = [
    _case(
        f"{shape.name} {rows} rows{', stepwise' * stepwise}",
        rows,
        shape.intermediate_size,
        BF16,
        stepwise,
        traffic=None,
    )
    for shape in GEMMA_2
    for rows in (1, 2048)
    for stepwise in (False, True)
]
