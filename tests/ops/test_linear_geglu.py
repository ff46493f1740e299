"""linear_geglu: the reference against transformers, both backends against float64, whatever the number of rows."""

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2Config, Gemma2MLP

from arcmerge.errors import ArcmergeError
from arcmerge.ops.geglu import geglu
from arcmerge.ops.linear import linear
from arcmerge.ops.linear_geglu import linear_geglu
from cases import disagreement
from cases.case import Expected
from cases.linear import exact_product
from cases.linear_geglu import gelu_and_error
from cases.rmsnorm import half_unit
from operands import BF16, F32, normal, same_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
backends = pytest.mark.parametrize("backend", ["reference", "triton"])
dtypes = pytest.mark.parametrize("dtype", [BF16, F32], ids=str)


def eighths(*shape, dtype=BF16, seed=0):
    """Multiples of 1/8, whose products and sums are exact in float32, in any order."""
    return (normal(*shape, dtype=F32, seed=seed) * 8).round().div(8).to(dtype)


@backends
@dtypes
def test_the_bits_of_transformers_where_sums_are_exact(monkeypatch, backend, dtype):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    mlp = Gemma2MLP(Gemma2Config(hidden_size=64, intermediate_size=40)).to(dtype)
    x = eighths(6, 64, dtype=dtype)
    with torch.no_grad():
        mlp.gate_proj.weight.copy_(eighths(40, 64, seed=1) / 8)
        mlp.up_proj.weight.copy_(eighths(40, 64, seed=2) / 8)
        theirs = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    weights = (mlp.gate_proj.weight.to(DEVICE), mlp.up_proj.weight.to(DEVICE))
    ours = linear_geglu(x.to(DEVICE), *weights, stepwise=True).cpu()
    if dtype == BF16 or backend == "reference":
        assert same_bits(ours, theirs)
    else:
        # Each has its own float32 gelu, within 2^-22 * (2 + |z|), |z| < 16 here, and rounds a product.
        assert ((ours - theirs).abs() <= 2.0**-17 * theirs.abs()).all()


@backends
@dtypes
@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 33, 64])
def test_against_float64(monkeypatch, backend, dtype, tokens):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    if dtype == F32 and tokens > 16 and backend == "triton":
        pytest.skip("torch.mm rounds the products")
    x = normal(tokens, 83, dtype=dtype).to(DEVICE)
    gate_weight, up_weight = (normal(33, 83, dtype=dtype, seed=seed).to(DEVICE) / 8 for seed in (1, 2))
    (gate, gate_error), (up, up_error) = (exact_product(x, weight) for weight in (gate_weight, up_weight))
    activated, relative = gelu_and_error(gate)
    # The slope of gelu is at most 1.13.
    activated_error = 1.13 * gate_error + activated.abs() * relative
    error = activated_error * (up.abs() + up_error) + activated.abs() * up_error
    tolerance = half_unit(dtype) * ((activated * up).abs() + error) + error
    assert disagreement(linear_geglu(x, gate_weight, up_weight), Expected(activated * up, tolerance)) <= 1


@pytest.mark.parametrize(("backend", "stepwise"), [("reference", True), ("triton", True), ("triton", False)])
def test_many_rows_are_the_products_and_then_geglu(monkeypatch, backend, stepwise):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    x, gate_weight, up_weight = (eighths(rows, 64, seed=rows).to(DEVICE) for rows in (70, 33, 33))
    out = linear_geglu(x, gate_weight, up_weight, stepwise=stepwise)
    assert same_bits(out, geglu(linear(x, [gate_weight]), linear(x, [up_weight]), stepwise=stepwise))


@pytest.mark.parametrize(("stepwise", "calls"), [(False, 1), (True, 2)], ids=["merged", "as transformers"])
def test_many_rows_are_multiplied_once_with_weights_side_by_side(monkeypatch, stepwise, calls):
    monkeypatch.setenv("ARCMERGE_BACKEND", "triton")
    x, whole = eighths(70, 64, seed=1).to(DEVICE), eighths(66, 64, seed=2).to(DEVICE)
    products, multiply = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **named: (products.append(args), multiply(*args, **named))[1])
    out = linear_geglu(x, whole[:33], whole[33:], stepwise=stepwise)
    assert len(products) == calls
    assert same_bits(out, linear_geglu(x, whole[:33].clone(), whole[33:].clone(), stepwise=stepwise))


@pytest.mark.parametrize("stepwise", [False, True])
def test_a_row_does_not_depend_on_the_others(monkeypatch, stepwise):
    monkeypatch.setenv("ARCMERGE_BACKEND", "triton")
    x, gate_weight, up_weight = (normal(rows, 530, seed=rows).to(DEVICE) for rows in (16, 18, 18))
    alone = linear_geglu(x[:1], gate_weight, up_weight, stepwise=stepwise)
    x[1:] = float("nan")
    for tokens in (1, 8, 9, 16):
        out = linear_geglu(x[:tokens], gate_weight, up_weight, stepwise=stepwise)
        assert same_bits(out[:1], alone)
        assert out[1:].isnan().all()


def test_a_row_has_the_same_bits_among_17_to_64(monkeypatch):
    monkeypatch.setenv("ARCMERGE_BACKEND", "triton")
    monkeypatch.setattr(torch, "mm", None)  # the kernel multiplies
    x, gate_weight, up_weight = (normal(rows, 530, seed=rows).to(DEVICE) for rows in (64, 35, 35))
    whole = linear_geglu(x, gate_weight, up_weight)
    x[1:] = float("nan")
    for tokens in (17, 32, 33, 64):
        assert same_bits(linear_geglu(x[:tokens], gate_weight, up_weight)[:1], whole[:1])


@backends
@pytest.mark.parametrize("tokens", [3, 20])
def test_strided_operands_and_parameters(monkeypatch, backend, tokens):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    x, weight = normal(64, tokens).to(DEVICE).T, normal(20, 128, seed=1).to(DEVICE)[:, ::2]
    out = linear_geglu(x, torch.nn.Parameter(weight), weight)
    assert same_bits(out, linear_geglu(x.contiguous(), weight.contiguous(), weight.contiguous()))


@backends
@pytest.mark.parametrize(("tokens", "columns", "rows"), [(0, 4, 3), (2, 0, 3), (2, 4, 0), (20, 0, 3)])
def test_empty_operands_give_zeros(monkeypatch, backend, tokens, columns, rows):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    x, weight = torch.ones(tokens, columns, device=DEVICE), torch.ones(rows, columns, device=DEVICE)
    out = linear_geglu(x, weight, weight)
    assert out.shape == (tokens, rows)
    assert columns or not out.any()


def test_opcheck():
    arguments = (normal(3, 24), normal(5, 24, seed=1), normal(5, 24, seed=2))
    torch.library.opcheck(torch.ops.arcmerge.linear_geglu.default, arguments, {"stepwise": True})


@pytest.mark.parametrize(
    ("shapes", "sentence"),
    [
        (((2, 4), (3, 4), (5, 4)), "'up_weight' must have the shape [F, K] = [3, 4], got [5, 4]"),
        (((2, 4), (3, 5), (3, 5)), "'gate_weight' must have the shape [F, K] = [*, 4], got [3, 5]"),
        (((2, 4, 1), (3, 4), (3, 4)), "'x' must have the shape [T, K], got [2, 4, 1]"),
    ],
)
def test_what_breaks_the_contract_is_refused(shapes, sentence):
    with pytest.raises(ArcmergeError) as caught:
        linear_geglu(*(torch.ones(shape) for shape in shapes))
    assert str(caught.value) == sentence
