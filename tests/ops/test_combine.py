"""combine: the native code and the ops dispatch against plain torch, bit for bit."""

import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arcmerge import _C
from arcmerge.errors import ArcmergeError
from arcmerge.ops import combine
from operands import (
    BF16,
    CODES,
    F16,
    F32,
    any_bits,
    at_offset,
    every_variant,
    gathered,
    normal,
    operand,
    same_bits,
    using,
)

dtypes = st.sampled_from([BF16, F16, F32])


def reference(values, coefficients, out_dtype):
    """The definition: float32 products and sums, each rounded, from left to right, and one rounding at the end."""
    total = None
    for value, coefficient in zip(values, coefficients, strict=True):
        term = torch.tensor(coefficient, dtype=F32) * value.float()
        total = term if total is None else total + term
    return total.to(out_dtype)


def native(operands, coefficients, count, out_dtype, first=0):
    out = torch.full((count,), float("nan"), dtype=out_dtype)
    nonfinite = _C.combine(out.data_ptr(), CODES[out_dtype], operands, coefficients, first, count)
    assert nonfinite == int((~out.isfinite()).sum())
    return out


@every_variant
def test_bf16_pair_at_every_length_and_alignment_writes_nothing_else(variant):
    a, b = normal(300, seed=1), normal(300, seed=2)
    expected = reference([a, b], [0.3, 0.7], BF16)
    sentinel = 0xA5
    with using(variant):
        for count in range(300):
            start_a, start_b, start_out = 2 * (count % 33), 1 + count % 64, 64 + 2 * (count % 37)
            buffers = at_offset(a, start_a), at_offset(b, start_b)
            operands = [
                _C.Operand(buffer.data_ptr() + start, 0)
                for buffer, start in zip(buffers, (start_a, start_b), strict=True)
            ]
            out = torch.full((start_out + 2 * count + 64,), sentinel, dtype=torch.uint8)
            assert _C.combine(out.data_ptr() + start_out, 0, operands, [0.3, 0.7], 0, count) == 0
            end = start_out + 2 * count
            written = out[start_out:end].clone().view(BF16)
            assert same_bits(written, expected[:count]), count
            assert (out[:start_out] == sentinel).all(), count
            assert (out[end:] == sentinel).all(), count


@every_variant
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("out_dtype", [BF16, F16, F32], ids=str)
def test_every_kind_of_value_is_rounded_as_torch_does(variant, dtype, out_dtype):
    # 0.5 and 1.5 make ties of neighbouring values; random bits include denormals, infinities and NaN.
    a, b = any_bits(50_000, dtype, seed=3), any_bits(50_000, dtype, seed=4)
    with using(variant):
        for coefficients in ([0.5, 1.5], [1.0, 0.0], [-2.5e-3, 1e-7]):
            out = native([operand(a), operand(b)], coefficients, len(a), out_dtype)
            assert same_bits(out, reference([a, b], coefficients, out_dtype))


@every_variant
def test_bf16_denormals_survive(variant):
    # The bf16 conversion instruction would flush all of these to zero.
    tiny = torch.arange(1, 129, dtype=torch.int16).view(BF16)
    with using(variant):
        out = native([operand(tiny), operand(tiny)], [0.25, 0.5], len(tiny), BF16)
    assert same_bits(out, reference([tiny, tiny], [0.25, 0.5], BF16))
    assert (out != 0).sum() > 100


@every_variant
def test_bf16_ties_go_to_even(variant):
    # 1 + 2^-8 and 1 + 3 * 2^-8 lie half way between bf16 neighbours; exact sums of two bf16.
    ones, halves = torch.ones(64, dtype=BF16), torch.tensor([2.0**-8, 3 * 2.0**-8] * 32, dtype=BF16)
    with using(variant):
        out = native([operand(ones), operand(halves)], [1.0, 1.0], 64, BF16)
    assert out.tolist() == [1.0, 1 + 2.0**-6] * 32


@every_variant
def test_overflow_and_nan_are_counted_where_they_are(variant):
    a = normal(5000)
    a[[7, 1030, 4999]] = torch.tensor([float("inf"), float("nan"), 3.3e38], dtype=BF16)
    with using(variant):
        out = native([operand(a), operand(a)], [1.0, 1.0], 5000, BF16)
    assert (~out.isfinite()).nonzero().flatten().tolist() == [7, 1030, 4999]
    assert out[1030].isnan()


