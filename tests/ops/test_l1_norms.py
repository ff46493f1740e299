"""_C.l1_norms: the sums of magnitudes against the reference of magnitude_histogram, exactly."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arcmerge import _C
from arcmerge.merging.methods.magnitudes import norms_of, sums_by_exponent
from arcmerge.ops import magnitude_histogram
from operands import BF16, F16, F32, any_bits, every_variant, normal, using
from selections import Case, cases, misaligned_cases, plain_case

REFERENCE = magnitude_histogram.implementations["reference"]


def native(case: Case) -> np.ndarray:
    operands, base, selection = case.native()
    sums = np.zeros((len(operands), 2, 256), np.int64)
    for first, count, _ in case.ranges():
        _C.l1_norms(sums.ctypes.data, operands, base, selection, first, count)
    return sums


def counted(case: Case) -> np.ndarray:
    options = {"joint": case.joint, "rounded": case.rounded}
    return REFERENCE(case.tensors, case.base, *case.random, None, case.row_scales, **options).numpy()


def exact(sums: np.ndarray) -> list[Fraction]:
    """The sums of dropped and of kept elements of each input."""
    return [
        sum(int(number) * Fraction(2) ** (max(e, 1) - 150) for e, number in enumerate(row[:255]))
        for row in sums.reshape(-1, 256)
    ]


def assert_same_sums(case: Case) -> None:
    found, wanted = native(case), sums_by_exponent(counted(case))
    assert exact(found) == exact(wanted)
    assert ((found[..., 255] != 0) == (wanted[..., 255] != 0)).all()


@every_variant
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_any_selection_is_summed_as_the_reference_counts_it(variant, case):
    with using(variant):
        assert_same_sums(case)


@every_variant
@pytest.mark.parametrize("rounded", [True, False])
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_every_kind_of_value(variant, dtype, rounded):
    # NaN, infinities, denormals and differences that overflow: no tile is added in float64.
    case = plain_case([any_bits(30_000, dtype, seed=1)], any_bits(30_000, dtype, seed=2), 0.5, rounded=rounded)
    with using(variant):
        assert_same_sums(case)


@every_variant
@pytest.mark.parametrize("span", [34, 35, 36, 60])
@pytest.mark.parametrize("low", [-126, -100, 0, 40, 62, 63, 64, 65, 66])
def test_exponents_of_a_tile_that_lie_far_apart(variant, span, low):
    # The largest magnitudes of a tile fill its float64 sum, and one of the smallest must not be lost.
    largest = min(low + span, 127)
    x = torch.full((3000,), 1.9921875 * 2.0**largest, dtype=BF16)
    x[[5, 1023, 1024, 2999]] = 1.0078125 * 2.0**low
    with using(variant):
        assert_same_sums(plain_case([x, -x], torch.zeros(3000, dtype=BF16), 0.5))


@every_variant
@pytest.mark.parametrize("value", [0.0, 1.0, 2.0**-126, 2.0**-133, 3.3e38])
def test_equal_magnitudes(variant, value):
    x = torch.full((70_000,), value, dtype=BF16)
    with using(variant):
        assert_same_sums(plain_case([x], torch.zeros(70_000, dtype=BF16), 0.5))


@every_variant
def test_every_length_and_alignment(variant):
    with using(variant):
        for operands, selection, case in misaligned_cases():
            sums, count = np.zeros((1, 2, 256), np.int64), len(case.base)
            _C.l1_norms(sums.ctypes.data, operands[:1], operands[1], selection, 0, count)
            assert exact(sums) == exact(sums_by_exponent(counted(case))), count


@every_variant
@pytest.mark.parametrize("first", [0, 1, 63, 256, 300])
@pytest.mark.parametrize("probability", [(0.3, 0.3), (0.2, 0.7)])
def test_masks_that_are_written_are_the_ones_that_are_drawn(variant, first, probability):
    size, k = 5000, 2
    tensors, base = [normal(size, seed=seed) for seed in (1, 2)], normal(size, seed=3)
    case = plain_case(tensors, base)
    case.probabilities = [probability] * k
    operands, native_base, selection = case.native()
    bits = torch.full((k, -(-size // 256) * 32), 255, dtype=torch.uint8)
    masked = _C.Selection(
        case.cuts, case.keys, case.probabilities, size, rounded=True, masks=[row.data_ptr() for row in bits]
    )
    sums = np.zeros((k, 2, 256), np.int64)
    consensus = _C.Consensus([(1.0, 1.0, 0.0, 1.0)] * k, 1)
    with using(variant):
        for start, end in ((0, 1024), (1024, size)):
            _C.l1_norms(sums.ctypes.data, operands, native_base, masked, start, end - start)
        assert exact(sums) == exact(sums_by_exponent(counted(case)))
        out = [torch.empty(size, dtype=BF16) for _ in range(2)]
        for result, chosen in zip(out, (selection, masked), strict=True):
            address = result.data_ptr() + 2 * first
            _C.consensus_combine(
                address, 0, operands, native_base, chosen, consensus, [(0, 0)] * k, first, size - first
            )
        assert torch.equal(out[0][first:], out[1][first:])
    # Masks are read in place of drawing numbers.
    bits.zero_()
    result = torch.empty(size, dtype=BF16)
    with using(variant):
        _C.consensus_combine(result.data_ptr(), 0, operands, native_base, masked, consensus, [(0, 0)] * k, 0, size)
    assert torch.equal(result, base)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_norms_are_rounded_once(values):
    x = torch.tensor(values, dtype=F32).to(BF16)
    ((all_, kept, nonfinite),) = norms_of(native(plain_case([x], torch.zeros_like(x)))).tolist()
    assert all_ == kept == float(sum(Fraction(abs(value)) for value in x.double().tolist()))
    assert nonfinite == 0


def test_infinity_is_noticed_and_not_added():
    x = torch.tensor([1.0, float("inf"), 2.0, float("nan")], dtype=BF16)
    ((all_, kept, nonfinite),) = norms_of(native(plain_case([x], torch.zeros_like(x)))).tolist()
    assert all_ == kept == 3
    assert nonfinite != 0
