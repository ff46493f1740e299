"""Native lm_head: logits against float64 and ids against the reference, for every variant and number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.registry import backends
from arcmerge.kernels.lm_head import Scores
from arcmerge.ops import lm_head_argmax, lm_head_logits, lm_head_logprob, lm_head_sample
from arcmerge.ops.gumbel import gumbel
from arcmerge.ops.lm_head_sample import _likely, kept
from cases.case import Random
from cases.lm_head import exact_scores, first_maximum, operands, seen_bits
from operands import BF16, F32, every_variant, normal, same_bits, using

dtypes = pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
FILTERS = {
    "none": (0, 1.0, 0.0),
    "top_k": (5, 1.0, 0.0),
    "top_k of all": (10**6, 1.0, 0.0),
    "top_p": (0, 0.9, 0.0),
    "small top_p": (0, 1e-6, 0.0),
    "min_p": (0, 0.0, 0.05),
    "all": (40, 0.9, 0.02),
}
# Up to 16 rows use gemv and more use gemm, 48 at a time; ids are in blocks of 512, columns in words of two bf16.
SHAPES = [(1, 1, 8), (1, 513, 64), (3, 512, 33), (16, 511, 40), (17, 1300, 72), (49, 130, 64), (100, 600, 33)]


@pytest.fixture(autouse=True)
def native_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARCMERGE_BACKEND", raising=False)
    served = backends("cpu")
    assert all(served[f"lm_head_{name}"].startswith("native") for name in ("logits", "argmax", "logprob", "sample"))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads, and resets it after the test."""
    before = _C.threads()
    yield _C.set_threads
    _C.set_threads(before)


def by_reference(monkeypatch: pytest.MonkeyPatch, function: Callable[[], Tensor]) -> Tensor:
    with monkeypatch.context() as environment:
        environment.setenv("ARCMERGE_BACKEND", "reference")
        return function()


def wanted(rows: int, ids: int) -> Tensor:
    """Ids of all blocks, including the last id."""
    return ids - 1 - torch.arange(rows) * 37 % ids


@every_variant
@dtypes
@pytest.mark.parametrize("softcap", [30.0, 0.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_logits_are_those_of_float64(variant: str, dtype: torch.dtype, softcap: float, shape: tuple[int, ...]) -> None:
    x, weight = operands(Random(), *shape, dtype, skip=1)
    values, error = exact_scores(Scores(x, weight, softcap, False))
    ids = wanted(shape[0], shape[1])
    with using(variant):
        logits = lm_head_logits(x, weight, softcap=softcap)
        chosen, best = lm_head_logprob(x, weight, ids, softcap=softcap)
        assert torch.equal(lm_head_argmax(x, weight, softcap=softcap), best)
    assert ((logits - values).abs() <= error).all()
    assert torch.equal(best, logits.argmax(dim=1))
    truth = values.log_softmax(dim=1).gather(1, ids[:, None])[:, 0]
    # Exponentials are within 2^-22 including the rounding of their arguments, down to max - 60; sums have 32 terms.
    tolerance = 2 * error.amax(dim=1) + 2.0**-24 * (60 + 32 + 4 * truth.abs())
    assert ((chosen - truth).abs() <= tolerance).all()


@every_variant
def test_tanh_is_within_four_units_in_the_last_place(variant: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 40001), torch.logspace(-30, 0, 20001), torch.tensor([0.625, 1e4, -1e30, 0])])
    with using(variant):
        out = lm_head_logits(torch.ones(1, 1), x[:, None], softcap=1.0)[0]
    truth = x.double().tanh()
    unit = torch.nextafter(truth.float().abs(), torch.tensor(float("inf"))) - truth.float().abs()
    assert ((out - truth).abs() <= 4 * unit.double()).all()


@every_variant
def test_exponentials_are_within_a_unit_in_the_last_place(variant: str) -> None:
    x = torch.linspace(-20, 0, 2001)[:, None]
    with using(variant):
        out, _ = lm_head_logprob(x, torch.tensor([[0.0], [1.0]]), torch.zeros(2001, dtype=torch.int64), softcap=0.0)
    # The last place of 1 + exp(x) is 2^-23.
    assert ((out + x[:, 0].double().exp().log1p()).abs() <= 2.0**-23).all()