@pytest.mark.parametrize("splits", [[0, 1, 2, 5000], [0, 1023, 1025, 4097, 5000], [0, 31, 2048, 5000]], ids=str)
def test_bits_do_not_depend_on_the_ranges(splits):
    values = [normal(5000, dtype=dtype, seed=seed) for seed, dtype in enumerate((BF16, F32, F16))]
    for chosen in (values, [values[0], normal(5000, seed=9)]):
        operands, coefficients = [operand(value) for value in chosen], [0.1, 0.2, 0.7][: len(chosen)]
        whole = native(operands, coefficients, 5000, BF16)
        parts = [native(operands, coefficients, end - start, BF16, first=start) for start, end in pairwise(splits)]
        assert same_bits(torch.cat(parts), whole)


@every_variant
@settings(max_examples=40, deadline=None)
@given(
    inputs=st.lists(st.tuples(dtypes, st.none() | dtypes), min_size=1, max_size=12),
    out_dtype=dtypes,
    count=st.integers(0, 2100),
    first=st.integers(0, 70),
    seed=st.integers(0, 2**20),
)
def test_any_mix_of_dtypes_and_casts(variant, inputs, out_dtype, count, first, seed):
    values = [any_bits(first + count, dtype, seed=seed + number) for number, (dtype, _) in enumerate(inputs)]
    cast = [value if to is None else value.to(to) for value, (_, to) in zip(values, inputs, strict=True)]
    coefficients = torch.linspace(-1.3, 2.1, len(inputs) + 1)[1:].tolist()
    operands = [operand(value, to) for value, (_, to) in zip(values, inputs, strict=True)]
    with using(variant):
        out = native(operands, coefficients, count, out_dtype, first=first)
    assert same_bits(out, reference([value[first:] for value in cast], coefficients, out_dtype))


@every_variant
@pytest.mark.parametrize("k", [9, 17, 33])
def test_any_number_of_inputs(variant, k):
    values = [any_bits(3000, (BF16, F16, F32)[seed % 3], seed=seed) for seed in range(k)]
    coefficients = normal(k, dtype=F32, seed=99).tolist()
    for out_dtype in (BF16, F32):
        with using(variant):
            out = native([operand(value) for value in values], coefficients, 3000, out_dtype)
        assert same_bits(out, reference(values, coefficients, out_dtype))


@every_variant
@pytest.mark.parametrize("columns", [1, 7, 32, 1500])
def test_gathered_rows(variant, columns):
    tables = [normal(9, columns, seed=1), normal(11, columns, seed=2, dtype=F32)]
    picks = [[3, 3, 0, 8, 5], [10, 2, 2, 7, 0]]
    pairs = [
        gathered([table[row] for row in pick], cast)
        for table, pick, cast in zip(tables, picks, (None, BF16), strict=True)
    ]
    first, count = columns // 2, 5 * columns - columns // 2 - columns // 3
    rows = [tables[0][picks[0]].flatten(), tables[1].bfloat16()[picks[1]].flatten()]
    with using(variant):
        out = native([gathered_operand for gathered_operand, _ in pairs], [0.4, 0.6], count, BF16, first=first)
    assert same_bits(out, reference([row[first : first + count] for row in rows], [0.4, 0.6], BF16))


@every_variant
@pytest.mark.parametrize("along", [0, 1])
@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F16, BF16, F32), (BF16,) * 12], ids=str)
def test_coefficients_for_every_vector(variant, along, dtypes):
    rows, columns, first = 5, 1100, 1733
    values = [normal(rows, columns, dtype=dtype, seed=seed) for seed, dtype in enumerate(dtypes)]
    coefficients = normal(columns if along == 0 else rows, len(dtypes), dtype=F32, seed=7)
    expected = torch.zeros(rows, columns)
    for number, value in enumerate(values):
        column = coefficients[:, number]
        expected = expected + (column if along == 0 else column[:, None]) * value.float()
    out = torch.full((rows * columns - first,), float("nan"), dtype=BF16)
    operands = [operand(value) for value in values]
    with using(variant):
        nonfinite = _C.combine_vectors(
            out.data_ptr(), 0, operands, coefficients.data_ptr(), first, len(out), columns, along
        )
    assert nonfinite == 0
    assert same_bits(out, expected.bfloat16().flatten()[first:])


