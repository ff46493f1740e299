"""Cases of consensus_combine: each input and the base read once, the output written once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arcmerge.kernels.consensus_combine import consensus_combine
from arcmerge.kernels.selection import Choice, limits, rows
from arcmerge.ops.consensus_combine import consensus_combine as op
from arcmerge.ops.selection import codes, differences
from cases.case import Call, Case, Draw, Expected
from cases.differences import differing, in_rows
from cases.gemma import GEMMA_2

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
APART = (0x3C000000, 0, 0x3A000001, 2**62)
"""Cuts of which the equals are all on one side."""


def build(
    draw: Draw,
    counts: Sequence[int],
    dtypes: Sequence[torch.dtype],
    base: torch.dtype,
    out: torch.dtype,
    *,
    kept: float = 1.0,
    ranked: bool = False,
    election: str = "sum",
    floor: float = 0.0,
    zero_is_negative: bool = False,
    inverse: bool = False,
    joint: bool = False,
    rounded: bool = False,
    columns: int = 0,
    skip: int = 0,
    awkward: bool = False,
) -> Call:
    """A call for one group per count.

    kept: the probability to keep an element. ranked: cuts among equals, at a fifth and four fifths of the order.
    columns: of the tensors, whose rows are then scaled; 0 for vectors.
    """
    k = len(dtypes)
    drawn = [differing(draw, count, dtypes, base, skip=skip, awkward=awkward) for count in counts]
    groups, bases = [inputs for inputs, _ in drawn], [last for _, last in drawn]
    outs = [draw.empty(count + skip, dtype=out)[skip:] for count in counts]
    scales = [draw.exact(1 + torch.arange(len(last) // columns) / 7) for last in bases] if columns else None

    def cuts_of(index: int) -> list[tuple[int, int, int, int]]:
        if not ranked or not counts[index]:
            return [APART] * k
        found = codes(
            differences(in_rows(groups[index], columns), *in_rows([bases[index]], columns)), row(index), **kind
        )
        chosen = [_cuts(code.flatten().cpu()) for code in found]
        # Ranks far above the count of elements: all equals are before the cuts.
        upper, _, lower, _ = chosen[-1]
        return [*chosen[:-1], (upper, 2**62, lower, 2**62)] if index else chosen

    def row(index: int) -> Tensor | None:
        return scales[index] if scales else None

    kind = {"joint": joint, "rounded": rounded}
    factors = draw.exact(torch.linspace(-0.4, 1.5, len(counts) * k * 4).reshape(-1, k, 4).flip(1))
    cuts = draw.exact(torch.tensor([cuts_of(index) for index in range(len(counts))]))
    keys = draw.exact(torch.arange(len(counts) * k).reshape(-1, k) * 2**40 - 12345)
    chances = torch.full((len(counts), k), kept, dtype=torch.float64)
    nonfinite = draw.exact(torch.zeros(len(counts), dtype=torch.int64))
    starts = draw.exact(torch.zeros_like(nonfinite))
    choice = Choice(
        keys,
        draw.exact(limits(chances)),
        starts,
        rows(scales, [columns] * len(counts)) if scales else None,
        joint,
        rounded,
    )
    divided = draw.exact(chances.reciprocal().float()) if inverse else None
    options = {"election": election, "zero_is_negative": zero_is_negative, "floor": floor}

    def expected() -> dict[str, Expected]:
        values = {}
        bad = []
        for index, group in enumerate(groups):
            true = op.implementations["reference"](
                in_rows(group, columns),
                *in_rows([bases[index]], columns),
                factors[index],
                cuts[index],
                keys[index],
                chances[index, :, None].expand(k, 2),
                row(index),
                out_dtype=out,
                inverse=inverse,
                **options,
                **kind,
            )
            values[f"out {index}"] = Expected(true.flatten())
            bad.append(int((~true.isfinite()).sum()))
        return {**values, "nonfinite": Expected(torch.tensor(bad))}

    return Call(
        launch=lambda: consensus_combine(
            outs, groups, bases, factors, cuts, choice, nonfinite, scales=divided, ranked=ranked, **options
        ),
        outputs={**{f"out {index}": tensor for index, tensor in enumerate(outs)}, "nonfinite": nonfinite},
        expected=expected,
        minimum_bytes=sum(counts) * (sum(dtype.itemsize for dtype in (*dtypes, base, out))),
        reachable=[*outs, *bases, *(tensor for group in groups for tensor in group), *(scales or [])],
    )


def _cuts(code: Tensor) -> tuple[int, int, int, int]:
    """The cuts before the element at a fifth of the order and after that at four fifths."""
    order = code.sort(descending=True).values
    first, last = len(order) // 5, max(len(order) * 4 // 5, 1)
    upper, lower = int(order[first]), int(order[last - 1])
    return upper, first - int((code > upper).sum()), lower, last - int((code > lower).sum())


def _case(
    name: str, *arguments: object, traffic: float | None = None, access_bytes: int = 16, **options: object
) -> Case:

    def build_case(draw: Draw) -> Call:
        return build(draw, *arguments, **options)

    return Case("consensus_combine", name, build_case, traffic=traffic, access_bytes=access_bytes)


PAIR = (BF16, BF16)
# In addition to the tensors, 56 bytes for each of three segments; for each of two groups, 32 bytes of factors, 64 of
# cuts, 8 of limits and 8 of a start.
TABLES = 3 * 56 + 2 * 112
# The equals, by another launch: the inputs and the base again, the table, codes and starts; 32 bytes written and read.
RANKS = 6 * 49152 + 3 * 56 + 2 * (32 + 8) + 3 * (32 + 32)

SMALL = [
    _case("2 bf16, of many lengths", (16384 + 2061, 1, 7, 0, 2048), PAIR, BF16, BF16, awkward=True),
    _case("2 bf16, misaligned", (2061, 9), PAIR, BF16, BF16, skip=1, kept=0.5, ranked=True, rounded=True),
    _case("2 bf16, 8 bytes past", (2061,), PAIR, BF16, BF16, skip=4, kept=0.5, ranked=True, rounded=True),
    _case("2 bf16, whole segments", (32768, 16384), PAIR, BF16, BF16, traffic=1 + TABLES / (8 * 49152)),
    _case(
        "2 bf16, cuts among equals",
        (32768, 16384),
        PAIR,
        BF16,
        BF16,
        ranked=True,
        rounded=True,
        traffic=1 + (TABLES + RANKS) / (8 * 49152),
    ),
    _case("cuts among equals in many segments", (3 * 16384 + 9,), PAIR, F16, F32, ranked=True, rounded=True, kept=0.9),
    _case(
        "3 of bf16, f16 and f32 by count",
        (2057,),
        (BF16, F16, F32),
        BF16,
        F32,
        election="count",
        kept=0.3,
        inverse=True,
        floor=0.3,
        awkward=True,
    ),
    _case(
        "zero is negative, of rows",
        (8 * 257,),
        (F32, F32),
        F32,
        F16,
        election="count",
        zero_is_negative=True,
        columns=257,
        ranked=True,
        awkward=True,
    ),
    _case("8 bf16, no election", (2057,), (BF16,) * 8, BF16, F32, election="none", kept=0.5, ranked=True),
    _case("the variance of 4", (2057,), (BF16,) * 4, BF16, BF16, joint=True, ranked=True, floor=0.1),
    _case("1 f32", (1033,), (F32,), BF16, F32, election="none", awkward=True),
]

Q_PROJ = (2048 * 2304,)
MODELS = (
    [
        _case(f"{shape.name} gate_proj of 2", (shape.intermediate_size * shape.hidden_size,), PAIR, BF16, BF16)
        for shape in GEMMA_2
    ]
    + [
        # Half as many elements a thread, or a quarter, for lack of registers.
        _case(
            f"2.6B q_proj of {k}",
            Q_PROJ,
            (BF16,) * k,
            BF16,
            BF16,
            kept=0.5,
            access_bytes=16 if k <= 3 else 4 if k == 6 else 8,
        )
        for k in range(2, 9)
    ]
    + [
        _case("2.6B q_proj of 2, cuts among equals", Q_PROJ, PAIR, BF16, BF16, ranked=True, rounded=True),
        _case("2.6B q_proj of 2, of rows", Q_PROJ, PAIR, BF16, BF16, election="none", columns=2304, access_bytes=8),
        _case("2.6B q_proj, the variance of 3", Q_PROJ, (BF16,) * 3, BF16, BF16, joint=True),
    ]
)
