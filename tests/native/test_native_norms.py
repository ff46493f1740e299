"""Native rmsnorm, rmsnorm_add_rmsnorm and geglu: every variant has the bits of the documented arithmetic."""

import math

import numpy as np
import pytest
import torch

from arcmerge import _C
from arcmerge.dispatch.registry import backends
from arcmerge.ops import geglu, rmsnorm, rmsnorm_add_rmsnorm
from operands import BF16, CODES, F32, at_offset, every_variant, normal, same_bits, using

EPSILON = 1e-6
dtypes = pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
streams = pytest.mark.parametrize("stream", [BF16, F32], ids=str)


@pytest.fixture(autouse=True)
def native_by_default(monkeypatch):
    monkeypatch.delenv("ARCMERGE_BACKEND", raising=False)
    served = backends("cpu")
    assert all(served[name].startswith("native") for name in ("rmsnorm", "rmsnorm_add_rmsnorm", "geglu"))


def norm(x, weight):
    """rmsnorm in f32, with the squares summed in 16 lanes of f64 as in csrc/cpu/gemma2/rmsnorm.cpp."""
    x, gain = x.float().numpy(), weight.float().numpy() + np.float32(1)
    squares = np.pad(np.square(x.astype(np.float64)), ((0, 0), (0, -x.shape[1] % 16))).reshape(len(x), -1, 16)
    lanes = np.zeros((len(x), 16))
    for terms in squares.transpose(1, 0, 2):
        lanes = lanes + terms
    total = np.zeros(len(x))
    for lane in lanes.T:
        total = total + lane
    scale = (1 / np.sqrt(total / x.shape[1] + EPSILON)).astype(np.float32)
    return torch.from_numpy(x * scale[:, None] * gain)


def operands(rows, columns, dtype, stream):
    branch, residual = normal(rows, columns, dtype=dtype), 3 * normal(rows, columns, dtype=F32, seed=1)
    post, pre = (0.5 * normal(columns, dtype=dtype, seed=seed) for seed in (2, 3))
    return branch, residual.to(stream), post, pre


@every_variant
@dtypes
@streams
@pytest.mark.parametrize("scale", [1.0, 1e-3])  # at 1e-3 the mean square is eps
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 15), (3, 17), (1, 2304), (40, 100)])
def test_norm_bit_by_bit(variant, dtype, stream, scale, rows, columns):
    x, weight = (scale * normal(rows, columns, dtype=F32)).to(stream), normal(columns, dtype=dtype, seed=1)
    with using(variant):
        assert same_bits(rmsnorm(x, weight, eps=EPSILON), norm(x, weight).to(dtype))


@every_variant
@dtypes
@streams
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 15), (3, 17), (1, 2304), (40, 100)])
def test_both_norms_bit_by_bit(variant, dtype, stream, rows, columns):
    branch, residual, post, pre = operands(rows, columns, dtype, stream)
    with using(variant):
        total, normed = rmsnorm_add_rmsnorm(branch, residual, post, pre, eps=EPSILON)
    expected = residual + norm(branch, post).to(stream)
    assert same_bits(total, expected)
    assert same_bits(normed, norm(expected, pre).to(dtype))


@dtypes
@streams
def test_norms_within_the_error_of_f32(monkeypatch, dtype, stream):
    branch, residual, post, pre = operands(50, 700, dtype, stream)
    total, normed = rmsnorm_add_rmsnorm(branch, residual, post, pre, eps=EPSILON)
    exact = [
        x.double() / (x.double().square().mean(-1, keepdim=True) + EPSILON).sqrt() * (1 + weight.double())
        for x, weight in ((branch, post), (total, pre))
    ]
    units = [torch.finfo(kind).eps / 2 for kind in (stream, dtype)]
    # Four roundings to f32 come before that to the dtype of the result; a bf16 residual rounds the norm and the sum.
    assert ((normed - exact[1]).abs() <= (units[1] + 4 * 2.0**-24) * exact[1].abs()).all()
    sums = residual.double() + exact[0]
    assert ((total - sums).abs() <= units[0] * sums.abs() + (2 * units[0] + 2.0**-22) * exact[0].abs()).all()


