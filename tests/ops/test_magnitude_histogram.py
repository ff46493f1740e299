"""magnitude_histogram: the native code against the reference, count by count."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arcmerge import _C
from arcmerge.errors import ArcmergeError
from arcmerge.ops import magnitude_histogram
from operands import BF16, F16, F32, any_bits, every_variant, normal, operand, using
from selections import Case, cases, misaligned_cases, plain_case

REFERENCE = magnitude_histogram.implementations["reference"]


def native(case: Case, prefixes=None):
    operands, base, selection = case.native()
    k = len(operands)
    if prefixes is None:
        out = torch.zeros(k, 2 if case.rounded else 4, 32768, dtype=torch.int64)
    else:
        out = torch.zeros(k, len(prefixes[0]), 65536, dtype=torch.int64)
    for first, count, _ in case.ranges():
        if prefixes is None:
            _C.magnitude_histogram(out.data_ptr(), operands, base, selection, first, count)
        else:
            _C.magnitude_histogram_within(out.data_ptr(), operands, base, selection, prefixes, first, count)
    return out


def expected(case: Case, prefixes=None):
    wanted = None if prefixes is None else torch.tensor(prefixes)
    options = {"joint": case.joint, "rounded": case.rounded}
    return REFERENCE(case.tensors, case.base, *case.random, wanted, case.row_scales, **options)


@every_variant
@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_any_selection_is_counted_as_by_the_reference(variant, case):
    with using(variant):
        assert torch.equal(native(case), expected(case))


@every_variant
@settings(max_examples=20, deadline=None)
@given(case=cases(), data=st.data())
def test_codes_within_prefixes_are_counted_as_by_the_reference(variant, case, data):
    some = st.sampled_from((case.codes.flatten() >> 16).tolist() or [3]) | st.integers(0, 32767)
    prefixes = [[data.draw(some), data.draw(some)] for _ in case.tensors]
    with using(variant):
        assert torch.equal(native(case, prefixes), expected(case, prefixes))


@every_variant
@pytest.mark.parametrize("probability", [1.0, 0.5])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.9, 1.0])
def test_every_share_of_changed_elements(variant, probability, share):
    # From none to all; long enough for all copies of the counters to be merged.
    base, noise = normal(300_000, seed=1), normal(300_000, seed=2)
    changed = torch.rand(300_000, generator=torch.Generator().manual_seed(3)) < share
    case = plain_case([torch.where(changed, noise, base), base], base, probability)
    with using(variant):
        out = native(case)
    assert torch.equal(out, expected(case))
    assert out.sum((1, 2)).tolist() == [300_000, 300_000]


def differences_of(kind: str, rows: int, columns: int) -> torch.Tensor:
    """bf16 differences from 0 whose ranks meet many equals, or none."""
    draw = torch.Generator().manual_seed(columns)
    noise = torch.randn(rows, columns, generator=draw)
    chance = torch.rand(rows, columns, generator=draw)
    powers = noise.sign() * 2.0 ** torch.randint(-3, 3, (rows, columns), generator=draw)
    return {
        "noise": noise,
        "equal": torch.full((rows, columns), 0.25),
        "zero": torch.zeros(rows, columns),
        "sparse": noise * (chance < 0.2),
        "few": powers,
        # Some elements are so small that places are not counted for each of their codes.
        "few and tiny": torch.where(chance < 0.025, powers * 2.0**-30, powers),
        # A larger one makes all others of some rows that small.
        "outliers": torch.where(chance < 0.3 / columns, noise * 2.0**40, noise),
        "not finite": torch.where(chance < 0.01, torch.where(chance < 0.005, torch.inf, torch.nan), noise),
        "wide": noise * 2.0 ** torch.randint(-120, 120, (rows, columns), generator=draw).float(),
        "largest": noise.sign() * 3e38,
        "smallest": noise.sign() * torch.randint(0, 3, (rows, columns), generator=draw) * 2.0**-133,
    }[kind].to(BF16)


KINDS = [
    "noise",
    "equal",
    "zero",
    "sparse",
    "few",
    "wide",
    "largest",
    "smallest",
    "few and tiny",
    "outliers",
    "not finite",
]


@every_variant
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [2, 3, 17, 255, 2304, 9217])
def test_probabilities_by_rank(variant, kind, columns):
    # The last pair is of a smaller range than thresholds in float32 can tell apart.
    probabilities = [(0.35, 0.65), (0.001, 0.999), (0.5, 0.5 + 1e-6)]
    rows = max(4, min(70, 30_000 // columns))
    tensors = [differences_of(kind, rows, columns), differences_of("noise", rows, columns)]
    base = torch.zeros(rows, columns, dtype=BF16)
    for probability in probabilities:
        case = plain_case(tensors, base, bounds=[0, 7, base.numel() // 2, base.numel()])
        case.probabilities = [probability] * 2
        with using(variant):
            assert torch.equal(native(case), expected(case))


@every_variant
@pytest.mark.parametrize("columns", [65_535, 65_536])
def test_rows_that_16_bits_can_count_and_longer_ones(variant, columns):
    tensors, base = [differences_of("few", 2, columns)], torch.zeros(2, columns, dtype=BF16)
    case = plain_case(tensors, base, bounds=[0, columns, 2 * columns])
    case.probabilities = [(0.35, 0.65)]
    with using(variant):
        assert torch.equal(native(case), expected(case))


@every_variant
def test_equal_differences_are_all_counted(variant):
    case = plain_case([torch.full((200_000,), 1.5, dtype=BF16)], torch.ones(200_000, dtype=BF16))
    with using(variant):
        assert int(native(case)[0, 1, 0x3F00]) == 200_000


@every_variant
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_every_kind_of_value(variant, dtype):
    # NaN, infinities, denormals and differences that overflow.
    case = plain_case([any_bits(100_000, dtype, seed=1)], any_bits(100_000, dtype, seed=2))
    with using(variant):
        assert torch.equal(native(case), expected(case))


@every_variant
def test_every_length_and_alignment(variant):
    with using(variant):
        for operands, selection, case in misaligned_cases():
            out, count = torch.zeros(1, 2, 32768, dtype=torch.int64), len(case.base)
            _C.magnitude_histogram(out.data_ptr(), operands[:1], operands[1], selection, 0, count)
            assert torch.equal(out, expected(case)), count


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_op_serves_strided_tensors_alike_on_every_backend(monkeypatch, backend):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    tensors, base = [normal(70, 31).t(), normal(31, 140, dtype=F16)[:, ::2]], normal(31, 70, dtype=F32)
    scales = normal(62, dtype=F32)[::2].abs()
    keys, probabilities = torch.tensor([3, -4]), torch.tensor([[0.2, 0.9], [1, 1]], dtype=torch.float64)
    out = magnitude_histogram(tensors, base, keys, probabilities, None, scales)
    assert torch.equal(out, REFERENCE(tensors, base, keys, probabilities, None, scales))
    prefix = torch.tensor([[0x3F80], [0x3F00]])
    out = magnitude_histogram(tensors, base, keys, probabilities, prefix, scales, joint=True)
    assert torch.equal(out, REFERENCE(tensors, base, keys, probabilities, prefix, scales, joint=True))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        pytest.param(([], [], [], 5), "'operands' must have 1 or more entries, got 0", id="operands"),
        pytest.param((["x"], [], [(1, 1)], 5), "'keys' must be as many as the operands (1), got 0", id="keys"),
        pytest.param(
            (["x"], [1], [], 5), "'probabilities' must be as many as the operands (1), got 0", id="probabilities"
        ),
        pytest.param((["x"], [1], [(1, 1)], 0), "'columns' must be 1 or more, got 0", id="columns"),
        pytest.param(
            (["x"], [1], [(0, 1)], 2**31),
            "'columns' must be below 2^31 for probabilities by rank, got 2147483648",
            id="ranks",
        ),
    ],
)
def test_wrong_native_calls_are_refused_in_a_sentence(arguments, sentence):
    operands, keys, probabilities, columns = arguments
    x = normal(5)
    selection = _C.Selection([], keys, probabilities, columns)
    for call in (_C.magnitude_histogram, lambda *rest: _C.magnitude_histogram_within(*rest[:4], [[]], *rest[4:])):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            call(0, [operand(x) for _ in operands], operand(x), selection, 0, 5)


def test_wrong_calls_are_refused_in_a_sentence():
    x, ones = normal(2, 3), torch.ones(1, 2, dtype=torch.float64)
    with pytest.raises(ArcmergeError, match=r"'keys' must be int64, got int32"):
        magnitude_histogram([x], x, torch.zeros(1, dtype=torch.int32), ones, None, None)
    with pytest.raises(ArcmergeError, match=r"'row_scales' must have the shape"):
        magnitude_histogram([x], x, torch.zeros(1, dtype=torch.int64), ones, None, torch.ones(3))
