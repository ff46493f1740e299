"""Cases of combine: each input read once, the output written once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from arcmerge.kernels.combine import combine
from cases.case import Call, Case, Draw, Expected
from cases.gemma import GEMMA_2

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def build(draw: Draw, counts: Sequence[int], dtypes: Sequence[torch.dtype], out: torch.dtype, skip: int = 0) -> Call:
    """A call for one group per count; every tensor starts `skip` elements past an aligned address."""
    groups = [[draw.normal(count + skip, dtype=dtype)[skip:] for dtype in dtypes] for count in counts]
    outs = [draw.empty(count + skip, dtype=out)[skip:] for count in counts]
    coefficients = draw.normal(len(counts), len(dtypes), dtype=F32)
    nonfinite = draw.exact(torch.zeros(len(counts), dtype=torch.int64))

    def expected() -> dict[str, Expected]:
        values = {}
        for index, (group, row) in enumerate(zip(groups, coefficients, strict=True)):
            total = group[0].float() * row[0]
            for tensor, coefficient in zip(group[1:], row[1:], strict=True):
                total = total + tensor.float() * coefficient
            values[f"out {index}"] = Expected(total.to(out))
        return {**values, "nonfinite": Expected(torch.zeros_like(nonfinite))}

    return Call(
        launch=lambda: combine(outs, groups, coefficients, nonfinite),
        outputs={**{f"out {index}": tensor for index, tensor in enumerate(outs)}, "nonfinite": nonfinite},
        expected=expected,
        minimum_bytes=sum(counts) * (sum(dtype.itemsize for dtype in dtypes) + out.itemsize),
        reachable=[*outs, *(tensor for group in groups for tensor in group)],
    )


def _case(name: str, *arguments: object, traffic: float | None = None) -> Case:
    return Case("combine", name, lambda draw: build(draw, *arguments), traffic=traffic)


SMALL = [
    _case("2 bf16, of many lengths", (16384 + 2061, 1, 7, 0, 2048), (BF16, BF16), BF16),
    _case("2 bf16, misaligned", (2061, 9), (BF16, BF16), BF16, 1),
    _case("2 bf16, 8 bytes past", (2061,), (BF16, BF16), BF16, 4),
    # In addition the table: 40 bytes for each of three segments, two float32 coefficients for each of two groups.
    _case("2 bf16, whole segments", (32768, 16384), (BF16, BF16), BF16, traffic=1 + (3 * 40 + 2 * 8) / (6 * 49152)),
    _case("bf16 and f32 to f16", (2057,), (BF16, F32), F16),
    _case("8 f32 to bf16", (2057,), (F32,) * 8, BF16),
    # As each but the last launch of a sum of more than eight.
    _case("f32 and 7 bf16 to f32", (2057,), (F32, *[BF16] * 7), F32),
    _case("1 f16 to f32", (2057,), (F16,), F32),
]

MODELS = [
    _case(f"{shape.name} gate_proj of 2", (shape.intermediate_size * shape.hidden_size,), (BF16, BF16), BF16)
    for shape in GEMMA_2
] + [_case(f"2.6B q_proj of {k}", (2048 * 2304,), (BF16,) * k, BF16) for k in range(3, 9)]