@every_variant
def test_misaligned_norms_touch_only_their_outputs(variant):
    branch, residual, post, pre = operands(20, 33, BF16, F32)
    buffers = [at_offset(tensor.flatten(), 2) for tensor in (branch, residual, post, pre)]
    places = [buffer.data_ptr() + 2 for buffer in buffers]
    outputs = [torch.full((20 * 33 * size + 8,), 0x55, dtype=torch.uint8) for size in (4, 2)]
    starts = [out.data_ptr() + 2 for out in outputs]
    with using(variant):
        _C.rmsnorm_add_rmsnorm(
            *starts, *places[:2], CODES[F32], *places[2:], CODES[BF16], rows=20, columns=33, eps=EPSILON
        )
    expected = rmsnorm_add_rmsnorm(branch, residual, post, pre, eps=EPSILON)
    for out, value in zip(outputs, expected, strict=True):
        assert (out[[0, 1, *range(-6, 0)]] == 0x55).all()
        assert torch.equal(out[2:-6], value.flatten().view(torch.uint8))


def test_nan_and_infinity_stay_in_their_rows():
    x = normal(3, 40)
    x[0, 3], x[2, 4] = float("nan"), float("inf")
    out = rmsnorm(x, normal(40, seed=1), eps=EPSILON)
    assert out[0].isnan().all()
    assert same_bits(out[1:2], rmsnorm(x[1:2], normal(40, seed=1), eps=EPSILON))
    assert out[2, 4].isnan()
    assert (out[2, [*range(4), *range(5, 40)]] == 0).all()


def exact_gelu(gate):
    gate = gate.double()
    return gate * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))


GATES = torch.cat(
    [
        torch.linspace(-14, 14, 20001),
        1e-4 * normal(999, dtype=F32),
        torch.tensor([0.0, -0.0, 1e-38, 1e30, -1e30, -60.0]),
    ]
)


@every_variant
@pytest.mark.parametrize("count", [len(GATES), 1, 15, 1030])
def test_gelu_is_within_a_unit_in_the_last_place(variant, count):
    gate = GATES[-count:][None]
    with using(variant):
        out = geglu(gate, torch.ones_like(gate))
    truth = exact_gelu(gate)
    assert ((out - truth).abs() <= 2.0**-24 * truth.abs() + 2.0**-149).all()
    assert (out.signbit() == gate.signbit()).all()


@every_variant
@dtypes
@pytest.mark.parametrize("stepwise", [False, True])
def test_geglu_bit_by_bit(variant, dtype, stepwise):
    both = 3 * normal(9, 3 + 2 * 1100, dtype=dtype)
    gate, up = both[:, 3:1103], both[:, 1103:]
    with using(variant):
        out = geglu(gate, up, stepwise=stepwise)
        activated = geglu(gate.float(), torch.ones_like(up, dtype=F32))
    if stepwise:
        activated = activated.to(dtype).float()
    assert same_bits(out, (activated * up.float()).to(dtype))
    assert out.is_contiguous()


def test_geglu_of_nan_and_infinity():
    gate = torch.tensor([[float("inf"), float("nan"), -float("inf"), 1.0]])
    out = geglu(gate, torch.tensor([[2.0, 1.0, 1.0, float("nan")]]))
    assert out[0, 0] == float("inf")
    # As in torch, where -inf * 0 is NaN.
    assert out[0, 1:].isnan().all()


def test_results_do_not_depend_on_the_number_of_threads():
    before = _C.threads()
    branch, residual, *weights = operands(100, 300, BF16, F32)
    gate, up = normal(2, 100, 300, seed=4)
    results = []
    for threads in (1, 3):
        _C.set_threads(threads)
        results.append([*rmsnorm_add_rmsnorm(branch, residual, *weights, eps=EPSILON), geglu(gate, up)])
    _C.set_threads(before)
    assert all(same_bits(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: _C.rmsnorm(0, 0, 1, 0, 0, 1, 1, 0.0), "'x_dtype' must be 0 (bf16) or 2 (f32), got 1"),
        (lambda: _C.rmsnorm(0, 0, 0, 0, 3, 1, 1, 0.0), "'dtype' must be 0 (bf16) or 2 (f32), got 3"),
        (
            lambda: _C.rmsnorm(0, 0, 0, 0, 0, 1, 0, 0.0),
            "'rows' must be 0 or more and 'columns' 1 or more, got 1 and 0",
        ),
        (
            lambda: _C.rmsnorm_add_rmsnorm(0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0.0),
            "'residual_dtype' must be 0 (bf16) or 2 (f32), got 1",
        ),
        (
            lambda: _C.geglu(0, 0, 0, 0, 0, 2, -1, 0, False),
            "'rows' and 'columns' must not be negative, got 2 and -1",
        ),
    ],
)
def test_wrong_arguments_are_refused(call, sentence):
    with pytest.raises(ValueError) as caught:  # noqa: PT011, the whole sentence is compared
        call()
    assert str(caught.value) == sentence
