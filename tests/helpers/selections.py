"""Random arguments of the ops that select elements by magnitude and at random, as torch and as the native code take
them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from arcmerge import _C
from arcmerge.ops.selection import NO_CUT, codes, differences
from operands import BF16, F16, F32, any_bits, at_offset, normal, operand

SHAPES = [(), (0,), (1,), (7,), (5000,), (3, 0), (37, 1), (40, 31), (5, 1500), (2, 3, 500), (3, 2200)]


@dataclass
class Case:
    """The arguments of one call, and how its elements are divided into ranges."""

    tensors: list[Tensor]
    base: Tensor
    cuts: list[Sequence[int]]
    keys: list[int]
    probabilities: list[tuple[float, float]]
    row_scales: Tensor | None
    joint: bool
    rounded: bool
    bounds: list[int]

    @property
    def codes(self) -> Tensor:
        """[k, elements]"""
        found = codes(differences(self.tensors, self.base), self.row_scales, joint=self.joint, rounded=self.rounded)
        return found.reshape(len(self.tensors), -1)

    @property
    def random(self) -> tuple[Tensor, Tensor]:
        """`keys` and `probabilities` as the ops take them."""
        return torch.tensor(self.keys), torch.tensor(self.probabilities, dtype=torch.float64)

    def native(self) -> tuple[list[_C.Operand], _C.Operand, _C.Selection]:
        scales = 0 if self.row_scales is None else self.row_scales.data_ptr()
        columns = self.base.shape[-1] if self.base.ndim else 1
        selection = _C.Selection(self.cuts, self.keys, self.probabilities, columns, self.joint, self.rounded, scales)
        return [*map(operand, self.tensors)], operand(self.base), selection

    def ranges(self) -> list[tuple[int, int, list[tuple[int, int]]]]:
        """(first, count, elements before `first` of the upper and the lower code of each tensor)"""
        found = self.codes
        return [
            (
                first,
                end - first,
                [
                    (int((row[:first] == cut[0]).sum()), int((row[:first] == cut[2]).sum()))
                    for row, cut in zip(found, self.cuts, strict=True)
                ],
            )
            for first, end in pairwise(self.bounds)
        ]


def plain_case(
    tensors: list[Tensor],
    base: Tensor,
    probability: float = 1.0,
    bounds: list[int] | None = None,
    *,
    rounded: bool = True,
) -> Case:
    """A case without cuts, in which all elements of all tensors are kept with one probability."""
    k = len(tensors)
    chances, bounds = [(probability, probability)] * k, bounds or [0, base.numel()]
    return Case(tensors, base, [NO_CUT] * k, list(range(k)), chances, None, joint=False, rounded=rounded, bounds=bounds)


def misaligned_cases() -> Iterator[tuple[list[_C.Operand], _C.Selection, Case]]:
    """Tensors of every length up to 199, half of whose elements are kept, at odd addresses and with NaN behind them.

    Yields the operands of the tensor and the base, the selection, and the case for a reference.
    """
    x, base = normal(200, seed=1), normal(200, seed=2)
    beyond = torch.full((64,), float("nan"), dtype=BF16)
    for count in range(200):
        starts = 2 * (count % 33), 1 + count % 64
        buffers = [
            at_offset(torch.cat([value[:count], beyond]), start) for value, start in zip((x, base), starts, strict=True)
        ]
        operands = [_C.Operand(buffer.data_ptr() + start, 0) for buffer, start in zip(buffers, starts, strict=True)]
        selection = _C.Selection([], [0], [(0.5, 0.5)], count, False, True)
        yield operands, selection, plain_case([x[:count]], base[:count], 0.5)


def random_cut(row: Tensor, draw: random.Random) -> Sequence[int]:
    """Between two elements of the order, or around it."""
    if not len(row) or draw.random() < 0.2:
        return NO_CUT
    order = torch.sort(row, descending=True, stable=True).values
    first = draw.randint(0, len(row) - 1)
    last = draw.randint(first, len(row) - 1)
    upper, lower = int(order[first]), int(order[last])
    return upper, int((order[:first] == upper).sum()), lower, int((order[: last + 1] == lower).sum())


def random_probabilities(draw: random.Random) -> tuple[float, float]:
    """Of all elements alike, or by rank."""
    same = draw.choice([1.0, draw.random()])
    return draw.choice([(same, same), (draw.random(), draw.random())])


def random_tensor(shape: Sequence[int], draw: random.Random, kind: str) -> Tensor:
    dtype, seed, count = draw.choice([BF16, F16, F32]), draw.randrange(2**30), math.prod(shape)
    if kind == "any bits":
        return any_bits(count, dtype, seed).reshape(shape)
    values = normal(*shape, dtype=F32, seed=seed)
    # Few values make many differences of 0 and many equal ones.
    return (values.round() / 4 if kind == "few values" else values).to(dtype)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    chance = random.Random(draw(st.integers(0, 2**30)))
    shape, k = draw(st.sampled_from(SHAPES)), draw(st.sampled_from([1, 2, 3, 5, 11]))
    kind = draw(st.sampled_from(["normal", "few values", "any bits"]))
    tensors = [random_tensor(shape, chance, kind) for _ in range(k)]
    base = random_tensor(shape, chance, kind)
    case = Case(
        tensors,
        base,
        [NO_CUT] * k,
        [chance.randrange(-(2**63), 2**63) for _ in range(k)],
        [random_probabilities(chance) for _ in range(k)],
        normal(*shape[:-1], dtype=F32, seed=k).abs() if shape and draw(st.booleans()) else None,
        joint=draw(st.booleans()),
        rounded=draw(st.booleans()),
        bounds=sorted({0, base.numel(), *(chance.randint(0, base.numel()) for _ in range(draw(st.integers(0, 3))))}),
    )
    case.cuts = [random_cut(row, chance) for row in case.codes]
    return case