def test_one_coefficient_of_one_copies_every_bit_pattern():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(BF16)
    zero = torch.zeros_like(every)
    assert same_bits(native([operand(every)], [1.0], len(every), BF16), every)
    finite = every[every.isfinite() & (every != 0)]
    assert same_bits(native([operand(finite), operand(zero)], [1.0, 0.0], len(finite), BF16), finite)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dim", [None, 0, 1, -1])
def test_op_serves_strided_tensors_alike_on_every_backend(monkeypatch, backend, dim):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    a, b = normal(70, 31).t(), normal(31, 140, dtype=F16)[:, ::2]
    vectors = {None: (), 0: (70,), 1: (31,), -1: (31,)}[dim]
    coefficients = normal(*vectors, 2, dtype=F32)
    shaped = coefficients if dim is None else coefficients.T[:, :, None] if dim else coefficients.T[:, None, :]
    out = combine([a, b], coefficients, dim=dim)
    assert out.dtype == F32
    assert out.is_contiguous()
    assert same_bits(out, shaped[0] * a.float() + shaped[1] * b.float())


def test_op_through_the_kernels():
    # In a process of its own: Triton decides on its interpreter when it is imported.
    code = (
        "import torch; from arcmerge.ops import combine, gram\n"
        "a, b = (torch.randn(5, 77, generator=torch.Generator().manual_seed(s)) for s in (0, 1))\n"
        "c = torch.rand(77, 2)\n"
        "assert torch.equal(combine([a, b], [0.3, 0.7]), a * torch.tensor(0.3) + b * torch.tensor(0.7))\n"
        "assert torch.equal(combine([a, b], c, dim=0), a * c[:, 0] + b * c[:, 1])\n"
        "torch.testing.assert_close(gram([a, b], dim=0)[:, 0, 1], (a.double() * b.double()).sum(0))\n"
        "torch.testing.assert_close(gram([a, b], base=b)[0, 0], ((a - b).double() ** 2).sum())\n"
        "many = [torch.randn(5, 77, generator=torch.Generator().manual_seed(s)) for s in range(17)]\n"
        "c, wide = torch.rand(5, 17), torch.stack(many).double()\n"
        "total = sum((c[:, i, None] * x for i, x in enumerate(many[1:], 1)), c[:, :1] * many[0])\n"
        "assert torch.equal(combine(many, c, dim=1), total)\n"
        "torch.testing.assert_close(gram(many), torch.einsum('irc,jrc->ij', wide, wide))\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "ARCMERGE_BACKEND": "triton"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        pytest.param(lambda a: combine([], []), "'tensors' must be 1 or more tensors, got 0", id="none"),
        pytest.param(
            lambda a: combine([a, a[:1]], [1, 1]),
            "'tensors[1]' must have the shape of 'tensors[0]', [2, 3], got [1, 3]",
            id="shape",
        ),
        pytest.param(
            lambda a: combine([a.double()], [1]),
            "'tensors[0]' must be bfloat16, float16 or float32, got float64",
            id="dtype",
        ),
        pytest.param(
            lambda a: combine([a], [1], out_dtype=torch.int8),
            "'out_dtype' must be bfloat16, float16 or float32, got int8",
            id="out_dtype",
        ),
        pytest.param(
            lambda a: combine([a, a], [1.0]), "'coefficients' must have the shape [k] = [2], got [1]", id="coefficients"
        ),
        pytest.param(
            lambda a: combine([a], torch.ones(2, 1), dim=0),
            "'coefficients' must have the shape [C, k] = [3, 1], got [2, 1]",
            id="vectors",
        ),
        pytest.param(
            lambda a: combine([a], [1.0], dim=2),
            "'dim' must be 0 or 1 of matrices, got 2 with the shape [2, 3]",
            id="dim",
        ),
    ],
)
def test_wrong_calls_are_refused_in_a_sentence(call, sentence):
    with pytest.raises(ArcmergeError) as caught:
        call(normal(2, 3))
    assert str(caught.value) == sentence