@every_variant
@pytest.mark.parametrize("rows", [2, 17, 60])
@pytest.mark.parametrize("stepwise", [False, True])
def test_equal_logits_give_the_lowest_id(variant: str, rows: int, stepwise: bool) -> None:
    # Products are exact in float32, but not in bfloat16. Every row of the weight occurs 40 times, in the same block and
    # in others.
    x, weight = (normal(rows, 24) * 2).round(), ((normal(41, 24, seed=1) * 16).round() / 16).repeat(40, 1)
    values = exact_scores(Scores(x, weight, 30.0, stepwise))[0].float()
    first = (values == values.amax(1, keepdim=True)).int().argmax(1)
    with using(variant):
        out, best = lm_head_logprob(x, weight, wanted(rows, len(weight)), softcap=30.0, stepwise=stepwise)
        logits = lm_head_logits(x, weight, softcap=30.0, stepwise=stepwise)
    assert torch.equal(best, first)
    if stepwise:
        assert same_bits(logits, values)
        truth = values.double().log_softmax(1).gather(1, wanted(rows, len(weight))[:, None])[:, 0]
        torch.testing.assert_close(out.double(), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rows", [16, 1100])
def test_results_do_not_depend_on_threads_or_other_rows(rows: int, threads: Callable[[int], None]) -> None:
    # More than 1024 rows are processed in parts.
    x, weight = operands(Random(), rows, 700, 40)
    ids, found = wanted(rows, 700), []
    for number in (1, 2, 5):
        threads(number)
        found.append(lm_head_logprob(x, weight, ids, softcap=30.0)[0])
    assert same_bits(found[1], found[0])
    assert same_bits(found[2], found[0])
    fewer = 3 if rows == 16 else 77
    assert same_bits(lm_head_logprob(x[-fewer:], weight, ids[-fewer:], softcap=30.0)[0], found[0][-fewer:])
    assert same_bits(lm_head_logits(x, weight, softcap=30.0)[-1], lm_head_logits(x[-fewer:], weight, softcap=30.0)[-1])


@every_variant
def test_nan_rows_get_an_id(variant: str) -> None:
    x, weight = operands(Random(), 20, 700, 16)
    x[1] = float("nan")
    for some in (x[:3], x):
        with using(variant):
            out, best = lm_head_logprob(some, weight, wanted(len(some), 700), softcap=30.0)
        assert out.isnan().nonzero().tolist() == [[1]]
        assert best[1] == 0
        for filters in FILTERS.values():
            assert 0 <= sample(some, weight, filters)[1] < 700
    assert lm_head_logprob(x[:0], weight, best[:0], softcap=30.0)[1].shape == (0,)


def sample(x: Tensor, weight: Tensor, filters: tuple[int, float, float], **changed: object) -> Tensor:
    arguments = dict(softcap=30.0, temperature=1.0, seed=1, steps=torch.arange(len(x)), seen=None, stepwise=False)
    arguments |= dict(zip(("top_k", "top_p", "min_p"), filters, strict=True), repetition_penalty=1.0) | changed
    return lm_head_sample(x, weight, **arguments)  # type: ignore[arg-type]


@every_variant
@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("spread", [1.0, 0.05], ids=["peaked", "flat"])
@pytest.mark.parametrize(("rows", "ids"), [(1, 300), (18, 1301)])
def test_samples_are_those_of_the_reference(
    monkeypatch: pytest.MonkeyPatch,
    variant: str,
    filters: tuple[int, float, float],
    spread: float,
    rows: int,
    ids: int,
) -> None:
    x, weight = operands(Random(), rows, ids, 32)
    x *= spread
    first = dict(temperature=0.8, seed=2**45 + 3, steps=torch.arange(rows) * 2**32 + 77)
    first |= dict(seen=seen_bits(Random(), rows, ids), repetition_penalty=1.2)
    for changed in (first, dict(temperature=1.3, seed=5), dict(temperature=0.0, seen=first["seen"])):
        with using(variant):
            drawn = sample(x, weight, filters, **changed)
        assert torch.equal(drawn, by_reference(monkeypatch, lambda c=changed: sample(x, weight, filters, **c)))


@pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("spread", [12.0, 3.0, 0.1])
def test_filters_keep_nothing_unlikely(filters: tuple[int, float, float], spread: float) -> None:
    for scores in spread * normal(6, 200 * _C.LM_HEAD_TILE, dtype=F32):
        likely, mass = _likely(scores, scores.unflatten(0, (200, _C.LM_HEAD_TILE)).amax(1), *filters)
        every, few = kept(scores[None], *filters)[0], kept(scores[likely][None], *filters, mass)[0]
        assert torch.equal(every[likely], few)
        assert (every > -torch.inf).sum() == (few > -torch.inf).sum()
        if spread == 12.0 and filters not in (FILTERS["none"], FILTERS["top_k of all"]):
            assert len(likely) < 500


@every_variant
@pytest.mark.parametrize("seed", [0, 2**31 - 1, 2**62 + 12345])
def test_noise_is_that_of_the_reference(variant: str, seed: int, threads: Callable[[int], None]) -> None:
    # With equal scores the noise alone decides; a third of the ids cannot be sampled.
    steps, ids = torch.arange(10) * 2**40 + 2**33 + 5, torch.arange(20001)
    scores = torch.zeros(10, 20001)
    scores[:, 5000:11667] = float("-inf")
    drawn = torch.full((10,), -1)
    for number in (1, 2):
        threads(number)
        with using(variant):
            _C.lm_head_draw(drawn.data_ptr(), scores.data_ptr(), 10, 20001, seed, steps.data_ptr())
        noisy = scores + gumbel(seed, steps[:, None], ids)
        assert torch.equal(drawn, noisy.argmax(dim=1))


def test_samples_follow_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    # If scores differ as much as noise does, a bound of the noise that is too low would lose the best id.
    scores = 3 * normal(64, 4096, dtype=F32)
    drawn, steps = torch.full((64,), -1), torch.arange(64)
    _C.lm_head_draw(drawn.data_ptr(), scores.data_ptr(), 64, 4096, 9, steps.data_ptr())
    noisy = (scores + gumbel(9, steps[:, None], torch.arange(4096))).double()
    assert torch.equal(drawn, first_maximum(noisy, torch.full_like(noisy, 2.0**-21)).value)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^'head' must have tokens, columns and ids, got 1, 8 and 0$"):
        _C.lm_head_logprob(0, 0, _C.LmHead(0, 0, 1, 0, 8, 0, 30.0), 0)
    with pytest.raises(ValueError, match=r"^'dtype' must be 0 \(bf16\) or 2 \(f32\), got 1$"):
        _C.LmHead(0, 0, 1, 1, 8, 1, 30.0)
