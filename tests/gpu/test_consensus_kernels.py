"""The kernels of consensus_combine have the bits of the reference, for every length and alignment.

On a GPU if there is one, else in the interpreter. test_proof.py compiles and emulates them.
"""

from __future__ import annotations

from itertools import accumulate, product

import pytest
import torch

from arcmerge.kernels.consensus_combine import consensus_combine as combine_kernel
from arcmerge.kernels.cuts import count_equals
from arcmerge.kernels.segments import SEGMENT
from arcmerge.ops import consensus_combine, magnitude_histogram
from arcmerge.ops.selection import NO_CUT, codes, differences
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
    Guarded,
    assert_same_bits,
    choice,
    cuts_among_equals,
    cuts_of,
    group,
    interpreted,
    reference,
    triton_op,
)

KINDS = {
    "none": {"election": "none"},
    "sum": {"election": "sum", "rounded": True},
    "sum, zero is negative": {"election": "sum", "zero_is_negative": True, "floor": 0.2},
    "count": {"election": "count", "inverse": True},
    "count, zero is negative": {"election": "count", "zero_is_negative": True, "rounded": True},
    "variance": {"election": "sum", "joint": True, "floor": 1e-6},
}


@pytest.mark.parametrize("mix", MIXES)
def test_consensus_of_every_tail(mix: str) -> None:
    """Many groups in one launch, each with cuts among equals, at random, with votes of both signs."""
    dtypes, base = MIXES[mix]
    k = len(dtypes)
    counts = COUNTS if mix == "bf16 less bf16" else FEW_COUNTS
    groups = [group(count, dtypes, base, seed) for seed, count in enumerate(counts)]
    cuts = torch.tensor([cuts_of(*each, 0.1, 0.7) for each in groups])
    keys = torch.arange(len(groups) * k).view(-1, k) * 2**40
    chances = torch.linspace(0.3, 1.0, len(groups) * k, dtype=torch.float64).view(-1, k)
    factors = torch.randn(len(groups), k, 4, generator=torch.Generator().manual_seed(1))
    outs = [Guarded(torch.full((count,), float("nan")), 1) for count in counts]
    nonfinite = torch.zeros(len(groups), dtype=I64, device=DEVICE)
    combine_kernel(
        [out.tensor for out in outs],
        [inputs for inputs, _ in groups],
        [last for _, last in groups],
        factors.to(DEVICE),
        cuts.to(DEVICE),
        choice(keys, chances),
        nonfinite,
        election="sum",
    )
    assert not nonfinite.any()
    for index, ((inputs, last), out) in enumerate(zip(groups, outs, strict=True)):
        pairs = chances[index, :, None].expand(k, 2)
        arguments = ([tensor.cpu() for tensor in inputs], last.cpu(), factors[index], cuts[index], keys[index], pairs)
        expected = reference(consensus_combine, *arguments, None, out_dtype=F32, election="sum")
        assert_same_bits(out.tensor, expected, counts[index])
        out.assert_guards_whole()


