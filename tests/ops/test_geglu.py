"""geglu: the reference against transformers and float64, the kernel through the op against the same."""

import math

import pytest
import torch
from transformers.activations import ACT2FN

from arcmerge.errors import ArcmergeError
from arcmerge.ops.geglu import geglu
from cases import disagreement
from cases.case import Expected
from cases.rmsnorm import half_unit
from operands import BF16, F32, normal, same_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
backends = pytest.mark.parametrize("backend", ["reference", "triton"])

# Every finite bf16 number but the largest, whose gelu times up would overflow.
EVERY = torch.arange(-(2**15), 2**15, dtype=torch.int32).short().view(BF16)
EVERY = EVERY[EVERY.abs() < 2.0**120]


def exact_gelu(gate):
    """The definition by tanh, but by an exponential where 1 + tanh cancels."""
    gate = gate.double()
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return torch.where(inner > -1, gate / 2 * (1 + inner.tanh()), gate * (2 * inner).exp() / (1 + (2 * inner).exp()))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_reference_has_the_bits_of_transformers(monkeypatch, dtype):
    monkeypatch.setenv("ARCMERGE_BACKEND", "reference")
    gate, up = 2 * normal(7, 300, dtype=dtype), normal(7, 300, dtype=dtype, seed=1)
    assert same_bits(geglu(gate, up, stepwise=True), ACT2FN["gelu_pytorch_tanh"](gate) * up)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_kernel_keeps_relative_precision_for_every_gate(monkeypatch, dtype):
    monkeypatch.setenv("ARCMERGE_BACKEND", "triton")
    gate = EVERY.to(DEVICE, dtype).view(1, -1)
    truth = exact_gelu(gate) * 1.5
    exponent = -2 * math.log2(math.e) * math.sqrt(2 / math.pi) * (gate.double() + 0.044715 * gate.double() ** 3)
    # The kernel's bound; and below -10, where 2^z overflows, it gives zero for what is less than 11 * 2^-128.
    tolerance = truth.abs() * (half_unit(dtype) + 2.0**-22 * (2 + exponent.clamp(min=0))) + 1.5 * 11 * 2.0**-128
    assert disagreement(geglu(gate, torch.full_like(gate, 1.5)), Expected(truth, tolerance)) <= 1


@backends
def test_reference_and_kernel_against_float64(monkeypatch, backend):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    gate, up = normal(7, 300).to(DEVICE), normal(7, 300, seed=1).to(DEVICE)
    truth = exact_gelu(gate) * up.double()
    assert disagreement(geglu(gate, up), Expected(truth, truth.abs() * (half_unit(BF16) + 2.0**-18))) <= 1


def test_kernel_rounds_twice_if_stepwise(monkeypatch):
    monkeypatch.setenv("ARCMERGE_BACKEND", "triton")
    gate, up = normal(7, 300).to(DEVICE), normal(7, 300, seed=1).to(DEVICE)
    activated = exact_gelu(gate)
    ends = [(activated * (1 + side * 2.0**-18)).to(BF16) * up for side in (-1, 1)]
    out = geglu(gate, up, stepwise=True)
    assert ((out == ends[0]) | (out == ends[1])).all()
    assert not same_bits(out, geglu(gate, up))


@backends
@pytest.mark.parametrize("stepwise", [False, True])
def test_op_serves_halves_of_one_tensor_and_empty_ones(monkeypatch, backend, stepwise):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    both = normal(5, 70).to(DEVICE)
    gate, up = both.chunk(2, dim=1)
    out = geglu(gate, up, stepwise=stepwise)
    assert out.is_contiguous()
    assert same_bits(out, geglu(gate.contiguous(), up.contiguous(), stepwise=stepwise))
    assert geglu(gate[:0], up[:0], stepwise=stepwise).shape == (0, 35)
    assert geglu(gate[:, :1], up[:, :1], stepwise=stepwise).shape == (5, 1)


@backends
def test_nan_stays_nan(monkeypatch, backend):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    gate, up = (torch.tensor(values, dtype=BF16, device=DEVICE) for values in ([[math.nan, 1.0]], [[1.0, math.nan]]))
    assert geglu(gate, up).isnan().all()


def test_registration(monkeypatch):
    monkeypatch.setenv("ARCMERGE_BACKEND", "reference")
    gate, up = normal(3, 16).chunk(2, dim=1)
    torch.library.opcheck(torch.ops.arcmerge.geglu.default, (gate, up), {"stepwise": True})


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        pytest.param(lambda x: geglu(x.half(), x), "'gate' must be bfloat16 or float32, got float16", id="dtype"),
        pytest.param(
            lambda x: geglu(x, x.float()),
            "'up' must have the dtype of 'gate', bfloat16, got float32",
            id="mixed",
        ),
        pytest.param(lambda x: geglu(x[0], x[0]), "'gate' must have the shape [T, F], got [8]", id="vector"),
        pytest.param(lambda x: geglu(x, x[:, 1:]), "'up' must have the shape [T, F] = [3, 8], got [3, 7]", id="shape"),
        pytest.param(
            lambda x: geglu(x[:, ::2], x[:, ::2]),
            "'gate' must have contiguous rows, got the strides (8, 2)",
            id="strides",
        ),
    ],
)
def test_wrong_calls_are_refused_in_a_sentence(call, sentence):
    with pytest.raises(ArcmergeError) as caught:
        call(normal(3, 8))
    assert str(caught.value) == sentence
