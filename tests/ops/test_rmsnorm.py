"""rmsnorm: the reference against transformers and float64, the kernel through the op against the same."""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

from arcmerge.errors import ArcmergeError
from arcmerge.ops.rmsnorm import normalized, rmsnorm
from cases import disagreement
from cases.case import Expected
from cases.rmsnorm import EPSILON, FLOAT32_ERROR, exact, half_unit
from operands import BF16, F32, normal, same_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
dtypes = pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
# Rows of every size, of the magnitude of eps too, where it matters.
scaled_rows = torch.tensor([1e-4, 1e-3, 1e-2, 1.0, 100.0])[:, None]


def transformers_norm(x, weight):
    module = Gemma2RMSNorm(len(weight), eps=EPSILON)
    module.weight.data = weight
    return module(x).detach()


def assert_exact(out, x, weight):
    truth = exact(x, weight)
    assert out.dtype == weight.dtype
    assert disagreement(out, Expected(truth, truth.abs() * (half_unit(weight.dtype) + FLOAT32_ERROR))) <= 1


@dtypes
def test_reference_has_the_bits_of_transformers(monkeypatch, dtype):
    monkeypatch.setenv("ARCMERGE_BACKEND", "reference")
    x, weight = (normal(5, 2304) * scaled_rows).to(dtype), normal(2304, dtype=dtype, seed=1)
    assert same_bits(rmsnorm(x, weight, eps=EPSILON), transformers_norm(x, weight))


def test_definition_in_float64():
    x, weight = normal(5, 300).double() * scaled_rows, normal(300, seed=1)
    torch.testing.assert_close(normalized(x, weight, eps=EPSILON), exact(x, weight), rtol=1e-14, atol=0)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("weight_dtype", [BF16, F32], ids=str)
@dtypes
def test_op_rounds_once_to_the_dtype_of_the_weight(monkeypatch, backend, dtype, weight_dtype):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    x = (normal(5, 1000) * scaled_rows).to(dtype).view(5, 2, 500).to(DEVICE)
    weight = normal(500, dtype=weight_dtype, seed=1).to(DEVICE)
    assert_exact(rmsnorm(x, weight, eps=EPSILON), x, weight)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_op_serves_strided_and_empty_tensors(monkeypatch, backend):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    x, weight = normal(70, 6).to(DEVICE).t(), normal(140, seed=1).to(DEVICE)[::2]
    out = rmsnorm(x, weight, eps=EPSILON)
    assert out.is_contiguous()
    assert_exact(out, x, weight)
    assert rmsnorm(x[:0], weight, eps=EPSILON).shape == (0, 70)


def test_a_row_has_the_same_bits_among_any_others(monkeypatch):
    monkeypatch.setenv("ARCMERGE_BACKEND", "triton")
    x, weight = normal(3, 2304, dtype=F32).to(DEVICE), normal(2304, dtype=F32, seed=1).to(DEVICE)
    x[0, 7], x[2, 9] = float("nan"), float("inf")
    together = rmsnorm(x, weight, eps=EPSILON)
    assert same_bits(together[1], rmsnorm(x[1:2], weight, eps=EPSILON)[0])
    assert together[0].isnan().all()


def test_registration(monkeypatch):
    monkeypatch.setenv("ARCMERGE_BACKEND", "reference")
    torch.library.opcheck(torch.ops.arcmerge.rmsnorm.default, (normal(3, 8, dtype=F32), normal(8)), {"eps": EPSILON})


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        pytest.param(
            lambda x, weight: rmsnorm(x.half(), weight, eps=EPSILON),
            "'x' must be bfloat16 or float32, got float16",
            id="dtype",
        ),
        pytest.param(
            lambda x, weight: rmsnorm(x, weight[1:], eps=EPSILON),
            "'weight' must have the shape [D] = [8], got [7]",
            id="shape",
        ),
        pytest.param(
            lambda x, weight: rmsnorm(x, weight.to("meta"), eps=EPSILON),
            "'weight' must be on the device of 'x', cpu, got meta",
            id="device",
        ),
    ],
)
def test_wrong_calls_are_refused_in_a_sentence(call, sentence):
    with pytest.raises(ArcmergeError) as caught:
        call(normal(3, 8), normal(8))
    assert str(caught.value) == sentence
