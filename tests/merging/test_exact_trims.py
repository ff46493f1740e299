"""Thresholds, kept elements and restored norms against sorts in plain Python, on adversarial tensors.

Nothing here uses the package's histograms: magnitudes are sorted as Python floats, stably, and summed by math.fsum.
"""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import arcmerge
from arcmerge.merging.execution.cpu.native import measured
from arcmerge.merging.execution.statistics_pass import joined
from arcmerge.merging.methods.magnitudes import Order
from arcmerge.merging.methods.measure import NO_CUT, Counts, Histogram, Selection, Statistic
from arcmerge.merging.methods.method import Arguments
from arcmerge.merging.methods.registry import get
from arcmerge.merging.methods.rule import Consensus
from operands import BF16, F16, F32, operand

LENGTHS = (*range(1, 18), 33, 64, 1000)
TINY = {BF16: 2.0**-133, F16: 2.0**-24, F32: 2.0**-149}
LARGEST = {BF16: 3.0e38, F16: 60000.0, F32: 3.0e38}


def fill(kind: str, count: int, dtype: torch.dtype, draw: random.Random) -> list[float]:
    """Values that differ from a base of zeros by these magnitudes."""
    tiny, largest = TINY[dtype], LARGEST[dtype]
    values: dict[str, Callable[[], float]] = {
        "all equal": lambda: 0.375,
        "all zero": lambda: 0.0,
        "two values": lambda: draw.choice([0.5, 0.25]),
        "zeros and one value": lambda: draw.choice([0.0, 0.0, 1.5]),
        "denormals": lambda: tiny * draw.randrange(9),
        "near infinity": lambda: largest / draw.choice([1, 1, 2, 4]),
        "wide range": lambda: 2.0 ** draw.randint(-14, 15) * (1 + draw.random()),
        "very wide range": lambda: math.ldexp(1 + draw.random(), draw.randint(-24, 15) * (1 if dtype == F16 else 5)),
        "neighbours": lambda: 1 + draw.randrange(6) * torch.finfo(dtype).eps,
        "low bits": lambda: 1 + draw.randrange(400) * max(2.0**-23, torch.finfo(dtype).eps),
    }
    return [values[kind]() * draw.choice([1, -1]) for _ in range(count)]


KINDS = (
    "all equal", "all zero", "two values", "zeros and one value", "denormals", "near infinity", "wide range",
    "very wide range", "neighbours", "low bits",
)  # fmt: skip
# Of the input and of the base.
DTYPES = [(BF16, BF16), (F32, F32), (F16, F16), (BF16, F32), (F16, BF16)]


def float32(value: float) -> float:
    found: float = struct.unpack("f", struct.pack("f", value))[0]
    return found


def magnitudes(x: Tensor, base: Tensor, *, rounded: bool) -> list[float]:
    """|x - base| as the method compares it: in float32, or rounded to bfloat16."""
    found = [abs(float32(a - b)) for a, b in zip(x.double().tolist(), base.double().tolist(), strict=True)]
    return torch.tensor(found).bfloat16().double().tolist() if rounded else found


def order(values: Sequence[float]) -> list[int]:
    """The indices, the largest first, equal ones by their index."""
    return sorted(range(len(values)), key=lambda index: -values[index])  # Python's sort is stable


def tensors_of(kind: str, number: int, count: int) -> tuple[Tensor, Tensor]:
    draw = random.Random(f"{kind} {number} {count}")
    dtype, base_dtype = DTYPES[number % len(DTYPES)]
    x = torch.tensor(fill(kind, count, dtype, draw), dtype=torch.float64).to(dtype)
    return x, torch.zeros(count, dtype=base_dtype)


def statistics(method: str, x: Tensor, base: Tensor, arguments: Arguments) -> list[Statistic]:
    found: list[Statistic] = []
    while (measure := get(method).measure(found, arguments)) is not None:
        share = measured(measure, [operand(base), operand(x)], 0, len(x), 0, len(x))
        is_histogram = isinstance(share, Counts)
        found.append(Statistic(measure, share, {0: share}) if is_histogram else joined(measure, [share]))
    return found


def arguments_of(count: int, x: Tensor, base: Tensor, **values: Any) -> Arguments:
    rounded = torch.promote_types(x.dtype, base.dtype) == BF16
    shared = {"lambda": 1.0, "normalize": False, "rescale": True, "int8_mask": False, "variant": "mergekit"}
    own = {"weight": 1.0, **values}
    per_input = {key: (None, value) for key, value in own.items()}
    return Arguments(2, 0, shared, per_input, tensor="x", rounded=rounded, matrix=False)


