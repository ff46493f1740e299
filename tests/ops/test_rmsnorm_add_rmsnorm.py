"""rmsnorm_add_rmsnorm: the reference against transformers and float64, the kernel through the op against the same."""

import pytest
import torch
from test_rmsnorm import DEVICE, transformers_norm

from arcmerge.errors import ArcmergeError
from arcmerge.ops.rmsnorm_add_rmsnorm import rmsnorm_add_rmsnorm
from cases import disagreement
from cases.case import Expected
from cases.rmsnorm import EPSILON, FLOAT32_ERROR, exact, half_unit
from cases.rmsnorm_add_rmsnorm import exact_total
from operands import BF16, F32, normal, same_bits

DTYPES = [(BF16, F32), (BF16, BF16), (F32, F32), (F32, BF16)]


def operands(dtype, stream, *shape):
    columns = shape[-1]
    residual = 3 * normal(*shape, dtype=F32, seed=1)
    weights = [0.5 * normal(columns, dtype=dtype, seed=seed) for seed in (2, 3)]
    return [tensor.to(DEVICE) for tensor in (normal(*shape, dtype=dtype), residual.to(stream), *weights)]


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_reference_has_the_bits_of_transformers(monkeypatch, dtype):
    monkeypatch.setenv("ARCMERGE_BACKEND", "reference")
    branch, residual, post_weight, pre_weight = operands(dtype, dtype, 5, 2304)
    total, normed = rmsnorm_add_rmsnorm(branch, residual, post_weight, pre_weight, eps=EPSILON)
    expected = residual + transformers_norm(branch, post_weight)
    assert same_bits(total, expected)
    assert same_bits(normed, transformers_norm(expected, pre_weight))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(("dtype", "stream"), DTYPES, ids=str)
def test_op_rounds_as_the_residual_stream_says(monkeypatch, backend, dtype, stream):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    branch, residual, post_weight, pre_weight = operands(dtype, stream, 5, 2, 500)
    total, normed = rmsnorm_add_rmsnorm(branch, residual, post_weight, pre_weight, eps=EPSILON)
    assert (total.dtype, normed.dtype) == (stream, dtype)
    assert disagreement(total, exact_total(branch, residual, post_weight)) <= 1
    # The second norm must be that of the stream as it was stored.
    truth = exact(total, pre_weight)
    assert disagreement(normed, Expected(truth, truth.abs() * (half_unit(dtype) + FLOAT32_ERROR))) <= 1


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_op_serves_strided_and_empty_tensors_and_writes_no_input(monkeypatch, backend):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    branch, residual, post_weight, pre_weight = operands(BF16, F32, 6, 70)
    kept = residual.clone()
    dense = rmsnorm_add_rmsnorm(branch, residual, post_weight, pre_weight, eps=EPSILON)
    assert same_bits(residual, kept)
    columns_first = [tensor.t().contiguous().t() for tensor in (branch, residual)]
    strided = rmsnorm_add_rmsnorm(*columns_first, post_weight, pre_weight, eps=EPSILON)
    for out, expected in zip(strided, dense, strict=True):
        assert out.is_contiguous()
        assert same_bits(out, expected)
    empty = rmsnorm_add_rmsnorm(branch[:0], residual[:0], post_weight, pre_weight, eps=EPSILON)
    assert [out.shape for out in empty] == [(0, 70)] * 2


def test_a_row_has_the_same_bits_among_any_others(monkeypatch):
    monkeypatch.setenv("ARCMERGE_BACKEND", "triton")
    branch, residual, *weights = operands(BF16, F32, 3, 2304)
    branch[0, 7], residual[2, 9] = float("nan"), float("inf")
    together = rmsnorm_add_rmsnorm(branch, residual, *weights, eps=EPSILON)
    alone = rmsnorm_add_rmsnorm(branch[1:2], residual[1:2], *weights, eps=EPSILON)
    for all_rows, row in zip(together, alone, strict=True):
        assert same_bits(all_rows[1], row[0])
        assert all_rows[0].isnan().all()


@pytest.mark.parametrize("stream", [BF16, F32], ids=str)
def test_registration(monkeypatch, stream):
    monkeypatch.setenv("ARCMERGE_BACKEND", "reference")
    arguments = [tensor.cpu() for tensor in operands(BF16, stream, 3, 8)]
    torch.library.opcheck(torch.ops.arcmerge.rmsnorm_add_rmsnorm.default, arguments, {"eps": EPSILON})


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({1: lambda x: x.double()}, "'residual' must be bfloat16 or float32, got float64"),
        ({3: lambda x: x.float()}, "'pre_weight' must have the dtype of 'branch', bfloat16, got float32"),
        ({1: lambda x: x[1:]}, "'residual' must have the shape [..., D] = [3, 8], got [2, 8]"),
        ({2: lambda x: x[1:]}, "'post_weight' must have the shape [D] = [8], got [7]"),
    ],
    ids=["stream", "dtype", "rows", "columns"],
)
def test_wrong_calls_are_refused_in_a_sentence(changed, sentence):
    arguments = operands(BF16, F32, 3, 8)
    for number, change in changed.items():
        arguments[number] = change(arguments[number])
    with pytest.raises(ArcmergeError) as caught:
        rmsnorm_add_rmsnorm(*arguments, eps=EPSILON)
    assert str(caught.value) == sentence
