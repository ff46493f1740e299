"""The Triton kernels that merge: on a GPU if there is one, else in the interpreter. test_proof.py compiles them.

Every launch has many groups, as in a merge, because the interpreter takes milliseconds a program of any size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import pytest
import torch
from torch import Tensor

from arcmerge.kernels import segments
from arcmerge.kernels.combine import combine
from arcmerge.kernels.gram import gram
from arcmerge.kernels.segments import SEGMENT
from emulation.traffic import Fault, Traffic

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="looks inside the interpreter")

# Round the ends of 16-byte vectors, of the tiles of both kernels, and of a segment.
EDGES = (512, 1024, 2048, 4096, SEGMENT, SEGMENT + 2048)
COUNTS = (*range(18), *(edge + step for edge in EDGES for step in (-9, -8, -7, -1, 0, 1, 7, 8, 9)))
FEW_COUNTS = (0, 1, 7, 8, 9, 511, 512, 1025, 2048, 2061, SEGMENT + 9)

MIXES = {
    **{f"{k} bf16": [BF16] * k for k in range(1, 9)},
    "2 f16": [F16] * 2,
    "2 f32": [F32] * 2,
    "8 f32": [F32] * 8,
    "bf16 and f16": [BF16, F16],
    "f32 and bf16": [F32, BF16],
    "all, thrice": [BF16, F16, F32, BF16, F16, F32, BF16, F16],
    "9 bf16": [BF16] * 9,
    "17 of all": [BF16, F16, F32] * 5 + [BF16, F32],
    "33 bf16": [BF16] * 33,
}


@pytest.fixture
def random() -> torch.Generator:
    return torch.Generator().manual_seed(20)


class Guarded:
    """A tensor `skipped` elements past a 16-byte boundary, between guards that no kernel may read or write."""

    def __init__(self, values: Tensor, skipped: int = 0) -> None:
        room = 64 + skipped
        # NaN: an element that is read by mistake shows in a Gram matrix.
        self._buffer = torch.full((room + values.numel() + 64,), float("nan"), dtype=values.dtype, device=DEVICE)
        self._last = room + values.numel()
        self._first = room
        self.tensor = self._buffer[room : self._last]
        self.tensor.copy_(values)
        assert self._buffer.data_ptr() % 16 == 0

    def assert_guards_whole(self) -> None:
        assert self._buffer[: self._first].isnan().all()
        assert self._buffer[self._last :].isnan().all()


def random_groups(
    counts: Sequence[int], dtypes: Sequence[torch.dtype], random: torch.Generator, skipped: Sequence[int] | None = None
) -> list[list[Tensor]]:
    """A group for each count. Neighbours differ in magnitude and agree in sign, the worst case for sums."""

    def values(count: int, dtype: torch.dtype) -> Tensor:
        spread = torch.exp2(-6 * torch.rand(count, generator=random))
        return ((0.1 + torch.randn(count, generator=random)) * spread).to(dtype)

    skipped = skipped or [0] * len(dtypes)
    return [
        [Guarded(values(count, dtype), skip).tensor for dtype, skip in zip(dtypes, skipped, strict=True)]
        for count in counts
    ]


def exact_gram(group: Sequence[Tensor], base: Tensor | None = None) -> Tensor:
    values = [tensor.double() if base is None else (tensor.float() - base.float()).double() for tensor in group]
    stacked = torch.stack(values)
    return stacked @ stacked.T


def assert_gram(groups: Sequence[Sequence[Tensor]], bases: Sequence[Tensor] | None = None) -> None:
    k = len(groups[0])
    out = torch.full((len(groups), k, k), float("nan"), dtype=torch.float64, device=DEVICE)
    gram(groups, out, bases=bases)
    for number, group in enumerate(groups):
        exact = exact_gram(group, None if bases is None else bases[number])
        lengths = exact.diagonal().sqrt()
        # The contract; the error is near 1e-16, for any count, because the errors of float32 sums are added again.
        assert ((out[number] - exact).abs() <= 1e-9 * lengths[:, None] * lengths).all(), (
            f"{group[0].numel()} elements: {out[number].tolist()} instead of {exact.tolist()}"
        )


@pytest.mark.parametrize("mix", MIXES)
def test_gram_of_every_tail(mix: str, random: torch.Generator) -> None:
    counts = COUNTS if mix in ("2 bf16", "2 f32") else FEW_COUNTS if len(MIXES[mix]) <= 8 else (9, 2061)
    assert_gram(random_groups(counts, MIXES[mix], random))


@pytest.mark.parametrize("skipped", list(product((0, 1, 3, 4, 8), (0, 1, 7, 8))), ids=str)
def test_gram_of_any_alignment(skipped: tuple[int, int], random: torch.Generator) -> None:
    assert_gram(random_groups((1, 2061, 4096), [BF16, BF16], random, skipped))


@pytest.mark.parametrize("base", [BF16, F32], ids=str)
@pytest.mark.parametrize("k", [1, 2, 3, 8, 9, 16])
def test_gram_of_differences(k: int, base: torch.dtype, random: torch.Generator) -> None:
    groups = random_groups((1, 9, 2061), [BF16] * k + [base], random)
    assert_gram([group[:k] for group in groups], [group[k] for group in groups])


def test_gram_keeps_what_float32_sums_lose() -> None:
    # 1 + 2^-24 is 1 in float32.
    assert_gram([[Guarded(torch.tensor([1.0, 2.0**-12]).repeat(2048).to(BF16)).tensor]])


def test_gram_of_more_segments_than_a_step_of_the_second_stage(
    random: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segments, "SEGMENT", 16)  # 32 segments of eight inputs are a step
    assert_gram(random_groups((65 * 16 + 5, 3), [BF16] * 8, random))


def test_gram_of_groups_of_several_dtypes(random: torch.Generator) -> None:
    mixes = ([BF16, BF16], [F32, BF16], [BF16, BF16], [F16, F16], [F32, BF16])
    assert_gram(
        [random_groups((count,), dtypes, random)[0] for count, dtypes in zip((7, 40, 0, 2048, 9), mixes, strict=True)]
    )


@pytest.mark.parametrize("columns", [1, 9, 16])
def test_gram_of_rows(columns: int, random: torch.Generator) -> None:
    groups = random_groups((5 * columns, 5 * columns), [BF16, F32], random)
    out = torch.full((10, 2, 2), float("nan"), dtype=torch.float64, device=DEVICE)
    gram(groups, out, rows=5)
    by_row = [exact_gram([tensor.view(5, columns)[row] for tensor in group]) for group in groups for row in range(5)]
    torch.testing.assert_close(out, torch.stack(by_row), rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [9, 17])
def test_gram_of_many_inputs_is_symmetric_and_that_of_eight(k: int, random: torch.Generator) -> None:
    (group,) = random_groups((5000,), [BF16] * k, random)
    many, eight = (torch.empty(1, count, count, dtype=torch.float64, device=DEVICE) for count in (k, 8))
    gram([group], many)
    assert torch.equal(many, many.mT)
    gram([group[k - 8 :]], eight)
    assert torch.equal(many[:, k - 8 :, k - 8 :], eight)


def test_gram_is_the_same_alone_and_among_other_groups(random: torch.Generator) -> None:
    groups = random_groups((5000, 70000, 3), [BF16, BF16], random)
    together = torch.empty(3, 2, 2, dtype=torch.float64, device=DEVICE)
    gram(groups, together)
    alone = torch.empty(1, 2, 2, dtype=torch.float64, device=DEVICE)
    gram(groups[1:2], alone)
    assert torch.equal(alone[0], together[1])


def reference(group: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """The contract of combine in torch, before its last rounding."""
    total = group[0].float() * coefficients[0]
    for tensor, coefficient in zip(group[1:], coefficients[1:], strict=True):
        total = total + tensor.float() * coefficient
    return total


def run_combine(
    groups: Sequence[Sequence[Tensor]], out: torch.dtype, random: torch.Generator, skipped: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """The output and the exact float32 total of each group."""
    coefficients = torch.randn(len(groups), len(groups[0]), generator=random).to(DEVICE)
    nonfinite = torch.zeros(len(groups), dtype=torch.int64, device=DEVICE)
    guarded = [Guarded(torch.full((group[0].numel(),), float("nan"), dtype=out), skipped) for group in groups]
    combine([output.tensor for output in guarded], groups, coefficients, nonfinite)
    assert not nonfinite.any()
    for output, group, row in zip(guarded, groups, coefficients, strict=True):
        output.assert_guards_whole()
        yield output.tensor, reference(group, row)


@pytest.mark.parametrize("mix", MIXES)
def test_combine_has_the_bits_of_the_reference(mix: str, random: torch.Generator) -> None:
    counts = COUNTS if mix in ("2 bf16", "2 f32") else FEW_COUNTS
    for output, total in run_combine(random_groups(counts, MIXES[mix], random), F32, random):
        assert torch.equal(output, total)


@pytest.mark.parametrize("skipped", list(product((0, 1, 4), (0, 1, 8), range(9))), ids=str)
def test_combine_of_any_alignment(skipped: tuple[int, int, int], random: torch.Generator) -> None:
    groups = random_groups((1, 2061), [BF16, F32], random, skipped[:2])
    for output, total in run_combine(groups, F16, random, skipped[2]):
        assert torch.equal(output, total.to(F16))


@pytest.mark.parametrize("mix", ["1 bf16", "2 bf16", "8 bf16", "2 f32", "bf16 and f16"])
def test_combine_rounds_to_nearest_even(mix: str, random: torch.Generator) -> None:
    for output, total in run_combine(random_groups(FEW_COUNTS, MIXES[mix], random), BF16, random):
        assert torch.equal(output, total.to(BF16))


def test_combine_of_rows_and_of_several_dtypes(random: torch.Generator) -> None:
    groups = [random_groups((15,), dtypes, random)[0] for dtypes in ([BF16, BF16], [F32, F16], [BF16, BF16])]
    outs = [torch.empty(15, device=DEVICE) for _ in groups]
    coefficients = torch.randn(9, 2, generator=random).to(DEVICE)
    combine(outs, groups, coefficients, torch.zeros(9, dtype=torch.int64, device=DEVICE), rows=3)
    for number, (group, out) in enumerate(zip(groups, outs, strict=True)):
        for row in range(3):
            rows = [tensor.view(3, 5)[row] for tensor in group]
            assert torch.equal(out.view(3, 5)[row], reference(rows, coefficients[3 * number + row]))


@pytest.mark.parametrize("out", [BF16, F32], ids=str)
def test_combine_of_many_rows_and_groups(out: torch.dtype, random: torch.Generator) -> None:
    groups = random_groups((3 * 700, 3 * 5), [BF16] * 15 + [F32], random)
    outs = [torch.empty(group[0].numel(), dtype=out, device=DEVICE) for group in groups]
    coefficients = torch.randn(6, 16, generator=random).to(DEVICE)
    combine(outs, groups, coefficients, torch.zeros(6, dtype=torch.int64, device=DEVICE), rows=3)
    for vector, row in enumerate(coefficients):
        group, number = groups[vector // 3], vector % 3
        rows = [tensor.view(3, -1)[number] for tensor in group]
        assert torch.equal(outs[vector // 3].view(3, -1)[number], reference(rows, row).to(out))


def test_combine_of_many_counts_each_value_once() -> None:
    # The first launch makes an infinity, which the second keeps, and a value that only float16 does not hold.
    group = [torch.tensor([3e38, 60_000.0, 1.0], device=DEVICE), *[torch.zeros(3, device=DEVICE)] * 8]
    group[1] = group[0].clone()
    out, nonfinite = torch.empty(3, dtype=F16, device=DEVICE), torch.tensor([100], device=DEVICE)
    combine([out], [group], torch.ones(1, 9, device=DEVICE), nonfinite)
    assert (out.tolist(), nonfinite.tolist()) == ([float("inf"), float("inf"), 2.0], [102])


def test_combine_counts_values_that_are_not_finite() -> None:
    def tensor(count: int, **changed: float) -> Tensor:
        values = torch.ones(count, device=DEVICE)
        for index, value in changed.items():
            values[int(index[1:])] = value
        return values

    cases = {
        "none": (tensor(3000), 1.0, 0),
        "first and last": (tensor(3000, _0=float("nan"), _2999=float("-inf")), 1.0, 2),
        "of several segments": (tensor(2 * SEGMENT + 1, _5=float("inf"), _32768=float("nan")), 1.0, 2),
        "made by rounding to f16": (tensor(20, _3=65520.0, _4=65519.0), 1.0, 1),
        "made by the coefficient, tail and all": (tensor(2051), float("inf"), 2051),
    }
    outs = [torch.empty(len(values), dtype=F16, device=DEVICE) for values, _, _ in cases.values()]
    coefficients = torch.tensor([[factor] for _, factor, _ in cases.values()], device=DEVICE)
    nonfinite = torch.full((len(cases),), 100, dtype=torch.int64, device=DEVICE)
    combine(outs, [[values] for values, _, _ in cases.values()], coefficients, nonfinite)
    assert dict(zip(cases, nonfinite.tolist(), strict=True)) == {name: 100 + case[2] for name, case in cases.items()}


@interpreted
@pytest.mark.parametrize("k", [1, 2, 8])
def test_traffic_is_each_byte_once(k: int, random: torch.Generator) -> None:
    counts = [2 * SEGMENT, 8001]
    groups = random_groups(counts, [BF16] * k, random)
    outs = [torch.empty(count, dtype=BF16) for count in counts]
    tensors = [tensor for group in groups for tensor in group]
    with Traffic(*tensors) as traffic:
        gram(groups, torch.empty(len(groups), k, k, dtype=torch.float64))
    floor = 2 * k * sum(counts)
    assert floor <= traffic.loaded + traffic.stored <= 1.01 * floor
    assert traffic.launches == 2
    assert traffic.atomics == 0

    with Traffic(*tensors, *outs) as traffic:
        combine(outs, groups, torch.ones(len(groups), k), torch.zeros(len(groups), dtype=torch.int64))
    floor = 2 * sum(counts)
    assert traffic.stored == floor
    assert k * floor <= traffic.loaded <= 1.01 * k * floor
    assert traffic.launches == 1
    assert traffic.atomics == 0


@interpreted
def test_traffic_notices_a_stray_access(random: torch.Generator) -> None:
    (group,) = random_groups((100,), [BF16, BF16], random)
    with Traffic(group[0], group[1][:99]), pytest.raises(Fault, match=r"1 lanes .* byte 198 of table tensor #1"):
        gram([group], torch.empty(1, 2, 2, dtype=torch.float64))
