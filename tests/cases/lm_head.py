"""Cases of the ops lm_head_*: the weight is read once."""

from __future__ import annotations

import torch
from torch import Tensor

from arcmerge.kernels import lm_head
from arcmerge.kernels.lm_head import Scores
from arcmerge.kernels.sample import sample
from arcmerge.ops.gumbel import gumbel
from arcmerge.ops.lm_head_sample import draw_numbers, kept
from cases.case import Call, Case, Draw, Expected
from cases.gemma import GEMMA_2
from cases.linear import exact_product, matrix

BF16, F32 = torch.bfloat16, torch.float32
CAP = 30.0
NAN = float("nan")


def operands(
    draw: Draw, rows: int, ids: int, columns: int, dtype: torch.dtype = BF16, skip: int = 0, whole: bool = False
) -> tuple[Tensor, Tensor]:
    """x and weight, `skip` elements past an aligned address, whose products cover the bend of the cap.

    whole: whole numbers times 64ths, whose products are exact in any order of sums, but not in bfloat16; every vector
    of the weight is repeated three times, so that there are equal maxima.
    """
    if whole:
        distinct = draw.normal(-(-ids // 3), columns, dtype=dtype).round()
        x = draw.normal(rows, columns, dtype=dtype, scale=64.0).round() / 64
        return x, distinct.repeat(3, 1)[:ids].contiguous()
    return matrix(draw, rows, columns, dtype, skip), matrix(draw, ids, columns, dtype, skip, 15 * columns**-0.5)


def seen_bits(draw: Draw, rows: int, ids: int) -> Tensor:
    words = torch.randint(-(2**31), 2**31, (rows, -(-ids // 32)), generator=torch.Generator().manual_seed(7))
    return draw.exact(words.int())


def exact_scores(scores: Scores) -> tuple[Tensor, Tensor]:
    """Scores in float64, and the error of float32: that of the products, and 8 roundings of the later steps.

    stepwise is for products that are exact: then the steps have the bits of torch.
    """
    values, error = exact_product(scores.x, scores.weight)
    if scores.stepwise:
        dtype = scores.x.dtype
        values = (((values.to(dtype) / scores.softcap).tanh()) * scores.softcap).double()
    elif scores.softcap:
        values = scores.softcap * (values / scores.softcap).tanh()
    error = error + 8 * 2.0**-24 * values.abs()
    if scores.seen is not None:
        ids = torch.arange(len(scores.weight))
        marked = scores.seen.cpu().long()[:, ids // 32] >> (ids % 32) & 1 == 1
        penalty = float(scores.numbers[1])
        factor = torch.where(values > 0, 1 / penalty, penalty)
        values, error = torch.where(marked, values * factor, values), torch.where(marked, error * factor, error)
    temperature = 1.0 if scores.numbers is None else float(scores.numbers[0])
    return values / temperature, error / temperature


def first_maximum(values: Tensor, error: Tensor) -> Expected:
    """The lowest id of the maximum; no other score may be so near that rounding decides."""
    best = values.argmax(dim=1)
    largest = values.gather(1, best[:, None])
    assert bool(((values == largest) | (values < largest - 2 * error.amax(dim=1, keepdim=True))).all())
    return Expected(best)


def _read(scores: Scores) -> int:
    # The temperature; the marks and the penalty.
    options = 0 if scores.seen is None else scores.seen.numel() * 4 + 8
    options += 0 if scores.numbers is None else 8
    return (scores.x.numel() + scores.weight.numel()) * scores.x.itemsize + options


def _operations(scores: Scores) -> int:
    return 2 * len(scores.x) * scores.weight.numel()


def build_argmax(draw: Draw, *shape: object, softcap: float = CAP, stepwise: bool = False, whole: bool = False) -> Call:
    scores = Scores(*operands(draw, *shape, whole=whole), softcap, stepwise)
    out = draw.empty(len(scores.x), dtype=torch.int64)
    return Call(
        launch=lambda: lm_head.argmax(out, scores),
        outputs={"out": out},
        expected=lambda: {"out": first_maximum(*exact_scores(scores))},
        minimum_bytes=_read(scores) + out.numel() * 8,
        operations=_operations(scores),
    )


def build_logprob(draw: Draw, *shape: object, stepwise: bool = False, whole: bool = False) -> Call:
    scores = Scores(*operands(draw, *shape, whole=whole), CAP, stepwise)
    rows, count = len(scores.x), len(scores.weight)
    # The first and the last id, and some in between.
    ids = draw.exact(torch.arange(rows) * 37 % count if rows > 1 else torch.tensor([count - 1]))
    ids[-1] = count - 1
    if rows > 2:  # ids outside of the vocabulary, of which the first has a place in the last tile
        ids[:2] = torch.tensor([count, -1])
    out, best = draw.empty(rows, dtype=F32), draw.empty(rows, dtype=torch.int64)

    def expected() -> dict[str, Expected]:
        values, error = exact_scores(scores)
        chosen = ids.cpu()
        known = (chosen >= 0) & (chosen < count)
        truth = values.gather(1, chosen.where(known, 0)[:, None])[:, 0] - values.logsumexp(dim=1)
        # Exponentials have an error of 2^-22 (ex2.approx) and that of their arguments; sums have at most 128 terms.
        tolerance = 2 * error.amax(dim=1) + 2.0**-24 * (8 + 128 + 4 * truth.abs())
        return {"out": Expected(truth.where(known, NAN), tolerance), "best": first_maximum(values, error)}

    return Call(
        launch=lambda: lm_head.logprob(out, best, scores, ids),
        outputs={"out": out, "best": best},
        expected=expected,
        minimum_bytes=_read(scores) + rows * (8 + 4 + 8),
        operations=_operations(scores),
    )


def build_sample(
    draw: Draw,
    *shape: object,
    temperature: float = 1.4,
    marked: bool = False,
    noisy: bool = True,
    seed: int = 2**40 + 9,
) -> Call:
    x, weight = operands(draw, *shape)
    seen = seen_bits(draw, len(x), len(weight)) if marked else None
    scores = Scores(x, weight, CAP, False, draw.exact(draw_numbers(temperature if noisy else 1.0, 1.5)), seen)
    key, steps = draw.exact(torch.tensor([seed])), draw.exact(torch.arange(len(x)) * 2**32 + 3)
    out = draw.empty(len(x), dtype=torch.int64)

    def expected() -> dict[str, Expected]:
        values, error = exact_scores(scores)
        if noisy:
            noise = gumbel(seed, steps.cpu()[:, None], torch.arange(len(weight))).double()
            values, error = values + noise, error + 2.0**-20
        return {"out": first_maximum(values, error)}

    return Call(
        launch=lambda: lm_head.argmax(out, scores, seed=key, steps=steps if noisy else None),
        outputs={"out": out},
        expected=expected,
        minimum_bytes=_read(scores) + len(x) * 8 + (len(x) * 8 + 8 if noisy else 0),
        operations=_operations(scores),
    )


def build_table(draw: Draw, *shape: object, marked: bool = False) -> Call:
    """The launch for filters: all scores, and the largest of each tile."""
    x, weight = operands(draw, *shape)
    seen = seen_bits(draw, len(x), len(weight)) if marked else None
    scores = Scores(x, weight, CAP, False, draw.exact(draw_numbers(0.8, 1.5)), seen)
    out = draw.empty(len(x), scores.tiles * scores.tile.ids, dtype=F32)

    def expected() -> dict[str, Expected]:
        values, error = exact_scores(scores)
        beyond = (0, out.shape[1] - len(weight))
        values = torch.nn.functional.pad(values, beyond, value=float("-inf"))
        return {"out": Expected(values, torch.nn.functional.pad(error, beyond))}

    return Call(
        launch=lambda: lm_head.fill_scores(out, scores),
        outputs={"out": out},
        expected=expected,
        minimum_bytes=_read(scores) + out.numel() * 4 + len(x) * scores.tiles * 8,
        operations=_operations(scores),
    )


def build_filtered(
    draw: Draw,
    rows: int,
    ids: int,
    width: int = 64,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    spread: float = 3.0,
) -> Call:
    """The draw from all scores, every fourth of which has an equal, so that bounds are met."""
    tiles = -(-ids // width)
    values = torch.randn(rows, tiles * width, generator=torch.Generator().manual_seed(5)) * spread
    values[:, ::4] = values[:, 1::4]
    values[:, ids:] = float("-inf")
    table, numbers = (
        draw.exact(values).view(rows, tiles, width),
        draw.exact(draw_numbers(1.0, 1.0, top_k, top_p, min_p)),
    )
    maxima = table.amax(dim=2)
    sums = (table - maxima[:, :, None]).exp().sum(dim=2)
    key, steps = draw.exact(torch.tensor([2**40 + 9])), draw.exact(torch.arange(rows) * 2**32 + 3)
    out = draw.empty(rows, dtype=torch.int64)

    def expected() -> dict[str, Expected]:
        found = kept(values[:, :ids], top_k, top_p, min_p).double()
        noise = gumbel(int(key), steps.cpu()[:, None], torch.arange(ids)).double()
        return {"out": first_maximum(found + noise, torch.full_like(found, 2.0**-18))}

    return Call(
        launch=lambda: sample(out, table, maxima, sums, steps, key, numbers, ids),
        outputs={"out": out},
        expected=expected,
        minimum_bytes=maxima.numel() * 8 + rows * 16 + 48,
    )


BUILDERS = {
    "lm_head_argmax": build_argmax,
    "lm_head_logprob": build_logprob,
    "lm_head_sample": build_sample,
    "table": build_table,
    "filtered": build_filtered,
}


def _case(
    op: str, name: str, *shape: object, traffic: float | None = None, access_bytes: int = 16, **options: object
) -> Case:
    build = BUILDERS[op]
    # Tensor cores add the columns of a product, and a GPU the exponentials, in another order than the interpreter.
    return Case(
        "lm_head_sample" if op in ("table", "filtered") else op,
        name,
        lambda draw: build(draw, *shape, **options),
        exact=False,
        traffic=traffic,
        access_bytes=access_bytes,
    )


# In addition to the minimum, the results of each tile of 64 ids are written and read: 8 bytes, with sums 12; and the
# score of the wanted id.
SMALL = [
    _case("lm_head_argmax", "as in decoding", 1, 256, 2304, traffic=1 + 2 * 4 * 8 / (257 * 4608 + 8)),
    _case("lm_head_argmax", "1 id", 1, 1, 8),
    _case("lm_head_argmax", "odd, misaligned", 3, 129, 33, BF16, 1),
    _case("lm_head_argmax", "equals, stepwise", 2, 150, 16, stepwise=True, whole=True),
    _case("lm_head_argmax", "no cap, 17 rows", 17, 131, 40, softcap=0.0),
    _case("lm_head_argmax", "f32", 17, 65, 35, F32),
    _case("lm_head_logprob", "as in decoding", 1, 200, 2304, traffic=1 + 2 * (4 * 12 + 4) / (201 * 4608 + 20)),
    _case("lm_head_logprob", "odd", 5, 191, 33),
    _case("lm_head_logprob", "130 rows", 130, 200, 72),
    _case("lm_head_logprob", "equals, 17 rows", 17, 150, 16, whole=True),
    _case("lm_head_logprob", "equals, stepwise", 2, 150, 16, stepwise=True, whole=True),
    _case("lm_head_argmax", "65 rows, odd, misaligned", 65, 129, 33, BF16, 1),
    _case("lm_head_sample", "65 rows", 65, 130, 72),
    _case("lm_head_logprob", "equals, 17 rows, stepwise", 17, 150, 16, stepwise=True, whole=True),
    _case("lm_head_logprob", "f32", 17, 65, 35, F32),
    _case("lm_head_sample", "as in decoding", 1, 128, 2304, traffic=1 + 2 * 2 * 8 / (129 * 4608 + 32)),
    # Whole words of 32 ids, which end in the middle of a tile.
    _case("lm_head_sample", "of the greatest, penalised", 2, 224, 33, marked=True, noisy=False),
    _case("lm_head_sample", "penalised, 17 rows", 17, 200, 40, marked=True),
    _case("lm_head_sample", "f32", 2, 65, 35, F32, marked=True, seed=5),
    _case("table", "all scores", 2, 300, 72, traffic=1),
    _case("table", "all scores, penalised, 17 rows", 17, 300, 33, marked=True),
    _case("table", "all scores, f32", 2, 65, 35, F32),
    # More tiles than a program reads at a time, and fewer; bounds among equals.
    _case("filtered", "top_k", 3, 300, top_k=6),
    _case("filtered", "top_k of more than the tiles", 2, 3000, top_k=100, spread=0.5),
    _case("filtered", "top_p, flat", 2, 2990, top_p=0.9, spread=0.2),
    _case("filtered", "top_p", 3, 1000, top_p=0.8),
    _case("filtered", "min_p, tiles of 32", 2, 301, 32, min_p=0.05),
    _case("filtered", "all filters", 3, 700, top_k=40, top_p=0.9, min_p=0.02),
    _case("filtered", "no filter", 1, 65),
]

FILTERS = {"top_k": 64, "top_p": 0.95}  # of Gemma's generation_config.json

MODELS = [
    case
    for first, shape in [(shape is GEMMA_2[0], shape) for shape in GEMMA_2]
    for case in (
        _case("lm_head_argmax", f"{shape.name}", 1, shape.vocabulary, shape.hidden_size),
        _case("lm_head_argmax", f"{shape.name}, 64 rows", 64, shape.vocabulary, shape.hidden_size),
        _case("lm_head_sample", f"{shape.name}, 64 rows", 64, shape.vocabulary, shape.hidden_size),
        _case("lm_head_sample", f"{shape.name}", 1, shape.vocabulary, shape.hidden_size),
        _case("lm_head_sample", f"{shape.name}, penalised", 1, shape.vocabulary, shape.hidden_size, marked=True),
        _case("table", f"{shape.name}, all scores", 1, shape.vocabulary, shape.hidden_size),
        *([_case("filtered", "through filters", 1, shape.vocabulary, access_bytes=4, **FILTERS)] if first else []),
        _case("lm_head_logprob", f"{shape.name}, 256 rows", 256, shape.vocabulary, shape.hidden_size),
    )
]
