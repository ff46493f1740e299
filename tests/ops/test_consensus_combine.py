"""consensus_combine: the native code against the reference, bit for bit; consensus_sums and row_divergences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arcmerge import _C
from arcmerge.errors import ArcmergeError
from arcmerge.ops import consensus_combine
from arcmerge.ops.consensus_combine import ELECTIONS
from arcmerge.ops.selection import NO_CUT, between, drawn
from operands import BF16, CODES, F16, F32, at_offset, every_variant, gathered, normal, operand, same_bits, using
from selections import Case, cases

REFERENCE = consensus_combine.implementations["reference"]
dtypes = st.sampled_from([BF16, F16, F32])
rules = st.fixed_dictionaries(
    {
        "election": st.sampled_from(ELECTIONS),
        "zero_is_negative": st.booleans(),
        "floor": st.sampled_from([0.0, 1e-6, 0.7]),
        "inverse": st.booleans(),
    }
)


def some_factors(k, seed):
    return normal(k, 4, dtype=F32, seed=seed) if seed % 3 else torch.ones(k, 4)


def native_rule(factors, *, election, **options):
    return _C.Consensus(factors.tolist(), ELECTIONS.index(election), **options)


def native(case, factors, rule, out_dtype):
    out = torch.full(case.base.shape, 7.0, dtype=out_dtype)
    consensus, nonfinite = native_rule(factors, **rule), 0
    for first, count, before in case.ranges():
        address = out.data_ptr() + first * out.element_size()
        nonfinite += _C.consensus_combine(address, CODES[out_dtype], *case.native(), consensus, before, first, count)
    assert nonfinite == int((~out.isfinite()).sum())
    return out


def expected(case, factors, rule, out_dtype):
    arguments = (case.tensors, case.base, factors, torch.tensor(case.cuts), *case.random, case.row_scales)
    return REFERENCE(*arguments, out_dtype=out_dtype, joint=case.joint, rounded=case.rounded, **rule)


@every_variant
@settings(max_examples=100, deadline=None)
@given(case=cases(), rule=rules, out_dtype=dtypes, seed=st.integers(0, 2**20))
def test_any_selection_and_rule_has_the_bits_of_the_reference(variant, case, rule, out_dtype, seed):
    factors = some_factors(len(case.tensors), seed)
    with using(variant):
        assert same_bits(native(case, factors, rule, out_dtype), expected(case, factors, rule, out_dtype))


def ties(elements, k=2, probability=1.0):
    """bf16 tensors with a cut in the middle of many equal differences."""
    base = normal(elements, seed=9)
    tensors = [base + (normal(elements, seed=seed) * 2).round() / 64 for seed in range(k)]
    cuts = [NO_CUT] * k
    case = Case(tensors, base, cuts, list(range(k)), [(probability,) * 2] * k, None, False, True, [0, elements])
    for index, row in enumerate(case.codes):
        order = torch.sort(row, descending=True, stable=True).values
        middle = order[elements // 2]
        # The first is cut twice at this code.
        upper = (int(middle), 5) if index == 0 else NO_CUT[:2]
        cuts[index] = (*upper, int(middle), int((order[: elements // 2] == middle).sum()))
    return case


@every_variant
@pytest.mark.parametrize("election", ELECTIONS)
@pytest.mark.parametrize("probability", [1.0, 0.5])
def test_cuts_between_equal_differences(variant, election, probability):
    case = ties(20_000, probability=probability)
    factors, rule = torch.ones(2, 4), {"election": election}
    with using(variant):
        whole = native(case, factors, rule, BF16)
        assert same_bits(whole, expected(case, factors, rule, BF16))
        for bounds in ([0, 1, 3000, 20_000], [0, 1023, 1025, 16_385, 20_000]):
            case.bounds = bounds
            assert same_bits(native(case, factors, rule, BF16), whole)


@every_variant
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_every_length_and_alignment_writes_nothing_else(variant, dtype):
    values, sentinel = [normal(200, dtype=dtype, seed=seed) for seed in (1, 2, 3)], 0xA5
    size = dtype.itemsize
    consensus = _C.Consensus([(1, 1, 1, 1)] * 2, 1)
    whole = expected(
        Case(values[:2], values[2], [NO_CUT] * 2, [1, 2], [(1, 1)] * 2, None, False, True, []),
        torch.ones(2, 4),
        {"election": "sum"},
        dtype,
    )
    with using(variant):
        for count in range(200):
            starts = [2 * (count % 33), 1 + count % 64, 3 * (count % 5)]
            buffers = [at_offset(value[:count], start) for value, start in zip(values, starts, strict=True)]
            *operands, base = (
                _C.Operand(buffer.data_ptr() + start, CODES[dtype])
                for buffer, start in zip(buffers, starts, strict=True)
            )
            begin = 64 + 2 * (count % 37)
            out = torch.full((begin + size * count + 64,), sentinel, dtype=torch.uint8)
            selection = _C.Selection([NO_CUT] * 2, [1, 2], [(1, 1)] * 2, count, False, True)
            address = out.data_ptr() + begin
            _C.consensus_combine(address, CODES[dtype], operands, base, selection, consensus, [(0, 0)] * 2, 0, count)
            end = begin + size * count
            assert same_bits(out[begin:end].clone().view(dtype), whole[:count]), count
            assert (out[:begin] == sentinel).all(), count
            assert (out[end:] == sentinel).all(), count


@every_variant
def test_gathered_rows(variant):
    tables = [normal(9, 700, seed=seed) for seed in (1, 2, 3)]
    picks = [[3, 3, 0, 8, 5], [8, 2, 2, 7, 0], [1, 2, 3, 4, 5]]
    pairs = [gathered([table[row] for row in pick]) for table, pick in zip(tables, picks, strict=True)]
    rows = [table[pick] for table, pick in zip(tables, picks, strict=True)]
    case = Case(rows[:2], rows[2], [NO_CUT] * 2, [1, 2], [(0.3, 0.8)] * 2, None, False, True, [0, 3500])
    out = torch.empty(5, 700, dtype=BF16)
    consensus = _C.Consensus([(1, 1, 1, 1)] * 2, 2)
    *operands, base = (pair[0] for pair in pairs)
    with using(variant):
        _C.consensus_combine(out.data_ptr(), 0, operands, base, case.native()[2], consensus, [(0, 0)] * 2, 0, 3500)
    assert same_bits(out, expected(case, torch.ones(2, 4), {"election": "count"}, BF16))


@every_variant
def test_results_that_are_not_finite_are_counted(variant):
    base = torch.zeros(3000)
    tensors = [torch.ones(3000), torch.ones(3000)]
    tensors[0][[5, 1030]] = torch.tensor([float("nan"), float("inf")])
    tensors[1][2999] = 3.4e38  # rounds to an infinite bfloat16
    case = Case(tensors, base, [NO_CUT] * 2, [0, 1], [(1, 1)] * 2, None, False, True, [0, 700, 3000])
    with using(variant):
        out = native(case, torch.tensor([[1, 1, 0.5, 1]] * 2), {"election": "none"}, BF16)
    assert (~out.isfinite()).nonzero().flatten().tolist() == [5, 1030, 2999]
    assert out[1030].isnan()


def selected(case):
    """The differences that are kept and lie between the cuts, [k, elements]."""
    rows = []
    for index, tensor in enumerate(case.tensors):
        chance = torch.full(case.base.shape, case.probabilities[index][0], dtype=torch.float64)
        kept = between(case.codes[index], case.cuts[index]) & drawn(chance, case.keys[index])
        rows.append(torch.where(kept, tensor.float() - case.base.float(), 0.0))
    return torch.stack(rows)


@every_variant
@pytest.mark.parametrize("election", ELECTIONS)
@pytest.mark.parametrize("elements", [1, 5, 1023, 20_000])
def test_sums_are_those_of_the_selected_differences(variant, election, elements):
    case, factors = ties(elements, k=3, probability=0.7), normal(3, 4, dtype=F32, seed=1)
    kept = selected(case)
    votes = factors[:, :1] * kept
    total = (votes[0] + votes[1]) + votes[2] if election == "sum" else votes.sign().sum(0)
    agrees = kept != 0 if election == "none" else torch.where(total < 0, votes < 0, votes > 0)
    balance = 0 if election == "none" else int((total > 0).sum() - (total < 0).sum())
    several = agrees.sum(0) > 1
    with using(variant):
        rule = native_rule(factors, election=election)
        squares, alone, shared, found = _C.consensus_sums(*case.native(), rule, [(0, 0)] * 3, 0, elements)
    torch.testing.assert_close(torch.tensor(squares).double(), kept.double().square().sum(1), rtol=1e-6, atol=0)
    assert alone == (agrees & ~several).sum(1).tolist()
    assert shared == (agrees & several).sum(1).tolist()
    assert found == balance


def test_sums_have_the_bits_of_gram():
    base, x = normal(70_001, seed=1), normal(70_001, seed=2, dtype=F32)
    selection = _C.Selection([NO_CUT], [0], [(1, 1)], len(x))
    for variant in _C.variants():
        with using(variant):
            squares, *_ = _C.consensus_sums(
                [operand(x)], operand(base), selection, _C.Consensus([(1, 1, 1, 1)]), [(0, 0)], 3, 70_000 - 2
            )
            assert squares == _C.gram([operand(x)], operand(base), 3, 70_000 - 2)


def test_sums_of_parts_are_those_of_the_whole():
    case, rule = ties(20_000), _C.Consensus([(1, 1, 1, 1)] * 2, 1)
    _, alone, shared, balance = _C.consensus_sums(*case.native(), rule, [(0, 0)] * 2, 0, 20_000)
    case.bounds = [0, 7, 1024, 15_000, 20_000]
    parts = [_C.consensus_sums(*case.native(), rule, before, first, count) for first, count, before in case.ranges()]
    assert [sum(part[1][i] for part in parts) for i in range(2)] == alone
    assert [sum(part[2][i] for part in parts) for i in range(2)] == shared
    assert sum(part[3] for part in parts) == balance


def divergences(x, base, first=0, rows=None):
    rows = len(x) - first if rows is None else rows
    out = torch.full((rows,), 7.0)
    _C.row_divergences(out.data_ptr(), operand(x), operand(base), x.shape[1], first, rows)
    return out


@pytest.mark.parametrize("columns", [1, 3, 1000, 3001])
@pytest.mark.parametrize("scale", [0.02, 5.0])
def test_divergences_are_those_of_the_softmax(columns, scale):
    x = (normal(6, columns, dtype=F32, seed=1) * scale).to(BF16)
    base = x.float() + normal(6, columns, dtype=F32, seed=2) * scale
    p, q = (value.double().log_softmax(-1) for value in (x, base))
    expected = (p.exp() * (p - q)).sum(-1).float()
    found = []
    for variant in _C.variants():
        with using(variant):
            found.append(divergences(x, base))
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=1e-15)
    assert all(torch.equal(other, found[0]) for other in found)
    assert torch.equal(divergences(x, base, 2, 3), found[0][2:5])


def test_small_divergences_keep_their_digits():
    # The textbook formula has lost all of them: half the variance of the difference is 5e-17.
    x = normal(1, 4000, dtype=F32, seed=1) * 1e-3
    base = x.double() + normal(1, 4000, dtype=F32, seed=2).double() * 1e-8
    rounded = base.float()
    difference, p = rounded.double() - x.double(), x.double().softmax(-1)
    variance = (p * (difference - (p * difference).sum()).square()).sum()
    assert float(divergences(x, rounded)[0]) == pytest.approx(float(variance) / 2, rel=1e-6)
    assert divergences(x, x).tolist() == [0.0]


def test_divergences_of_far_logits_do_not_overflow():
    # e^1000 is infinite, but the second column of the base has one half of the probability.
    x, base = torch.tensor([[0.0, -1000.0]]), torch.zeros(1, 2)
    assert divergences(x, base).tolist() == pytest.approx([math.log(2)], rel=1e-7)
    assert divergences(base, x).tolist() == pytest.approx([500 - math.log(2)], rel=1e-7)


def test_rows_that_are_not_finite_have_no_divergence():
    x, base = torch.zeros(4, 50), torch.zeros(4, 50)
    x[0, 49], x[1, 3], base[2, 7] = float("nan"), float("-inf"), float("inf")
    assert divergences(x, base).isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_op_serves_strided_tensors_alike_on_every_backend(monkeypatch, backend):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    tensors, base = [normal(70, 31).t(), normal(31, 140, dtype=F16)[:, ::2]], normal(31, 70, dtype=F32)
    scales = normal(62, dtype=F32)[::2].abs()
    keys, probabilities = torch.tensor([3, -4]), torch.tensor([[0.2, 0.9], [1, 1]], dtype=torch.float64)
    arguments = (tensors, base, normal(2, 4, dtype=F32), torch.tensor([NO_CUT] * 2), keys, probabilities, scales)
    out = consensus_combine(*arguments, out_dtype=BF16, election="count", inverse=True)
    assert out.is_contiguous()
    assert same_bits(out, REFERENCE(*arguments, out_dtype=BF16, election="count", inverse=True))


@pytest.mark.parametrize(
    ("cuts", "factors", "before", "name"), [(0, 1, 1, "cuts"), (1, 0, 1, "factors"), (1, 1, 2, "before")]
)
def test_wrong_native_calls_are_refused_in_a_sentence(cuts, factors, before, name):
    x = normal(5)
    selection, rule = _C.Selection([NO_CUT] * cuts, [1], [(1, 1)], 5), _C.Consensus([(1, 1, 1, 1)] * factors)
    with pytest.raises(ValueError, match=rf"'{name}' must be as many as the operands \(1\), got [02]"):
        _C.consensus_sums([operand(x)], operand(x), selection, rule, [(0, 0)] * before, 0, 5)


def test_unknown_elections_are_refused():
    with pytest.raises(ValueError, match=r"'election' must be 0 \(none\), 1 \(sum\) or 2 \(count\), got 3"):
        _C.Consensus([], 3)
    x = normal(2, 3)
    arguments = (torch.ones(1, 4), torch.tensor([NO_CUT]), torch.tensor([0]), torch.ones(1, 2, dtype=torch.float64))
    with pytest.raises(ArcmergeError, match=r"'election' must be one of none, sum, count, got 'all'"):
        consensus_combine([x], x, *arguments, None, out_dtype=BF16, election="all")
