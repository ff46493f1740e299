"""The kernel of magnitude_histogram has the bits of the reference, for every length and alignment.

On a GPU if there is one, else in the interpreter. test_proof.py compiles and emulates it.
"""

from __future__ import annotations

from itertools import accumulate, product

import pytest
import torch
import triton
import triton.language as tl

from arcmerge.kernels import magnitude_histogram as histogram_file
from arcmerge.kernels.magnitude_histogram import magnitude_histogram as histogram_kernel
from arcmerge.kernels.segments import SEGMENT
from arcmerge.kernels.selection import limits, numbers, rows
from arcmerge.ops import magnitude_histogram
from arcmerge.ops.philox import uniform16
from arcmerge.ops.selection import drawn
from emulation.traffic import Traffic
from selection_kernels import (
    ADVERSARIAL,
    BF16,
    COUNTS,
    DEVICE,
    F16,
    F32,
    FEW_COUNTS,
    I64,
    MIXES,
    assert_same_bits,
    choice,
    group,
    interpreted,
    reference,
    triton_op,
)

# ---- random numbers


@triton.jit
def _numbers_kernel(out_ptr, key, first, TILE: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, TILE), numbers(key, first, TILE))


@pytest.mark.parametrize("key", [0, 1, -1, 2**62 + 12345, -(2**63)])
def test_numbers_are_those_of_the_reference(key: int) -> None:
    out = torch.empty(256, dtype=torch.int32, device=DEVICE)
    for first in (0, 8, 1000):
        _numbers_kernel[(1,)](out, key, first, TILE=256)
        assert_same_bits(out, uniform16(key, first + 256)[first:])


def test_numbers_of_blocks_beyond_32_bits_differ() -> None:
    out = torch.empty(2, 256, dtype=torch.int32, device=DEVICE)
    for row, first in zip(out, (0, 2**35), strict=True):
        _numbers_kernel[(1,)](row, 3, first, TILE=256)
    # A sixteenth of the bits agree by chance where the numbers are independent.
    assert (out[0] == out[1]).sum() < 8


def test_limits_are_the_draws_of_the_reference() -> None:
    shares = [0.0, 2.0**-17, 2.0**-17 + 2.0**-60, 2.0**-16, 0.1, 0.5, 1 / 3, 1 - 2.0**-17, 1 - 2.0**-18, 1.0, 1.5]
    found = limits(torch.tensor(shares, dtype=torch.float64))
    uniform = uniform16(9, 50_000)
    for share, limit in zip(shares, found.tolist(), strict=True):
        assert torch.equal(uniform < limit, drawn(torch.full((50_000,), share, dtype=torch.float64), 9)), share
    assert found[-2:].tolist() == [65536, 65536]


# ---- histograms


@pytest.mark.parametrize(
    ("mix", "share", "rounded"), [("bf16 less bf16", 1.0, True), *((mix, 0.4, False) for mix in MIXES)]
)
def test_histogram_of_every_tail(mix: str, share: float, rounded: bool) -> None:
    dtypes, base = MIXES[mix]
    counts = COUNTS if mix == "bf16 less bf16" else FEW_COUNTS
    groups = [group(count, dtypes, base, seed) for seed, count in enumerate(counts)]
    # One histogram for each input; those of a group share the base.
    inputs = [[tensor] for tensors, _ in groups for tensor in tensors]
    bases = [last for tensors, last in groups for _ in tensors]
    keys = torch.arange(len(inputs)) * 2**40
    chances = torch.full((len(inputs),), share, dtype=torch.float64)
    out = torch.zeros(len(inputs), 2 if rounded else 4, 32768, dtype=I64, device=DEVICE)
    histogram_kernel(out, inputs, bases, choice(keys, chances, rounded=rounded))
    for index, ((tensor,), last) in enumerate(zip(inputs, bases, strict=True)):
        pair = chances[index, None].expand(1, 2)
        expected = reference(
            magnitude_histogram, [tensor.cpu()], last.cpu(), keys[index, None], pair, None, None, rounded=rounded
        )
        assert_same_bits(out[index], expected[0], len(last))


@pytest.mark.parametrize("skipped", list(product((0, 1, 8), (0, 1, 7))), ids=str)
def test_histogram_of_any_alignment(skipped: tuple[int, int]) -> None:
    (tensor,), base = group(8205, [BF16], BF16, 1, skipped)
    keys, pair = torch.tensor([5], device=DEVICE), torch.tensor([[0.6, 0.6]], dtype=torch.float64, device=DEVICE)
    arguments = ([tensor], base, keys, pair, None, None)
    assert_same_bits(triton_op(magnitude_histogram, *arguments), reference(magnitude_histogram, *arguments))