@pytest.mark.parametrize("out", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_consensus_of_every_kind(kind: str, out: torch.dtype) -> None:
    options = KINDS[kind]
    inputs, base = group(3 * 7 * 61, [BF16, F32, F16], BF16, 5)
    inputs, base = [tensor.view(3, 7, 61) for tensor in inputs], base.view(3, 7, 61)
    scales = (torch.arange(21.0, device=DEVICE) - 5).view(3, 7) / 4 if kind == "none" else None
    ways = {"joint": bool(options.get("joint")), "rounded": bool(options.get("rounded"))}
    found = codes(differences(inputs, base), scales, **ways)
    shares = torch.tensor([0.5, 1.0, 0.9], dtype=torch.float64, device=DEVICE)[:, None].expand(3, 2)
    # Votes of 1 and -1 whose sums are 0 for many elements.
    factors = torch.tensor([[1.0, 0.3, 1, 7], [-1.0, 1.7, 2, 8], [1.0, -0.1, 0, 9]], device=DEVICE)
    keys = torch.tensor([3, 4, 5], device=DEVICE)
    for first, last in ((0.0, 1.0), (0.2, 0.8), (0.55, 0.56)):
        cuts = torch.tensor([cuts_among_equals(code, first, last) for code in found], device=DEVICE)
        arguments = (inputs, base, factors, cuts, keys, shares, scales)
        ours = triton_op(consensus_combine, *arguments, out_dtype=out, **options)
        assert_same_bits(ours, reference(consensus_combine, *arguments, out_dtype=out, **options), (first, last))


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_consensus_of_adversarial_tensors(name: str) -> None:
    values = ADVERSARIAL[name].to(DEVICE)
    inputs, base = [values, values.roll(1), -values], torch.zeros_like(values, dtype=BF16)
    cuts = torch.tensor(cuts_of(inputs, base, 0.3, 0.6), device=DEVICE)
    factors, pairs = torch.ones(3, 4, device=DEVICE), torch.ones(3, 2, dtype=torch.float64, device=DEVICE)
    arguments = (inputs, base, factors, cuts, torch.tensor([1, 2, 3], device=DEVICE), pairs, None)
    for election in ("none", "sum", "count"):
        ours = triton_op(consensus_combine, *arguments, out_dtype=BF16, election=election)
        assert_same_bits(ours, reference(consensus_combine, *arguments, out_dtype=BF16, election=election), election)


@pytest.mark.parametrize("skipped", list(product((0, 1), (0, 8), (0, 3), (0, 4))), ids=str)
def test_consensus_of_any_alignment(skipped: tuple[int, ...]) -> None:
    inputs, base = group(2061, [BF16, F32], BF16, 6, skipped)
    out = Guarded(torch.full((2061,), float("nan"), dtype=BF16), skipped[-1])
    keys, chances = torch.tensor([[8, 9]]), torch.full((1, 2), 0.7, dtype=torch.float64)
    cuts = torch.tensor([cuts_of(inputs, base, 0.2, 0.6)])
    factors, nonfinite = torch.ones(1, 2, 4, device=DEVICE), torch.zeros(1, dtype=I64, device=DEVICE)
    choices = choice(keys, chances)
    combine_kernel([out.tensor], [inputs], [base], factors, cuts.to(DEVICE), choices, nonfinite, election="sum")
    pairs = chances[0, :, None].expand(2, 2)
    arguments = (inputs, base, factors[0], cuts[0].to(DEVICE), keys[0].to(DEVICE), pairs.to(DEVICE), None)
    assert_same_bits(out.tensor, reference(consensus_combine, *arguments, out_dtype=BF16, election="sum"))
    out.assert_guards_whole()


def test_parts_of_a_tensor_take_the_ranks_that_are_left() -> None:
    inputs, base = group(SEGMENT + 5000, [BF16, BF16], BF16, 7)
    cuts = torch.tensor(cuts_of(inputs, base, 0.1, 0.5))
    keys, chances = torch.tensor([8, 9]), torch.full((2,), 0.7, dtype=torch.float64)
    factors = torch.ones(2, 4, device=DEVICE)
    sizes = [SEGMENT + 8, 4000, 992]
    parts = list(zip(*(tensor.split(sizes) for tensor in inputs), strict=True))
    choices = choice(keys.expand(3, 2).contiguous(), chances.expand(3, 2).contiguous())
    choices = choices._replace(starts=torch.tensor([0, *accumulate(sizes)][:3], device=DEVICE))
    equals = torch.zeros(3, 2, 2, dtype=I64, device=DEVICE)
    own = cuts.expand(3, 2, 4).contiguous().to(DEVICE)
    count_equals(equals, parts, base.split(sizes), own, choices)
    own[..., 1::2] -= equals.cumsum(0) - equals
    out = torch.full_like(base, float("nan"))
    combine_kernel(
        out.split(sizes),
        parts,
        base.split(sizes),
        factors.expand(3, 2, 4).contiguous(),
        own,
        choices,
        torch.zeros(3, dtype=I64, device=DEVICE),
    )
    pairs = chances[:, None].expand(2, 2).to(DEVICE)
    whole = reference(
        consensus_combine, inputs, base, factors, cuts.to(DEVICE), keys.to(DEVICE), pairs, None, out_dtype=BF16
    )
    assert_same_bits(out, whole)


def test_consensus_counts_values_that_are_not_finite() -> None:
    base = torch.zeros(2 * SEGMENT + 3, device=DEVICE)
    tensor = base + 1
    tensor[5], tensor[SEGMENT], tensor[-1] = float("nan"), float("inf"), 1e5
    nonfinite = torch.full((2,), 100, dtype=I64, device=DEVICE)
    groups, bases = [[tensor], [tensor[:100]]], [base, base[:100]]
    outs = [torch.empty(len(each), dtype=F16, device=DEVICE) for each in bases]
    factors = torch.ones(2, 1, 4, device=DEVICE)
    cuts = torch.tensor([[NO_CUT], [NO_CUT]], device=DEVICE)
    everything = choice(torch.zeros(2, 1, dtype=I64), torch.ones(2, 1, dtype=torch.float64))
    combine_kernel(outs, groups, bases, factors, cuts, everything, nonfinite, ranked=False)
    assert nonfinite.tolist() == [103, 101]
    # An infinite difference makes NaN, one that only rounding makes infinite stays infinite.
    assert [int(outs[0].isnan().sum()), int(outs[0].isinf().sum())] == [2, 1]


def test_probabilities_by_rank_take_the_reference() -> None:
    inputs, base = group(400, [BF16, BF16], BF16, 8)
    inputs, base = [tensor.view(4, 100) for tensor in inputs], base.view(4, 100)
    keys = torch.tensor([1, 2], device=DEVICE)
    pairs = torch.tensor([[0.2, 0.8], [0.5, 0.5]], dtype=torch.float64, device=DEVICE)
    arguments = (inputs, base, keys, pairs, None, None)
    assert_same_bits(triton_op(magnitude_histogram, *arguments), reference(magnitude_histogram, *arguments))
    factors, cuts = torch.ones(2, 4, device=DEVICE), torch.tensor([NO_CUT, NO_CUT], device=DEVICE)
    arguments = (inputs, base, factors, cuts, keys, pairs, None)
    ours = triton_op(consensus_combine, *arguments, out_dtype=F32, inverse=True)
    assert_same_bits(ours, reference(consensus_combine, *arguments, out_dtype=F32, inverse=True))


def test_ops_of_empty_tensors() -> None:
    empty = torch.empty(0, 5, dtype=BF16, device=DEVICE)
    keys, pair = torch.tensor([1], device=DEVICE), torch.ones(1, 2, dtype=torch.float64, device=DEVICE)
    assert not triton_op(magnitude_histogram, [empty], empty, keys, pair, None, None).any()
    factors, cuts = torch.ones(1, 4, device=DEVICE), torch.tensor([NO_CUT], device=DEVICE)
    out = triton_op(consensus_combine, [empty], empty, factors, cuts, keys, pair, None, out_dtype=F32)
    assert (out.shape, out.dtype) == ((0, 5), F32)


@interpreted
@pytest.mark.parametrize("launches", [1, 2])
def test_consensus_moves_each_byte_once(launches: int) -> None:
    inputs, base = group(2 * SEGMENT, [BF16, BF16], BF16, 9)
    out = torch.empty_like(base)
    everything = choice(torch.zeros(1, 2, dtype=I64), torch.ones(1, 2, dtype=torch.float64))
    factors, cuts, nonfinite = torch.ones(1, 2, 4), torch.tensor([[NO_CUT, NO_CUT]]), torch.zeros(1, dtype=I64)
    with Traffic(*inputs, base, out) as traffic:
        combine_kernel([out], [inputs], [base], factors, cuts, everything, nonfinite, ranked=launches == 2)
    floor = 6 * launches * len(base) + 2 * len(base)
    assert (traffic.launches, traffic.atomics) == (launches, 0)
    assert floor <= traffic.loaded + traffic.stored <= 1.01 * floor
