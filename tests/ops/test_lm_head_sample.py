"""lm_head_sample: noise against published numbers, filters against transformers, the kernels against the reference."""

import pytest
import torch
import triton
import triton.language as tl
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from arcmerge.errors import ArcmergeError
from arcmerge.kernels import gumbel as kernels
from arcmerge.kernels.sample import sample as launch
from arcmerge.ops.gumbel import gumbel, uniform
from arcmerge.ops.lm_head import logits
from arcmerge.ops.lm_head_sample import draw_numbers, kept, lm_head_sample, penalised
from operands import BF16, F32, normal, same_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FILTERS = {
    "none": (0, 1.0, 0.0),
    "top_k": (5, 1.0, 0.0),
    "top_k of all": (10**6, 1.0, 0.0),
    "top_p": (0, 0.9, 0.0),
    "small top_p": (0, 1e-6, 0.0),
    "min_p": (0, 0.0, 0.05),
    "top_p, min_p": (0, 0.9, 0.02),
    "all": (40, 0.9, 0.02),
}
every_filter = pytest.mark.parametrize("filters", FILTERS.values(), ids=FILTERS)
# Peaked, as after a good prompt, and flat.
every_spread = pytest.mark.parametrize("spread", [6.0, 0.3], ids=["peaked", "flat"])


def operands(rows, ids, columns=32, dtype=BF16, spread=6.0):
    """Operands whose logits have about the standard deviation `spread`."""
    weight = normal(ids, columns, dtype=F32, seed=1) * spread * columns**-0.5
    return normal(rows, columns, dtype=dtype).to(DEVICE), weight.to(dtype).to(DEVICE)