@pytest.mark.parametrize("options", [{}, {"rounded": True}, {"joint": True}, {"joint": True, "rounded": True}], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_histogram_of_matrices(options: dict[str, bool], scaled: bool) -> None:
    inputs, base = group(3 * 7 * 301, [BF16, F32, F16], BF16, 2)
    inputs, base = [tensor.view(3, 7, 301) for tensor in inputs], base.view(3, 7, 301)
    keys = torch.tensor([1, 2, -3], device=DEVICE)
    chances = torch.tensor([0.5, 1.0, 0.0], dtype=torch.float64, device=DEVICE)[:, None].expand(3, 2)
    scales = (torch.arange(21.0, device=DEVICE) - 5).view(3, 7) / 4 if scaled else None
    arguments = (inputs, base, keys, chances)
    whole = triton_op(magnitude_histogram, *arguments, None, scales, **options)
    assert_same_bits(whole, reference(magnitude_histogram, *arguments, None, scales, **options))
    prefixes = whole[:, :2].sum(1).topk(2).indices
    ours = triton_op(magnitude_histogram, *arguments, prefixes, scales, **options)
    assert_same_bits(ours, reference(magnitude_histogram, *arguments, prefixes, scales, **options))
    assert int(ours.sum()) == int(whole[:, :2].sum(1).gather(1, prefixes).sum())


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("rounded", [False, True])
def test_histogram_of_adversarial_tensors(name: str, rounded: bool) -> None:
    tensor = ADVERSARIAL[name].to(DEVICE)
    keys = torch.tensor([1], device=DEVICE)
    for base, share in ((torch.zeros_like(tensor), 1.0), (torch.zeros_like(tensor, dtype=BF16), 0.5)):
        pair = torch.full((1, 2), share, dtype=torch.float64, device=DEVICE)
        arguments = ([tensor], base, keys, pair, None, None)
        ours = triton_op(magnitude_histogram, *arguments, rounded=rounded)
        assert_same_bits(ours, reference(magnitude_histogram, *arguments, rounded=rounded))
        assert int(ours[0, :2].sum()) == len(tensor)


def test_histograms_of_parts_add_up() -> None:
    (tensor,), base = group(3000, [BF16], BF16, 3)
    keys, chances = torch.tensor([7, 7, 7]), torch.full((3,), 0.5, dtype=torch.float64)
    sizes = [1024, 1000, 976]
    starts = torch.tensor([0, *accumulate(sizes)][:3], device=DEVICE)
    out = torch.zeros(3, 4, 32768, dtype=I64, device=DEVICE)
    parts = choice(keys, chances)._replace(starts=starts)
    histogram_kernel(out, [[part] for part in tensor.split(sizes)], base.split(sizes), parts)
    whole = reference(
        magnitude_histogram, [tensor], base, keys[:1].to(DEVICE), chances[:1, None].expand(1, 2).to(DEVICE), None, None
    )
    assert_same_bits(out.sum(0), whole[0])


def test_the_histogram_of_old_tritons_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    (tensor,), base = group(5000, [F32], BF16, 4)
    keys, pair = torch.tensor([5], device=DEVICE), torch.tensor([[0.6, 0.6]], dtype=torch.float64, device=DEVICE)
    arguments = ([tensor], base, keys, pair, None, None)
    monkeypatch.setattr(histogram_file, "FIRST_INCREMENTING", (99, 0))
    assert_same_bits(triton_op(magnitude_histogram, *arguments), reference(magnitude_histogram, *arguments))


# ---- traffic


@interpreted
def test_the_histogram_counts_in_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histogram_file, "FIRST_INCREMENTING", (0, 0))  # the window of newer versions, in all
    random = torch.Generator().manual_seed(9)
    base = (torch.randn(4 * SEGMENT, generator=random) / 50).bfloat16()
    tuned = (base.float() + torch.randn(4 * SEGMENT, generator=random) / 2000).bfloat16()
    out = torch.zeros(1, 2, 32768, dtype=I64)
    keys, chances = torch.zeros(1, dtype=I64), torch.ones(1, dtype=torch.float64)
    with Traffic(tuned, base) as traffic:
        histogram_kernel(out, [[tuned]], [base], choice(keys, chances, rounded=True))
    floor = 4 * len(base)
    assert floor <= traffic.loaded + traffic.stored <= 1.01 * floor
    # One for each bin of a tile that is not empty.
    assert traffic.atomics < 0.1 * len(base)


def test_rows_hold_addresses_and_lengths() -> None:
    scales = [torch.ones(3, device=DEVICE), torch.ones(2, device=DEVICE)]
    assert rows(scales, [7, 9]).tolist() == [[scales[0].data_ptr(), 7], [scales[1].data_ptr(), 9]]
