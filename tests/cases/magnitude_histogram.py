"""Cases of magnitude_histogram: each input and its base read once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from arcmerge.kernels.magnitude_histogram import magnitude_histogram
from arcmerge.kernels.selection import Choice, limits, rows
from arcmerge.ops.magnitude_histogram import magnitude_histogram as op
from cases.case import Call, Case, Draw, Expected
from cases.differences import differing, in_rows
from cases.gemma import GEMMA_2

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def build(
    draw: Draw,
    counts: Sequence[int],
    dtypes: Sequence[torch.dtype],
    base: torch.dtype,
    *,
    kept: float = 1.0,
    joint: bool = False,
    rounded: bool = False,
    prefixes: Sequence[int] = (),
    columns: int = 0,
    skip: int = 0,
    awkward: bool = False,
) -> Call:
    """A call for the k tensors of each count, one a group, or with `joint` k in one.

    kept: the probability to keep an element. columns: of the tensors, whose rows are then scaled; 0 for vectors.
    """
    drawn = [differing(draw, count, dtypes, base, skip=skip, awkward=awkward) for count in counts]
    groups = [group for inputs, _ in drawn for group in ([inputs] if joint else [[tensor] for tensor in inputs])]
    bases = [last for _, last in drawn for _ in range(1 if joint else len(dtypes))]
    keys = draw.exact(torch.arange(len(groups)) * 2**40 - 12345)
    probabilities = draw.exact(torch.full((len(groups), 2), kept, dtype=torch.float64))
    wanted = draw.exact(torch.tensor([list(prefixes)] * len(groups))) if prefixes else None
    planes = [2 if rounded else 4, 32768]
    out = draw.exact(torch.zeros(len(groups), *([len(prefixes), 65536] if prefixes else planes), dtype=torch.int64))
    scales = [draw.exact(1 + torch.arange(len(last) // columns) / 7) for last in bases] if columns else None
    choice = Choice(
        keys,
        limits(probabilities[:, 0]),
        draw.exact(torch.zeros(len(groups), dtype=torch.int64)),
        rows(scales, [columns] * len(groups)) if scales else None,
        joint,
        rounded,
    )

    def expected() -> dict[str, Expected]:
        found = [
            op.implementations["reference"](
                in_rows(group, columns),
                *in_rows([bases[index]], columns),
                keys[index : index + 1].expand(len(group)),
                probabilities[index : index + 1].expand(len(group), 2),
                None if wanted is None else wanted[index : index + 1].expand(len(group), -1),
                scales[index] if scales else None,
                joint=joint,
                rounded=rounded,
            )[0]
            for index, group in enumerate(groups)
        ]
        return {"out": Expected(torch.stack(found))}

    return Call(
        launch=lambda: magnitude_histogram(out, groups, bases, choice, prefixes=wanted),
        outputs={"out": out},
        expected=expected,
        minimum_bytes=sum(counts) * (sum(dtype.itemsize for dtype in dtypes) + base.itemsize),
        reachable=[tensor for inputs, last in drawn for tensor in (*inputs, last)] + (scales or []),
    )


def _case(
    name: str, *arguments: object, traffic: float | None = None, access_bytes: int = 16, **options: object
) -> Case:

    def build_case(draw: Draw) -> Call:
        return build(draw, *arguments, **options)

    return Case("magnitude_histogram", name, build_case, traffic=traffic, access_bytes=access_bytes)


# In addition to the tensors, 40 bytes for each of three segments, a limit and a start for each of two groups.
TABLES = 3 * 40 + 2 * 12

SMALL = [
    _case("1 bf16, of many lengths", (16384 + 2061, 1, 7, 0, 2048), (BF16,), BF16, awkward=True),
    _case("1 bf16, misaligned", (8201, 9), (BF16,), BF16, skip=1, kept=0.5, rounded=True),
    _case("1 bf16, 8 bytes past", (8201,), (BF16,), BF16, skip=4, kept=0.5, rounded=True),
    _case(
        "1 bf16, whole segments", (32768, 16384), (BF16,), BF16, rounded=True, traffic=1 + (3 * 40 + 2 * 12) / 196608
    ),
    _case("3 of bf16, f16 and f32, at random", (16384 + 33,), (BF16, F16, F32), BF16, kept=0.3, awkward=True),
    _case("1 f32 less f32, of rows", (33 * 311,), (F32,), F32, columns=311, kept=0.8, awkward=True),
    _case("the variance of 3", (8201,), (BF16, F32, BF16), F16, joint=True, awkward=True),
    _case(
        "the variance of 8, rounded, of rows", (4 * 1031,), (BF16,) * 8, BF16, joint=True, rounded=True, columns=1031
    ),
    _case("2 prefixes", (16384 + 2061, 9), (F32, BF16), BF16, prefixes=(14847, 0), awkward=True),
]

Q_PROJ = (2048 * 2304,)
MODELS = [
    _case(f"{shape.name} gate_proj", (shape.intermediate_size * shape.hidden_size,), (BF16,), BF16, rounded=True)
    for shape in GEMMA_2
] + [
    _case("2.6B q_proj of 2", Q_PROJ, (BF16, BF16), BF16, rounded=True),
    _case("2.6B q_proj, not rounded", Q_PROJ, (BF16,), BF16),
    _case("2.6B q_proj, at random", Q_PROJ, (BF16,), BF16, rounded=True, kept=0.5),
    # The number of its row is 4 bytes for each element, from the cache.
    _case("2.6B q_proj, of rows", Q_PROJ, (BF16,), BF16, columns=2304, access_bytes=8),
    _case("2.6B q_proj, the variance of 3", Q_PROJ, (BF16,) * 3, BF16, joint=True),
    _case("2.6B q_proj, the variance of 8", Q_PROJ, (BF16,) * 8, BF16, joint=True),
    _case("2.6B q_proj, 1 prefix", Q_PROJ, (BF16,), BF16, prefixes=(14847,)),
]
