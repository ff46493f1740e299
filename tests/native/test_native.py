"""The native module: conversions, small operations, the choice of variants, and wrong arguments."""

import os
import subprocess
import sys

import pytest
import torch

from arcmerge import _C
from operands import BF16, CODES, F16, F32, any_bits, every_variant, gathered, normal, operand, same_bits, using


def converted(tensor, dtype):
    out = torch.empty(tensor.shape, dtype=dtype)
    _C.combine(out.data_ptr(), CODES[dtype], [operand(tensor)], [1.0], 0, tensor.numel())
    return out


@every_variant
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_every_16_bit_value_is_widened_exactly(variant, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(dtype)
    with using(variant):
        assert same_bits(converted(every, F32), every.float())
        assert same_bits(converted(every, dtype), every)


@every_variant
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_float32_is_rounded_to_nearest_even(variant, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(dtype).float()
    # Each value, the midpoint to the next value, and the neighbours of both in float32.
    half_way = every.view(torch.int32) + (1 << 15 if dtype == BF16 else 1 << 12)
    near = [(bits + step).view(F32) for bits in (every.view(torch.int32), half_way) for step in (-1, 0, 1)]
    values = torch.cat([*near, any_bits(100_000, F32), torch.tensor([65519.996, 65520.0, 2.0**-25, 3 * 2.0**-25])])
    with using(variant):
        assert same_bits(converted(values, dtype), values.to(dtype))


@every_variant
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_nearswap(variant, dtype):
    a, b = normal(3000, dtype=dtype, seed=1), normal(3000, dtype=dtype, seed=2)
    b[:10] = a[:10]
    t = torch.tensor(0.3)
    weight = (t / (b.float() - a.float()).abs().clamp(min=1e-6)).clamp(0, 1)
    expected = (weight * b.float() + (1 - weight) * a.float()).to(dtype)
    out = torch.full_like(a[7:], float("nan"))
    with using(variant):
        count = _C.nearswap(out.data_ptr(), CODES[dtype], operand(a), operand(b), 0.3, 7, len(out))
    assert count == 0
    assert same_bits(out, expected[7:])


@every_variant
@pytest.mark.parametrize(("dtype", "cast"), [(BF16, None), (F16, None), (F32, None), (F32, F16)], ids=str)
def test_count_nonfinite(variant, dtype, cast):
    values = any_bits(5000, dtype)
    seen = values if cast is None else values.to(cast)
    with using(variant):
        assert _C.count_nonfinite(operand(values, cast), 100, 4000) == int((~seen[100:4100].isfinite()).sum())


@every_variant
def test_column_sums_of_gathered_rows(variant):
    table = normal(50, 1500)
    rows, addresses = gathered([table[row] for row in (4, 4, 49, 0)])
    sums = torch.full((1500,), float("nan"), dtype=torch.float64)
    with using(variant):
        _C.column_sums(rows, len(addresses), 1500, sums.data_ptr())
    assert same_bits(sums, table.double()[[4, 4, 49, 0]].sum(0))


def test_copy():
    source, out = torch.arange(100, dtype=torch.uint8), torch.zeros(100, dtype=torch.uint8)
    _C.copy(out.data_ptr() + 3, source.data_ptr() + 5, 90)
    assert out.tolist() == [0] * 3 + list(range(5, 95)) + [0] * 7


def test_variants_are_in_order_and_the_best_is_the_default(monkeypatch):
    order = ["avx512bf16", "avx512", "avx2", "baseline"]
    assert _C.variants() == [name for name in order if name in _C.variants()]
    assert _C.variants()[-1] == "baseline"
    names = imported_with({name: value for name, value in os.environ.items() if name != "ARCMERGE_CPU"})
    assert names.stdout.strip() == _C.variants()[0]


def imported_with(environment):
    code = "from arcmerge import _C; print(_C.variant())"
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@every_variant
def test_the_environment_forces_a_variant(variant):
    assert imported_with(os.environ | {"ARCMERGE_CPU": variant}).stdout.strip() == variant


def test_an_unknown_variant_is_refused():
    known = ", ".join(_C.variants())
    sentence = f"'name' must be a variant that this processor can run ({known}), got 'mmx'"
    with pytest.raises(ValueError, match="got 'mmx'") as caught:
        _C.use_variant("mmx")
    assert str(caught.value) == sentence
    refused = imported_with(os.environ | {"ARCMERGE_CPU": "mmx"})
    assert refused.returncode == 1
    assert sentence in refused.stderr


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        pytest.param(lambda x: _C.gram([], None, 0, 1), "'operands' must have 1 or more entries, got 0", id="none"),
        pytest.param(
            lambda x: _C.gram([x], None, -1, 1),
            "'first' and 'count' must not be negative, got -1 and 1",
            id="range",
        ),
        pytest.param(
            lambda x: _C.combine(0, 0, [x], [1.0, 2.0], 0, 1),
            "'coefficients' must be as many as the operands (1), got 2",
            id="coefficients",
        ),
        pytest.param(
            lambda x: _C.combine(0, 3, [x], [1.0], 0, 1),
            "'out_dtype' must be 0 (bf16), 1 (f16) or 2 (f32), got 3",
            id="out_dtype",
        ),
        pytest.param(lambda x: _C.Operand(0, -1), "'dtype' must be 0 (bf16), 1 (f16) or 2 (f32), got -1", id="dtype"),
        pytest.param(lambda x: _C.Operand(0, 0, 7), "'cast' must be 0 (bf16), 1 (f16) or 2 (f32), got 7", id="cast"),
        pytest.param(
            lambda x: _C.Operand(0, 0, -1, 64, 0),
            "'columns' must be 1 or more with 'rows', got 0",
            id="columns",
        ),
        pytest.param(
            lambda x: _C.gram_vectors([x], None, 1, 1, 2, 0),
            "'dim' must be 0 (columns) or 1 (rows), got 2",
            id="along",
        ),
        pytest.param(
            lambda x: _C.gram_vectors([x], None, 1, 0, 1, 0),
            "'rows' must be 0 or more and 'columns' 1 or more, got 1 and 0",
            id="matrix",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, sentence):
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the whole sentence is compared
        call(operand(normal(1)))
    assert str(caught.value) == sentence
