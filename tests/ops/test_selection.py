"""The reference of the selection of elements: random numbers, codes, cuts and probabilities, against plain Python."""

import math
import random

import pytest
import torch

from arcmerge.ops import consensus_combine, magnitude_histogram
from arcmerge.ops.philox import philox, uniform16
from arcmerge.ops.selection import NO_CUT, between, codes, drawn, row_probabilities


def counters(*words):
    return tuple(torch.tensor([word]) for word in words)


def test_philox_has_its_published_words():
    # The known answers of Random123, the library of the paper.
    ones = 2**32 - 1
    pi = counters(0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for counter, key, words in (
        (counters(0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (counters(ones, ones, ones, ones), 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, 0xA4093822 | 0x299F31D0 << 32, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        assert tuple(map(int, philox(counter, key))) == words


def test_uniform16_takes_the_halves_of_the_words_in_order():
    numbers = uniform16(77, 21).tolist()
    words = [int(word) for block in range(3) for word in philox(counters(block, 0, 0, 0), 77)]
    assert numbers == [half for word in words for half in (word & 0xFFFF, word >> 16)][:21]
    assert uniform16(77, 8).tolist() == numbers[:8]


def test_draws_are_nested_in_the_probability():
    probabilities = [0.0, 2.0**-17, 0.1, 0.5, 0.500001, 1 - 2.0**-18, 1.0]
    draws = [drawn(torch.full((100_000,), p, dtype=torch.float64), 5) for p in probabilities]
    assert not draws[0].any()
    assert draws[-1].all()
    for small, large, p in zip(draws, draws[1:], probabilities[1:], strict=False):
        assert not (small & ~large).any()
        # Five standard deviations.
        assert abs(large.double().mean() - p) < 5 * math.sqrt(p * (1 - p) / 100_000) + 2.0**-16


@pytest.mark.parametrize("size", [1, 2, 17, 500])
def test_cuts_keep_a_range_of_the_descending_order(size):
    draw = random.Random(size)
    values = [draw.choice([0, 3, 3, 7, 9, 12]) for _ in range(size)]
    order = sorted(range(size), key=lambda index: (-values[index], index))
    for _ in range(50):
        first = draw.randint(0, size - 1)
        last = draw.randint(first + 1, size)
        # The cut before the element at `first` in the order, and after the one at `last - 1`.
        upper, lower = values[order[first]], values[order[last - 1]]
        upper_rank = sum(values[index] == upper for index in order[:first])
        lower_rank = sum(values[index] == lower for index in order[:last])
        kept = between(torch.tensor(values), (upper, upper_rank, lower, lower_rank))
        assert sorted(order[first:last]) == kept.nonzero().flatten().tolist()
    assert between(torch.tensor(values), NO_CUT).all()


def test_probabilities_rise_with_the_rank_in_a_row():
    found = row_probabilities(torch.tensor([[5, 1, 5, 0], [2, 2, 2, 2]]), 0.2, 0.8)
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.4, 0.8, 0.2], [0.2, 0.4, 0.6, 0.8]], dtype=torch.float64))
    assert row_probabilities(torch.tensor([[4], [9]]), 0.2, 0.8).flatten().tolist() == [0.5, 0.5]


def test_codes_order_magnitudes():
    values = torch.tensor([[-2.0, 0.0, -0.0, 1e-45, 3.0e38, float("inf"), float("nan"), 1.0039]])
    found = codes(values, None, joint=False, rounded=False)[0]
    assert found.tolist() == [0x40000000, 0, 0, 1, 0x7F61B1E6, 0x7F800000, 0x7FC00000, 0x3F807FCC]
    assert codes(values, None, joint=False, rounded=True)[0].tolist()[-1] == 0x3F800000
    pair = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    joint = codes(pair, None, joint=True, rounded=False)
    assert joint.tolist() == [[0x3F800000, 0]] * 2
    scaled = codes(torch.tensor([[[1.0, 2.0], [4.0, 8.0]]]), torch.tensor([2.0, 0.25]), joint=False, rounded=False)
    assert scaled.int().view(torch.float32).tolist() == [[[2.0, 4.0], [1.0, 2.0]]]
    deep = torch.tensor([[[[1.0, 2.0], [4.0, 8.0]], [[1.0, 1.0], [1.0, 1.0]]]])
    scaled = codes(deep, torch.tensor([[2.0, 0.25], [3.0, 4.0]]), joint=False, rounded=False)
    assert scaled.int().view(torch.float32).tolist() == [[[[2.0, 4.0], [1.0, 2.0]], [[3.0, 3.0], [4.0, 4.0]]]]
    flat = codes(torch.tensor([[1.0, 2.0]]), torch.tensor(3.0), joint=False, rounded=False)
    assert flat.int().view(torch.float32).tolist() == [[3.0, 6.0]]


def test_histogram_counts_every_element_once_and_sums_magnitudes():
    draw = torch.Generator().manual_seed(1)
    tensors = [torch.randn(40, 31, generator=draw), torch.randn(40, 31, generator=draw).bfloat16()]
    base = torch.randn(40, 31, generator=draw).bfloat16()
    keys, probabilities = torch.tensor([3, -4]), torch.tensor([[0.3, 0.3], [0.2, 0.9]], dtype=torch.float64)
    counts = magnitude_histogram(tensors, base, keys, probabilities, None, None)
    assert counts.shape == (2, 4, 32768)
    assert counts[:, :2].sum((1, 2)).tolist() == [1240, 1240]
    for index, tensor in enumerate(tensors):
        bins = torch.arange(32768)
        total = (torch.ldexp((128.0 + bins % 128).double(), bins // 128 - 134) * counts[index, :2].sum(0)).sum()
        total += (torch.ldexp(counts[index, 2:].sum(0).double(), bins // 128 - 150)).sum()
        torch.testing.assert_close(total, (tensor.float() - base.float()).double().abs().sum(), rtol=1e-14, atol=0)
    prefixes = torch.tensor([[int(counts[0].sum(0).argmax())], [0]])
    fine = magnitude_histogram(tensors, base, keys, probabilities, prefixes, None)
    assert fine.shape == (2, 1, 65536)
    assert int(fine[0].sum()) == int(counts[0, :2, prefixes[0, 0]].sum())


def test_consensus_of_a_small_example():
    # Worked by hand: the votes of the elements are 3, -1, 0, 0.
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    tensors = [base + torch.tensor([2.0, -4.0, 1.0, 0.0]), base + torch.tensor([1.0, 3.0, -1.0, 0.0])]
    factors = torch.tensor([[1.0, 2.0, 1.0, 2.0], [1.0, 2.0, 3.0, 5.0]])
    cuts, keys = torch.tensor([NO_CUT, NO_CUT]), torch.tensor([0, 1])
    probabilities = torch.ones(2, 2, dtype=torch.float64)

    def merged(**options):
        arguments = (tensors, base, factors, cuts, keys, probabilities, None)
        return consensus_combine(*arguments, out_dtype=torch.float32, **options).tolist()

    assert merged(election="sum") == [1 + 6 / 4, 1 - 8 / 1, 1 + 2 / 1, 1.0]
    assert merged(election="sum", zero_is_negative=True) == pytest.approx([2.5, -7.0, 1 - 5 / 3, 1.0])
    assert merged(election="count") == [2.5, 1 + 15 / 3, 1 + 2 / 1, 1.0]
    assert merged() == [2.5, 1 - 2 / 4, 1.0, 1.0]
    assert merged(election="sum", floor=4.0) == [2.5, 1 - 8 / 4, 1 + 2 / 4, 1.0]
