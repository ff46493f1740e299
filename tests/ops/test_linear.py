"""linear: the reference and the kernel through the op against float64, whatever the number of rows."""

import pytest
import torch

from arcmerge.errors import ArcmergeError
from arcmerge.ops.linear import linear, side_by_side
from cases import disagreement
from cases.case import Expected
from cases.linear import exact_product
from cases.rmsnorm import half_unit
from operands import BF16, F32, normal, same_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
backends = pytest.mark.parametrize("backend", ["reference", "triton"])
dtypes = pytest.mark.parametrize("dtype", [BF16, F32], ids=str)


def expected(x, weights):
    truth, error = exact_product(x, torch.cat(weights))
    return Expected(truth, half_unit(x.dtype) * (truth.abs() + error) + error)


@backends
@dtypes
@pytest.mark.parametrize("tokens", [1, 2, 8, 9, 16, 17, 32, 33, 40])
def test_against_float64(monkeypatch, backend, dtype, tokens):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    x = normal(tokens, 83, dtype=dtype).to(DEVICE)
    weights = [normal(rows, 83, dtype=dtype, seed=rows).to(DEVICE) for rows in (33, 16, 1)]
    out = linear(x, weights)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert disagreement(out, expected(x, weights)) <= 1


@dtypes
def test_reference_has_the_bits_of_torch_where_sums_are_exact(monkeypatch, dtype):
    monkeypatch.setenv("ARCMERGE_BACKEND", "reference")
    x, weights = normal(5, 64).round().to(dtype), [normal(rows, 64, seed=rows).round().to(dtype) for rows in (9, 4)]
    assert same_bits(linear(x, weights), torch.cat([torch.nn.functional.linear(x, weight) for weight in weights], 1))


@backends
@pytest.mark.parametrize("tokens", [3, 20])
def test_strided_operands_and_parameters(monkeypatch, backend, tokens):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    x, weight = normal(64, tokens).to(DEVICE).T, normal(20, 128, seed=1).to(DEVICE)[:, ::2]
    assert disagreement(linear(x, [weight]), expected(x, [weight])) <= 1
    parameter = torch.nn.Parameter(weight)
    assert same_bits(linear(x, [parameter]), linear(x, [weight]))


@pytest.mark.parametrize("weights", [1, 3])
def test_a_row_depends_neither_on_the_other_rows_nor_on_the_other_weights(monkeypatch, weights):
    monkeypatch.setenv("ARCMERGE_BACKEND", "triton")
    monkeypatch.setattr(torch, "mm", None)  # the kernel multiplies
    x, matrices = normal(32, 530).to(DEVICE), [normal(18, 530, seed=seed).to(DEVICE) for seed in range(weights)]
    alone = [linear(x[:1], [matrix]) for matrix in matrices]
    x[1:] = float("nan")
    for tokens in (1, 8, 9, 16, 17, 32):
        out = linear(x[:tokens], matrices)
        assert same_bits(out[:1], torch.cat(alone, dim=1))
        assert out[1:].isnan().all()


@backends
def test_infinities_and_nan_reach_only_their_outputs(monkeypatch, backend):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    x, weight = torch.ones(2, 40, dtype=BF16, device=DEVICE), torch.ones(20, 40, dtype=BF16, device=DEVICE)
    weight[3, 7], x[1, 5] = float("inf"), float("nan")
    out = linear(x, [weight])
    assert out[0, 3] == float("inf")
    assert (out[0, [0, 1, 2, *range(4, 20)]] == 40).all()
    assert out[1].isnan().all()


@backends
@pytest.mark.parametrize(("tokens", "columns", "rows"), [(0, 4, 3), (2, 0, 3), (2, 4, 0), (20, 0, 3)])
def test_empty_operands(monkeypatch, backend, tokens, columns, rows):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    x, weight = torch.ones(tokens, columns, device=DEVICE), torch.ones(rows, columns, device=DEVICE)
    assert linear(x, [weight, weight]).tolist() == [[float(columns)] * 2 * rows] * tokens


@backends
def test_a_weight_without_rows_among_others(monkeypatch, backend):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    x, weight = normal(2, 24).to(DEVICE), normal(17, 24, seed=1).to(DEVICE)
    assert same_bits(linear(x, [weight[:0], weight, weight[:3]]), linear(x, [weight, weight[:3]]))


@pytest.mark.parametrize(("stepwise", "calls"), [(False, 1), (True, 3)], ids=["merged", "as transformers"])
def test_many_rows_are_multiplied_once_with_weights_side_by_side(monkeypatch, stepwise, calls):
    monkeypatch.setenv("ARCMERGE_BACKEND", "triton")
    x, whole = normal(40, 64).round().to(DEVICE), normal(40, 64, seed=1).round().to(DEVICE)
    products, multiply = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **named: (products.append(args), multiply(*args, **named))[1])
    parts = whole.split([20, 13, 7])
    out = linear(x, parts, stepwise=stepwise)
    assert len(products) == calls
    assert same_bits(out, linear(x, [part.clone() for part in parts]))
    assert len(products) == calls + 3


def test_weights_are_side_by_side_where_one_tensor_holds_them():
    whole = normal(12, 5)
    first, second, third = whole[1:].split([4, 4, 3])
    assert same_bits(side_by_side([first, second, third]), whole[1:])
    assert side_by_side([first, second]).data_ptr() == first.data_ptr()
    assert side_by_side([first, third]) is None
    assert side_by_side([second, first]) is None
    assert side_by_side([whole[:, :2], whole[:, 2:]]) is None
    assert side_by_side([whole[:4, :1], whole[:4, 1:2]]) is None
    buffer = bytearray(48)
    apart = [torch.frombuffer(buffer, dtype=F32, count=6, offset=start).view(2, 3) for start in (0, 24)]
    assert apart[0].data_ptr() + 24 == apart[1].data_ptr()
    assert side_by_side(apart) is None


def test_opcheck():
    arguments = (normal(3, 24), [normal(5, 24, seed=1), normal(2, 24)])
    torch.library.opcheck(torch.ops.arcmerge.linear.default, arguments)


@pytest.mark.parametrize(
    ("x", "weights", "sentence"),
    [
        (torch.ones(2, 4), [], "'weights' must be 1 to 3 tensors, got 0"),
        (torch.ones(2, 4), [torch.ones(3, 4)] * 4, "'weights' must be 1 to 3 tensors, got 4"),
        (torch.ones(4), [torch.ones(3, 4)], "'x' must have the shape [T, K], got [4]"),
        (
            torch.ones(2, 4),
            [torch.ones(3, 4), torch.ones(4, 3)],
            "'weights[1]' must have the shape [M_1, K] = [*, 4], got [4, 3]",
        ),
        (
            torch.ones(2, 4),
            [torch.ones(3, 4).bfloat16()],
            "'weights[0]' must have the dtype of 'x', float32, got bfloat16",
        ),
        (torch.ones(2, 4).half(), [torch.ones(3, 4)], "'x' must be bfloat16 or float32, got float16"),
    ],
)
def test_what_breaks_the_contract_is_refused(x, weights, sentence):
    with pytest.raises(ArcmergeError) as caught:
        linear(x, weights)
    assert str(caught.value) == sentence