def bits_of(tokens, rows, ids):
    """The argument `seen`, from pairs of row and token id."""
    words = torch.zeros(rows, -(-ids // 32), 32, dtype=torch.int64)
    for row, token in tokens:
        words[row, token // 32, token % 32] = 1
    return (words << torch.arange(32)).sum(2).int().to(DEVICE)


def sample(x, weight, filters=(0, 1.0, 0.0), temperature=1.0, seed=1, steps=None, seen=None, penalty=1.0, **named):
    steps = torch.arange(len(x), device=DEVICE) if steps is None else steps
    named |= dict(zip(("top_k", "top_p", "min_p"), filters, strict=True))
    return lm_head_sample(
        x,
        weight,
        steps,
        seed=seed,
        temperature=temperature,
        seen=seen,
        repetition_penalty=penalty,
        softcap=30.0,
        **named,
    )


@triton.jit
def _uniform_kernel(steps_ptr, ids_ptr, out_ptr, seed, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, kernels.uniform(seed, tl.load(steps_ptr + offsets), tl.load(ids_ptr + offsets)))


@pytest.mark.parametrize("seed", [0, 1, 2**31 - 1, 2**62 + 12345])
def test_uniform_numbers_have_the_same_bits_in_triton(seed):
    ids = torch.arange(256000 - 1024, 256000, device=DEVICE)
    for steps in (ids * 0, ids * 0 + 2**33 + 5, ids * 2**40 + ids):
        out = torch.full((1024,), float("nan"), device=DEVICE)
        _uniform_kernel[(1,)](steps, ids.int(), out, seed, BLOCK=1024)
        assert same_bits(out, uniform(seed, steps, ids))
        assert len(out.unique()) > 1000


def test_uniform_numbers_stay_within_0_and_1(monkeypatch):
    words = torch.tensor([0, 1, 2**31, 2**32 - 129, 2**32 - 1])
    monkeypatch.setattr("arcmerge.ops.gumbel.philox", lambda counter, key: (words,) * 4)
    drawn = uniform(0, torch.zeros(5, dtype=torch.int64), torch.zeros(5, dtype=torch.int64))
    assert drawn.tolist() == [2.0**-33, 1.5 * 2.0**-32, 0.5, 1 - 2.0**-24, 1 - 2.0**-24]
    assert gumbel(0, words, words).isfinite().all()


def test_noise_follows_its_distribution():
    noise = gumbel(3, torch.arange(64)[:, None], torch.arange(4096)).double().flatten().sort().values
    # exp(-exp(-x)) is the distribution function; Kolmogorov's statistic passes 1.95 once in a thousand.
    distance = ((-(-noise).exp()).exp() - (torch.arange(len(noise)) + 0.5) / len(noise)).abs().max()
    assert distance * len(noise) ** 0.5 < 1.95


@pytest.mark.parametrize("filters", [(0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.8, 0.0)], ids=["none", "top_k", "top_p"])
def test_tokens_are_drawn_as_often_as_they_are_probable(monkeypatch, filters):
    monkeypatch.setenv("ARCMERGE_BACKEND", "reference")
    x, weight = operands(1, 12, spread=1.5, dtype=F32)
    drawn = 20000
    found = sample(x.expand(drawn, -1), weight, filters, temperature=0.9, steps=torch.arange(drawn)).bincount(
        minlength=12
    )
    due = kept(logits(x, weight, 30.0, False) / 0.9, *filters).double().softmax(dim=1)[0] * drawn
    assert (found[due == 0] == 0).all()
    # Chi-square of at most 11 degrees of freedom passes 31.3 once in a thousand.
    assert ((found - due)[due > 0] ** 2 / due[due > 0]).sum() < 31.3


@every_filter
@pytest.mark.parametrize("spread", [6.0, 1.0, 0.05])
def test_filters_keep_what_transformers_keeps(filters, spread):
    top_k, top_p, min_p = filters
    scores = normal(8, 700, dtype=F32) * spread
    scores[:, ::7] = scores[:, 1::7].clone()
    warpers = [TopKLogitsWarper(min(top_k, 700))] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if 0 < top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    ours, theirs = kept(scores, *filters), LogitsProcessorList(warpers)(None, scores)
    # Of equals at the end of top_p's set transformers keeps any: as many, but not the same ids.
    assert torch.equal(ours.sort(dim=1).values, theirs.sort(dim=1).values)
    assert torch.equal(ours[ours > -torch.inf], scores[ours > -torch.inf])


def test_top_p_keeps_the_lowest_of_equals_and_at_least_one():
    scores = torch.tensor([[0.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 50.0]])
    keeps = kept(scores, 0, 0.29, 0.0) > -torch.inf
    assert keeps.tolist() == [[False, True, False, False], [False, False, False, True]]
    assert (kept(scores, 0, 0.4, 0.0) > -torch.inf)[0].tolist() == [False, True, True, False]


def test_penalty_and_temperature_are_those_of_transformers():
    scores, tokens = normal(2, 70, dtype=F32) * 3, torch.tensor([[0, 31, 32, 69], [5, 5, 63, 64]])
    seen = bits_of([(row, token) for row in range(2) for token in tokens[row].tolist()], 2, 70).cpu()
    warpers = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(0.7)])
    assert same_bits(penalised(scores, seen, 1.3) / 0.7, warpers(tokens, scores))


@every_filter
@every_spread
def test_kernels_draw_what_the_reference_draws(monkeypatch, filters, spread):
    x, weight = operands(17, 300, spread=spread)
    words = torch.randint(-(2**31), 2**31, (17, 10), generator=torch.Generator().manual_seed(3)).int().to(DEVICE)
    steps = torch.arange(17, device=DEVICE) * 2**32 + 77
    drawn = []
    for backend in ("reference", "triton"):
        monkeypatch.setenv("ARCMERGE_BACKEND", backend)
        drawn.append(sample(x, weight, filters, 0.8, 2**45 + 3, steps, words, 1.2))
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    ("filters", "rows", "ids", "spread"),
    [
        ((5, 1.0, 0.0), 8, 130, 1.0),
        ((90, 1.0, 0.0), 6, 130, 1.0),  # more than the tiles
        ((0, 0.6, 0.0), 16, 130, 0.5),
        ((0, 0.37, 0.0), 6, 5000, 0.0),  # one score in more than one block of a program
        ((0, 1.0, 0.3), 12, 130, 1.0),
        ((60, 0.9, 0.2), 12, 130, 1.0),
    ],
    ids=str,
)
def test_bounds_among_equal_scores_are_those_of_the_definition(filters, rows, ids, spread):
    """Scores are multiples of a quarter, so that a bound is a score of many ids, and rows are many: most ids that a
    filter removes by mistake, or keeps, are drawn in one of them.
    """
    tiles = -(-ids // 64)
    scores = (normal(rows, tiles * 64, dtype=F32, seed=5) * spread * 4).round() / 4
    scores[:, ids:] = -torch.inf
    steps, numbers, key = torch.arange(rows), draw_numbers(1.0, 1.0, *filters), torch.tensor([3])
    expected = (kept(scores[:, :ids], *filters) + gumbel(3, steps[:, None], torch.arange(ids))).argmax(dim=1)
    table, out = scores.view(rows, tiles, 64).to(DEVICE), torch.empty(rows, dtype=torch.int64, device=DEVICE)
    maxima = table.amax(dim=2)
    sums = (table - maxima[:, :, None]).exp().sum(dim=2)
    launch(out, table, maxima, sums, steps.to(DEVICE), key.to(DEVICE), numbers.to(DEVICE), ids)
    assert torch.equal(out.cpu(), expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_temperature_0_takes_the_maximum_after_the_penalty(monkeypatch, backend):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    x, weight = operands(3, 200)
    scores = logits(x, weight, 30.0, False)
    first, second = scores.topk(2).indices.T
    assert torch.equal(sample(x, weight, (3, 0.5, 0.5), 0.0), first)
    seen = bits_of(list(enumerate(first.tolist())), 3, 200)
    assert torch.equal(sample(x, weight, temperature=0.0, seen=seen, penalty=100.0), second)
    below = -scores.abs() - 1
    below[:, 7] = -0.5
    assert penalised(below, bits_of([(0, 7)], 3, 200), 100.0).argmax(1).tolist() == [
        int(below[0].topk(2).indices[1]),
        7,
        7,
    ]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("filters", [(0, 1.0, 0.0), (9, 0.8, 0.0)], ids=["none", "some"])
def test_a_row_is_drawn_alike_among_any_others(monkeypatch, backend, filters):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    x, weight = operands(20, 300, spread=1.0)
    steps = torch.arange(20, device=DEVICE) % 7
    whole = sample(x, weight, filters, steps=steps)
    assert torch.equal(sample(x[4:5], weight, filters, steps=steps[4:5]), whole[4:5])
    assert not torch.equal(sample(x, weight, filters, steps=steps + 1), whole)
    assert not torch.equal(sample(x, weight, filters, steps=steps, seed=2), whole)
    assert sample(x[:0], weight, filters).shape == (0,)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # numpy's, in the interpreter
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_that_are_not_numbers_get_an_id(monkeypatch, backend):
    monkeypatch.setenv("ARCMERGE_BACKEND", backend)
    x, weight = operands(2, 100)
    x[:] = float("nan")
    for filters in FILTERS.values():
        assert ((sample(x, weight, filters) >= 0) & (sample(x, weight, filters) < 100)).all()


def test_op_keeps_the_rules_of_torch():
    x, weight = operands(2, 50, dtype=F32)
    named = dict(seed=7, temperature=0.9, top_k=5, top_p=0.9, min_p=0.01, softcap=30.0)
    arguments = (x, weight, torch.arange(2, device=DEVICE))
    torch.library.opcheck(torch.ops.arcmerge.lm_head_sample.default, arguments, named)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"temperature": -1.0}, "'temperature' must be 0 (the largest logit) or more, and finite, got -1.0"),
        ({"filters": (-1, 1.0, 0.0)}, "'top_k' must be 0 (keeps all) or more, got -1"),
        ({"filters": (0, 1.5, 0.0)}, "'top_p' must be from 0 to 1 (both keep all), got 1.5"),
        ({"filters": (0, 1.0, 2.0)}, "'min_p' must be from 0 (keeps all) to 1, got 2.0"),
        ({"seed": -1}, "'seed' must be 0 or more, got -1"),
        ({"penalty": 0.0}, "'repetition_penalty' must be above 0, and finite, got 0.0"),
        ({"steps": torch.arange(3)}, "'steps' must have the shape [T] = [2], got [3]"),
        ({"seen": torch.zeros(2, 1).int()}, "'seen' must have the shape [T, ceil(V/32)] = [2, 2], got [2, 1]"),
        ({"seen": torch.zeros(2, 2)}, "'seen' must be int32, got float32"),
    ],
    ids=str,
)
def test_wrong_calls_are_refused_in_a_sentence(changed, sentence):
    with pytest.raises(ArcmergeError) as caught:
        sample(normal(2, 8), normal(50, 8), **changed)
    assert str(caught.value) == sentence