CASES = [(kind, number) for kind in KINDS for number in range(10)]


@pytest.mark.parametrize(("kind", "number"), CASES)
@pytest.mark.parametrize("method", ["ties", "breadcrumbs"])
def test_thresholds_and_norms_are_those_of_a_sort(method: str, kind: str, number: int) -> None:
    for count in {LENGTHS[number], LENGTHS[number + 10]}:
        x, base = tensors_of(kind, number, count)
        for density in (0.1, 0.34, 0.5, 0.97):
            gamma = {"gamma": 0.2} if method == "breadcrumbs" else {}
            arguments = arguments_of(count, x, base, density=density, **gamma)
            rule = get(method).rule(statistics(method, x, base, arguments), arguments)
            assert isinstance(rule, Consensus)
            found = magnitudes(x, base, rounded=arguments.rounded)
            size = int(density * count)
            first = 0 if method == "ties" else min(int(0.2 * count), count - size)
            kept = order(found)[first : first + (max(1, size) if method == "ties" else size)]
            # The lower cut is the code of the smallest magnitude that stays, and how many of that magnitude do.
            if len(kept) > 0 and first + len(kept) < count:
                code, rank = rule.selection.cuts[0][2:]
                threshold = found[kept[-1]]
                assert struct.unpack("f", struct.pack("I", code))[0] == threshold
                inside = order(found)[: first + len(kept)]
                assert rank == sum(found[index] == threshold for index in inside)
            all_, some = math.fsum(found), math.fsum(found[index] for index in kept)
            ratio = all_ / some if all_ >= 1e-7 and some >= 1e-7 else 1.0
            assert rule.factors[0][1] == ratio


@pytest.mark.parametrize(("kind", "number"), CASES)
def test_exactly_those_elements_stay(kind: str, number: int) -> None:
    for count in {LENGTHS[number], LENGTHS[number + 10]}:
        x, base = tensors_of(kind, number, count)
        rounded = torch.promote_types(x.dtype, base.dtype) == BF16
        found = magnitudes(x, base, rounded=rounded)
        for density in (0.1, 0.5, 0.8):
            merged = arcmerge.merge_state_dicts(
                [{"x": x}], "ties", base={"x": base}, parameters={"weight": 1, "density": density}
            )["x"]
            kept = set(order(found)[: max(1, int(density * count))])
            wanted = [float(x[index]) if index in kept else 0.0 for index in range(count)]
            assert merged.double().tolist() == wanted


@pytest.mark.parametrize(("kind", "number"), CASES)
def test_the_norm_of_what_random_numbers_keep_is_exact(kind: str, number: int) -> None:
    count = LENGTHS[number + 10]
    x, base = tensors_of(kind, number, count)
    arguments = arguments_of(count, x, base, density=0.4)
    rule = get("dare_linear").rule(statistics("dare_linear", x, base, arguments), arguments)
    assert isinstance(rule, Consensus)
    # What stays, from a merge of ones in place of x.
    ones, zeros = torch.ones(count), torch.zeros(count)
    without = {"weight": 1, "density": 0.4, "rescale": False}
    mask = arcmerge.merge_state_dicts([{"x": ones}], "dare_linear", base={"x": zeros}, parameters=without)["x"].bool()
    found = magnitudes(x, base, rounded=arguments.rounded)
    all_, some = math.fsum(found), math.fsum(value for value, stays in zip(found, mask.tolist(), strict=True) if stays)
    assert rule.factors[0][1] == (all_ / some if all_ >= 1e-7 and some >= 1e-7 else 1.0)


def test_the_sum_of_many_magnitudes_is_rounded_once() -> None:
    """Of numbers that float64 cannot add one by one."""
    values = torch.tensor([2.0**100, 1.0, 2.0**-100, 3.0] * 500)
    base = torch.zeros_like(values)
    selection = Selection((NO_CUT,), (0,), ((1.0, 1.0),))
    counts = measured(Histogram(selection), [operand(base), operand(values)], 0, len(values), 0, len(values))
    found = Order([Statistic(Histogram(selection), counts, {})], 0)
    assert found.sum(0, found.count) == math.fsum(values.double().tolist())
