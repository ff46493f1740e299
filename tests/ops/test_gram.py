"""gram: its sums in the documented order, bit for bit, and their error against exact ones."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arcmerge import _C
from arcmerge.dispatch.registry import backends
from arcmerge.errors import ArcmergeError
from arcmerge.ops import gram
from operands import BF16, F16, F32, any_bits, at_offset, every_variant, gathered, normal, operand, same_bits, using

dtypes = st.sampled_from([BF16, F16, F32])


def sum_in_lanes(x, y):
    """sum(x * y) in the order of csrc/cpu/merge/gram.cpp: 16 lanes of float64, in which the products are exact."""
    x, y = (np.pad(v.double().numpy(), (0, -len(v) % 16)).reshape(-1, 16) for v in (x, y))
    lanes = np.zeros(16)
    for products in x * y:
        lanes = lanes + products
    total = 0.0
    for lane in lanes:
        total += float(lane)
    return total


def expected_gram(values):
    return torch.tensor([[sum_in_lanes(x, y) for y in values] for x in values], dtype=torch.float64)


def native(operands, count, base=None, first=0):
    k = len(operands)
    return torch.tensor(_C.gram(operands, base, first, count), dtype=torch.float64).reshape(k, k)


@every_variant
def test_bf16_pair_at_every_length_and_alignment(variant):
    a, b = normal(300, seed=1), normal(300, seed=2)
    beyond = torch.full((64,), float("nan"), dtype=BF16)
    with using(variant):
        for count in range(300):
            start_a, start_b = 2 * (count % 33), 1 + count % 64
            buffers = [
                at_offset(torch.cat([value[:count], beyond]), start) for value, start in ((a, start_a), (b, start_b))
            ]
            operands = [_C.Operand(buffers[0].data_ptr() + start_a, 0), _C.Operand(buffers[1].data_ptr() + start_b, 0)]
            assert same_bits(native(operands, count), expected_gram([a[:count], b[:count]])), count


@every_variant
@settings(max_examples=40, deadline=None)
@given(
    inputs=st.lists(st.tuples(dtypes, st.none() | dtypes), min_size=1, max_size=10),
    count=st.integers(0, 2100),
    first=st.integers(0, 70),
    seed=st.integers(0, 2**20),
)
def test_any_mix_of_dtypes_and_casts(variant, inputs, count, first, seed):
    values = [normal(first + count, dtype=dtype, seed=seed + number) for number, (dtype, _) in enumerate(inputs)]
    cast = [value if to is None else value.to(to) for value, (_, to) in zip(values, inputs, strict=True)]
    operands = [operand(value, to) for value, (_, to) in zip(values, inputs, strict=True)]
    with using(variant):
        out = native(operands, count, first=first)
    assert same_bits(out, expected_gram([value[first:] for value in cast]))


@every_variant
@pytest.mark.parametrize("k", [9, 17, 33])
def test_any_number_of_inputs(variant, k):
    values = [normal(1500, dtype=(BF16, F16, F32)[seed % 3], seed=seed) for seed in range(k)]
    with using(variant):
        out = native([operand(value) for value in values], 1500)
    wide = torch.stack([value.double() for value in values])
    lengths = wide.norm(dim=1)
    assert ((out - wide @ wide.T).abs() <= 1e-9 * lengths[:, None] * lengths).all()
    # Each entry has the bits that it has alone.
    for i, j in ((0, k - 1), (k - 2, k - 1), (8, 3)):
        with using(variant):
            assert same_bits(out[i, j], native([operand(values[i]), operand(values[j])], 1500)[0, 1])


@every_variant
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_differences_to_a_base_are_rounded_to_float32(variant, dtype):
    values = [normal(1500, dtype=dtype, seed=seed) for seed in (1, 2, 3)]
    base = normal(1500, dtype=F32, seed=4)
    with using(variant):
        out = native([operand(value) for value in values], 1500, base=operand(base, F16))
    assert same_bits(out, expected_gram([value.float() - base.half().float() for value in values]))


@every_variant
@pytest.mark.parametrize("columns", [1, 31, 1500])
def test_gathered_rows_and_the_generic_path_have_the_bits_of_the_pair_path(variant, columns):
    tables = [normal(9, columns, seed=1), normal(11, columns, seed=2)]
    picks = [[3, 3, 0, 8, 5], [10, 2, 2, 7, 0]]
    rows = [table[pick].flatten() for table, pick in zip(tables, picks, strict=True)]
    pairs = [gathered([table[row] for row in pick]) for table, pick in zip(tables, picks, strict=True)]
    with using(variant):
        plain = native([operand(row) for row in rows], 5 * columns)
        assert same_bits(native([operand_ for operand_, _ in pairs], 5 * columns), plain)
        assert same_bits(native([operand(row, BF16) for row in rows], 5 * columns), plain)


@every_variant
def test_infinities_and_nan_reach_the_sums(variant):
    a, b = any_bits(4000, BF16, seed=1), normal(4000, seed=2)
    with using(variant):
        out = native([operand(a), operand(b)], 4000)
    assert out[0, 0].isnan()
    assert out[0, 1].isnan()
    assert out[1, 1].isfinite()


def test_bf16_squares_neither_overflow_nor_vanish():
    values = torch.tensor([3e38, 1e-38], dtype=BF16)
    for value in values.split(1):
        assert native([operand(value)] * 2, 1).tolist() == [[value.item() ** 2] * 2] * 2


def test_error_against_exact_sums_at_21_million_elements():
    # The largest layer matrices of Gemma-2 2.6B have 9216 * 2304 elements.
    count = 9216 * 2304
    a = normal(count, seed=1) * 0.02
    b = (a.float() + 0.01 * normal(count, seed=2).float()).bfloat16()
    out = native([operand(a), operand(b)], count)
    # Products of bf16 are exact in float64, and numpy adds float64 pairwise: an error of 1e-15 or so.
    wide = [value.double().numpy() for value in (a, b)]
    exact = [[float(np.sum(x * y)) for y in wide] for x in wide]
    for i, j in ((0, 0), (0, 1), (1, 1)):
        bound = 1e-9 * math.sqrt(exact[i][i] * exact[j][j])
        assert abs(out[i, j].item() - exact[i][j]) <= bound, (i, j)
        assert out[i, j] == out[j, i]


@every_variant
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 8, 12])
def test_matrices_of_rows_are_those_of_ranges(variant, with_base, k):
    rows, columns = 4, 1100
    values = [normal(rows, columns, seed=seed) for seed in range(k)]
    base = operand(values[0]) if with_base else None
    operands = [operand(value) for value in values]
    out = torch.full((rows, k, k), float("nan"), dtype=torch.float64)
    with using(variant):
        _C.gram_vectors(operands, base, rows, columns, 1, out.data_ptr())
        ranges = [native(operands, columns, base=base, first=row * columns) for row in range(rows)]
    assert same_bits(out, torch.stack(ranges))


@every_variant
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (40, 3), (3, 2500)])
def test_matrices_of_columns_are_added_row_by_row_in_float64(variant, with_base, rows, columns):
    values = [normal(rows, columns, seed=seed, dtype=dtype) for seed, dtype in enumerate((BF16, F16, F32))]
    subtracted = [value.float() - (values[0].float() if with_base else 0) for value in values]
    expected = torch.zeros(columns, 3, 3, dtype=torch.float64)
    for row in range(rows):
        x = torch.stack([value[row].double() for value in subtracted], dim=1)
        expected += x[:, :, None] * x[:, None, :]
    out = torch.full((columns, 3, 3), float("nan"), dtype=torch.float64)
    base = operand(values[0]) if with_base else None
    with using(variant):
        _C.gram_vectors([operand(value) for value in values], base, rows, columns, 0, out.data_ptr())
    assert same_bits(out, expected)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dim", [None, 0, 1, -2])
@pytest.mark.parametrize("with_base", [False, True])
def test_op_serves_strided_tensors_alike_on_every_backend(monkeypatch, backend, dim, with_base):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    a, b = normal(70, 31).t(), normal(31, 140, dtype=F16)[:, ::2]
    base = normal(31, 70, dtype=F32) if with_base else None
    values = [value.double() if base is None else (value.float() - base).double() for value in (a, b)]
    axes = (0, 1) if dim is None else dim
    expected = torch.stack([torch.stack([(x * y).sum(axes) for y in values], -1) for x in values], -2)
    lengths = torch.stack([(x * x).sum(axes).sqrt() for x in values], -1)
    error = (gram([a, b], base=base, dim=dim) - expected).abs()
    # All is float64; at most 2170 additions.
    assert (error <= 2170 * 2**-53 * lengths[..., :, None] * lengths[..., None, :]).all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("dim", [None, 0, 1])
def test_op_gives_zeros_for_empty_tensors(shape, dim):
    vectors = {None: (), 0: (shape[1],), 1: (shape[0],)}[dim]
    assert gram([torch.ones(shape)] * 2, dim=dim).shape == (*vectors, 2, 2)
    assert not gram([torch.ones(shape)] * 2, dim=dim).any()


def test_a_base_unlike_the_tensors_is_refused():
    with pytest.raises(ArcmergeError) as caught:
        gram([torch.ones(3)], base=torch.ones(4))
    assert str(caught.value) == "'base' must have the shape of 'tensors[0]', [3], got [4]"


def test_a_forced_backend_that_cannot_serve_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("ARCMERGE_BACKEND", "triton")
    with pytest.raises(
        ArcmergeError,
        match="'ARCMERGE_BACKEND' must name a backend that can run gram on cpu, got 'triton': it runs on cuda",
    ):
        gram([torch.ones(3)])
    monkeypatch.setenv("ARCMERGE_BACKEND", "fortran")
    with pytest.raises(ArcmergeError, match=r"must be one of native, cuda_cpp, triton, reference, .*, got 'fortran'"):
        gram([torch.ones(3)])


def test_backends_explain_themselves(monkeypatch):
    monkeypatch.delenv("ARCMERGE_BACKEND", raising=False)
    assert backends("cpu")["gram"] == f"native ({_C.variant()} code)"
    assert "not native: it runs on cpu, not on cuda" in backends("cuda")["gram"]
    monkeypatch.setenv("ARCMERGE_BACKEND", "native")
    assert backends("cpu")["gram"].endswith("forced by ARCMERGE_BACKEND")
    assert backends("cuda")["gram"].endswith("on cuda, got 'native': it runs on cpu, not on cuda")
