"""Cases of gram: each input read once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from arcmerge.kernels.gram import gram
from cases.case import Call, Case, Draw, Expected
from cases.gemma import GEMMA_2

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def build(
    draw: Draw, counts: Sequence[int], dtypes: Sequence[torch.dtype], base: torch.dtype | None = None, skip: int = 0
) -> Call:
    """A call for one group per count; every tensor starts `skip` elements past an aligned address."""
    k = len(dtypes)
    groups = [[draw.normal(count + skip, dtype=dtype)[skip:] for dtype in dtypes] for count in counts]
    bases = None if base is None else [draw.normal(count + skip, dtype=base)[skip:] for count in counts]
    out = draw.empty(len(counts), k, k, dtype=torch.float64)

    def expected() -> dict[str, Expected]:
        values = [[tensor.float() for tensor in group] for group in groups]
        if bases is not None:
            values = [[tensor - base.float() for tensor in group] for group, base in zip(values, bases, strict=True)]
        stacked = [torch.stack(group).double() for group in values]
        matrices = torch.stack([group @ group.T for group in stacked])
        lengths = matrices.diagonal(dim1=1, dim2=2).sqrt()
        # The contract of the op; the error is near 1e-16.
        return {"out": Expected(matrices, 1e-9 * lengths[:, :, None] * lengths[:, None, :])}

    return Call(
        launch=lambda: gram(groups, out, bases=bases),
        outputs={"out": out},
        expected=expected,
        minimum_bytes=sum(counts) * sum(dtype.itemsize for dtype in (*dtypes, *([base] if base else []))),
        reachable=[tensor for group in groups for tensor in group] + (bases or []),
    )


def _case(name: str, *arguments: object, traffic: float | None = None, access_bytes: int = 16) -> Case:

    def build_case(draw: Draw) -> Call:
        return build(draw, *arguments)

    # A GPU sums over lanes and warps, the interpreter over neighbours.
    return Case("gram", name, build_case, exact=False, traffic=traffic, access_bytes=access_bytes)


SMALL = [
    _case("2 bf16, of many lengths", (16384 + 2061, 1, 7, 0, 2048), (BF16, BF16)),
    _case("2 bf16, misaligned", (2061, 9), (BF16, BF16), None, 1),
    _case("2 bf16, 8 bytes past", (2061,), (BF16, BF16), None, 4),
    # In addition, for each of three segments, 32 bytes of the table and 4 partial sums, written and read; for each of
    # two groups, 24 bytes of the second kernel's table and 4 sums.
    _case(
        "2 bf16, whole segments",
        (32768, 16384),
        (BF16, BF16),
        traffic=1 + (3 * (32 + 2 * 32) + 2 * (24 + 32)) / (4 * 49152),
    ),
    _case("3 of bf16 and f16 less a base", (1033,), (BF16, F16, BF16), BF16),
    _case("2 f32", (1033,), (F32, F32)),
    _case("8 bf16", (1033,), (BF16,) * 8),
    _case("9 bf16, in three launches", (1033, 5), (BF16,) * 9),
]

MODELS = [
    _case(f"{shape.name} gate_proj of 2", (shape.intermediate_size * shape.hidden_size,), (BF16, BF16))
    for shape in GEMMA_2
] + [
    # More than four inputs are summed four elements at a time, for lack of registers.
    _case(f"2.6B q_proj of {k}", (2048 * 2304,), (BF16,) * k, access_bytes=16 if k <= 4 else 8)
    for k in range(3, 9)
]
