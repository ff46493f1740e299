"""lm_head: the reference against transformers and float64, the kernels through the ops against the reference."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from arcmerge.errors import ArcmergeError
from arcmerge.kernels import lm_head as kernels
from arcmerge.ops.lm_head import lm_head_argmax, lm_head_logits, lm_head_logprob, logits
from elementwise import interpret
from operands import BF16, F32, normal, same_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
dtypes = pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
every_stepwise = pytest.mark.parametrize("stepwise", [False, True], ids=["once", "stepwise"])


def operands(rows, ids, columns, dtype=BF16):
    """Operands whose logits reach the cap."""
    weight = normal(ids, columns, dtype=F32, seed=1) * 15 * columns**-0.5
    return normal(rows, columns, dtype=dtype).to(DEVICE), weight.to(dtype).to(DEVICE)


def on(monkeypatch, backend, function):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    return function()


@dtypes
def test_stepwise_logits_have_the_bits_of_transformers(dtype, monkeypatch):
    monkeypatch.setenv("ARCMERGE_BACKEND", "reference")  # the same matrix product; others sum in another order
    config = Gemma2Config(
        vocab_size=300, hidden_size=64, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).to(dtype).eval()
    weight = operands(1, 300, 64, dtype)[1].cpu()
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(weight)
        tokens = torch.arange(20)[None] * 13
        hidden = model.model(tokens).last_hidden_state[0]
        theirs = model(tokens).logits[0]
    ours = lm_head_logits(hidden, weight, softcap=30.0, stepwise=True)
    assert ours.dtype == F32
    assert ours.abs().max() > 15
    assert same_bits(ours.to(dtype), theirs)


@dtypes
def test_logits_are_those_of_float64(dtype):
    x, weight = operands(4, 500, 100, dtype)
    truth = 30 * (1 - 2 / (1 + torch.einsum("td,vd->tv", x.double(), weight.double()).mul(2 / 30).exp()))
    ours = lm_head_logits(x, weight, softcap=30.0)
    assert ours.dtype == F32
    # 8 roundings of values up to 30, and those of the sum.
    torch.testing.assert_close(ours.double(), truth, rtol=0, atol=30 * 8 * 2.0**-24)
    torch.testing.assert_close(logits(x.double(), weight.double(), 30.0, False), truth, rtol=1e-12, atol=1e-12)
    uncapped = torch.einsum("td,vd->tv", x.double(), weight.double())
    torch.testing.assert_close(lm_head_logits(x, weight, softcap=0.0).double(), uncapped, rtol=0, atol=1e-4)


def test_parts_of_the_weight_make_the_same_logits(monkeypatch):
    x, weight = operands(3, 300, 64)
    whole = logits(x, weight, 30.0, False)
    monkeypatch.setattr("arcmerge.ops.lm_head.PART", 37)
    torch.testing.assert_close(logits(x, weight, 30.0, False), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize(
    ("rows", "dtype"), [(1, BF16), (16, BF16), (17, BF16), (129, BF16), (1, F32), (17, F32)], ids=str
)
def test_logprob_is_that_of_float64(monkeypatch, backend, rows, dtype):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    x, weight = operands(rows, 333, 70, dtype)
    ids = (torch.arange(rows) * 111 % 333).to(DEVICE)
    out, best = lm_head_logprob(x, weight, ids, softcap=30.0)
    every = logits(x.double(), weight.double(), 30.0, False)
    truth = every.log_softmax(dim=1).gather(1, ids[:, None])[:, 0]
    assert out.dtype == F32
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=30 * 8 * 2.0**-24)
    assert torch.equal(best, every.argmax(dim=1))
    assert torch.equal(best, lm_head_argmax(x, weight, softcap=30.0))


@pytest.mark.parametrize("rows", [2, 17])
@every_stepwise
def test_the_lowest_of_equals_on_every_backend(monkeypatch, rows, stepwise):
    # Whole numbers have exact products; every vector of the weight comes nine times, within a tile and across.
    x, weight = (normal(rows, 24) * 2).round().to(DEVICE), normal(41, 24, seed=1).round().repeat(9, 1).to(DEVICE)
    ids = torch.full((rows,), 368, device=DEVICE)
    every = logits(x, weight, 30.0, stepwise)
    first = (every == every.amax(1, keepdim=True)).int().argmax(1)
    assert ((every == every.amax(1, keepdim=True)).sum(1) >= 9).all()
    for backend in ("reference", "triton"):
        monkeypatch.setenv("ARCMERGE_BACKEND", backend)
        assert torch.equal(lm_head_argmax(x, weight, softcap=30.0, stepwise=stepwise), first)
        out, best = lm_head_logprob(x, weight, ids, softcap=30.0, stepwise=stepwise)
        assert torch.equal(best, first)
        torch.testing.assert_close(out, every.log_softmax(1)[:, 368], rtol=0, atol=1e-5)


def test_stepwise_rounds_every_step(monkeypatch):
    # Products are exact, so that both have the same steps to round.
    x, weight = ((normal(3, 8) * 64).round() / 64).to(DEVICE), (normal(200, 8, seed=1) * 4).round().to(DEVICE)
    ids = torch.tensor([5, 77, 199], device=DEVICE)
    stepped, exact = (
        on(
            monkeypatch,
            "triton",
            lambda stepwise=stepwise: lm_head_logprob(x, weight, ids, softcap=30.0, stepwise=stepwise)[0],
        )
        for stepwise in (True, False)
    )
    reference = on(monkeypatch, "reference", lambda: lm_head_logprob(x, weight, ids, softcap=30.0, stepwise=True)[0])
    torch.testing.assert_close(stepped, reference, rtol=0, atol=1e-5)
    assert ((stepped - exact).abs() > 1e-3).all()


@pytest.mark.parametrize(("rows", "fewer"), [(16, 1), (130, 18)])
def test_a_row_has_the_same_bits_among_any_others(monkeypatch, rows, fewer):
    x, weight = operands(rows, 150, 72)
    ids = torch.arange(rows, device=DEVICE)
    whole, _ = on(monkeypatch, "triton", lambda: lm_head_logprob(x, weight, ids, softcap=30.0))
    part, _ = on(monkeypatch, "triton", lambda: lm_head_logprob(x[-fewer:], weight, ids[-fewer:], softcap=30.0))
    assert same_bits(part, whole[-fewer:])


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy's, in the interpreter
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_that_are_not_numbers_get_an_id_and_none_get_none(monkeypatch, backend):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    x, weight = operands(3, 100, 16)
    x[1] = float("nan")
    assert lm_head_argmax(x, weight, softcap=30.0)[1] == 0
    out, best = lm_head_logprob(x, weight, torch.zeros(3, dtype=torch.int64, device=DEVICE), softcap=30.0)
    assert out.isnan().tolist() == [False, True, False]
    assert best[1] == 0
    assert lm_head_argmax(x[:0], weight, softcap=30.0).shape == (0,)
    assert lm_head_logprob(x[:0], weight, best[:0], softcap=30.0)[0].shape == (0,)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_strided_operands(monkeypatch, backend):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    x, weight = operands(4, 100, 32)
    strided = torch.stack([x, x], dim=-1)[..., 0], weight.t().contiguous().t()
    ids = torch.arange(8, device=DEVICE)[::2]
    assert torch.equal(lm_head_argmax(*strided, softcap=30.0), lm_head_argmax(x, weight, softcap=30.0))
    expected = lm_head_logprob(x, weight, ids.contiguous(), softcap=30.0)[0]
    torch.testing.assert_close(lm_head_logprob(*strided, ids, softcap=30.0)[0], expected, rtol=0, atol=1e-5)


def test_tanh_is_within_five_units_in_the_last_place():
    x = torch.cat([torch.linspace(-12, 12, 40001), torch.logspace(-20, 0, 20001), torch.tensor([0.5477, 1e4, -1e30])])
    out, truth = interpret(kernels._tanh, x), x.double().tanh()
    unit = torch.nextafter(truth.float().abs(), torch.tensor(float("inf"))) - truth.float().abs()
    assert ((out.double() - truth).abs() <= 5 * unit.double()).all()
    assert out[-2:].tolist() == [1.0, -1.0]


def test_ops_keep_the_rules_of_torch():
    x, weight = operands(3, 50, 16, F32)
    ids = torch.tensor([0, 7, 49], device=DEVICE)
    torch.library.opcheck(torch.ops.arcmerge.lm_head_logits.default, (x, weight), {"softcap": 30.0})
    torch.library.opcheck(torch.ops.arcmerge.lm_head_argmax.default, (x, weight), {"softcap": 30.0, "stepwise": True})
    torch.library.opcheck(torch.ops.arcmerge.lm_head_logprob.default, (x, weight, ids), {"softcap": 30.0})


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        pytest.param(
            lambda x, w: lm_head_argmax(x[:, 1:], w, softcap=30.0),
            "'weight' must have the shape [V, D] = [*, 7], got [50, 8]",
            id="columns",
        ),
        pytest.param(
            lambda x, w: lm_head_logits(x.float(), w, softcap=30.0),
            "'weight' must have the dtype of 'x', float32, got bfloat16",
            id="dtypes",
        ),
        pytest.param(
            lambda x, w: lm_head_argmax(x.half(), w, softcap=30.0),
            "'x' must be bfloat16 or float32, got float16",
            id="dtype",
        ),
        pytest.param(
            lambda x, w: lm_head_argmax(x, w[:0], softcap=30.0),
            "'weight' must have a row for each id, got none",
            id="ids",
        ),
        pytest.param(
            lambda x, w: lm_head_argmax(x, w, softcap=-1.0),
            "'softcap' must be 0 (no cap) or more, and finite, got -1.0",
            id="cap",
        ),
        pytest.param(
            lambda x, w: lm_head_logprob(x, w, torch.arange(2), softcap=30.0),
            "'ids' must have the shape [T] = [3], got [2]",
            id="wanted",
        ),
        pytest.param(
            lambda x, w: lm_head_logprob(x, w, torch.arange(3).int(), softcap=30.0),
            "'ids' must be int64, got int32",
            id="integers",
        ),
    ],
)
def test_wrong_calls_are_refused_in_a_sentence(call, sentence):
    with pytest.raises(ArcmergeError) as caught:
        call(normal(3, 8), normal(50, 8))
    assert str(caught.value) == sentence
