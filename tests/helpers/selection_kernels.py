"""What the tests of the kernels of magnitude_histogram and consensus_combine share."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from arcmerge.kernels.segments import SEGMENT
from arcmerge.kernels.selection import Choice, limits
from arcmerge.ops.selection import NO_CUT, codes, differences

BF16, F16, F32, I64 = torch.bfloat16, torch.float16, torch.float32, torch.int64
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="looks inside the interpreter")

# Round the ends of vectors of 16 bytes, of tiles, and of a segment.
COUNTS = (*range(18), 1023, 1024, 1025, SEGMENT - 1, SEGMENT, SEGMENT + 9)
FEW_COUNTS = (1, 9, 1033, SEGMENT + 9)
MIXES = {
    "bf16 less bf16": ([BF16, BF16], BF16),
    "f16 and f32 less bf16": ([F16, F32], BF16),
    "3 bf16 less f32": ([BF16, BF16, BF16], F32),
    "8 less f16": ([BF16, F16, F32, BF16, F16, F32, BF16, F16], F16),
}


ADVERSARIAL = {
    "all zero": torch.zeros(9000),
    "all equal": torch.full((9000,), 0.0123),
    "two values": torch.tensor([1.0, 3.0]).repeat(4500),
    "subnormal": torch.arange(9000) * 2.0**-149,
    "beyond the bins in shared memory": torch.tensor([2.0, 1.9999, 2.0**-63, 2.0**-62, 2.0**-64, 3e38]).repeat(99),
    "not finite": torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0, 0.0]).repeat(700),
    "signs": torch.tensor([-0.5, 0.5, -0.0, 0.0]).repeat(1111),
}  # fmt: skip


def reference(op: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    with patch.dict(os.environ, ARCMERGE_BACKEND="reference"):
        return op(*arguments, **options)


def triton_op(op: Callable[..., Tensor], *arguments: Any, **options: Any) -> Tensor:
    with patch.dict(os.environ, ARCMERGE_BACKEND="triton"):
        return op(*arguments, **options)


def assert_same_bits(ours: Tensor, expected: Tensor, what: object = "") -> None:
    ours, expected = ours.cpu(), expected.cpu()
    bits = {2: torch.int16, 4: torch.int32, 8: I64}[ours.element_size()]
    same = ours.view(bits) == expected.view(bits)
    if ours.is_floating_point():
        same |= ours.isnan() & expected.isnan()
    wrong = (~same).nonzero()
    assert not len(wrong), f"{what}: {len(wrong)} differ, the first at {wrong[0].tolist()}"


class Guarded:
    """A tensor `skipped` elements past a 16-byte boundary, between guards that no kernel may write."""

    def __init__(self, values: Tensor, skipped: int = 0) -> None:
        self._first, self._last = 64 + skipped, 64 + skipped + values.numel()
        self._buffer = torch.full((self._last + 64,), float("nan"), dtype=values.dtype, device=DEVICE)
        self.tensor = self._buffer[self._first : self._last]
        self.tensor.copy_(values)

    def assert_guards_whole(self) -> None:
        assert self._buffer[: self._first].isnan().all()
        assert self._buffer[self._last :].isnan().all()


def group(
    count: int, dtypes: Sequence[torch.dtype], base: torch.dtype, seed: int, skipped: Sequence[int] = (0,) * 9
) -> tuple[list[Tensor], Tensor]:
    """Tensors and the base that they differ from, mostly by one of a few magnitudes."""
    random = torch.Generator().manual_seed(seed)
    start = (torch.randn(count, generator=random) / 50).to(base)
    chosen = torch.randint(8, (len(dtypes), count), generator=random)
    steps = torch.tensor([0.0, 1, -1, 2, -2, 3, 700, 2.0**-20])[chosen]
    tuned = [(start.float() + step * 2.0**-10).to(dtype) for step, dtype in zip(steps, dtypes, strict=True)]
    placed = [Guarded(values, skip).tensor for values, skip in zip([*tuned, start], skipped, strict=False)]
    return placed[:-1], placed[-1]


def cuts_among_equals(found: Tensor, first: float, last: float) -> tuple[int, int, int, int]:
    """Cuts that keep the elements from `first` to `last`, as shares, of the descending order of codes."""
    order = found.flatten().sort(descending=True).values.cpu()
    begin = min(int(first * len(order)), len(order) - 1)
    end = max(int(last * len(order)), begin + 1)
    upper, lower = int(order[begin]), int(order[end - 1])
    return upper, begin - int((order > upper).sum()), lower, end - int((order > lower).sum())


def cuts_of(inputs: Sequence[Tensor], base: Tensor, first: float, last: float) -> list[tuple[int, int, int, int]]:
    if not base.numel():
        return [NO_CUT] * len(inputs)
    found = codes(differences(inputs, base), None, joint=False, rounded=False)
    return [cuts_among_equals(code, first, last) for code in found]


def choice(keys: Tensor, probabilities: Tensor, **options: object) -> Choice:
    starts = torch.zeros(len(keys), dtype=I64, device=DEVICE)
    return Choice(keys.to(DEVICE), limits(probabilities).to(DEVICE), starts, **options)
