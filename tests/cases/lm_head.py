"""Cases of the ops lm_head_*: the weight is read once."""

from __future__ import annotations

import torch
from torch import Tensor

from arcmerge.kernels import lm_head
from arcmerge.kernels.lm_head import Scores
from arcmerge.ops.gumbel import gumbel
from cases.case import Call, Case, Draw, Expected
from cases.gemma import GEMMA_2
from cases.linear import exact_product, matrix

BF16, F32 = torch.bfloat16, torch.float32
CAP = 30.0


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
        factor = torch.where(values > 0, 1 / scores.penalty, scores.penalty)
        values, error = torch.where(marked, values * factor, values), torch.where(marked, error * factor, error)
    temperature = scores.temperature or 1.0
    return values / temperature, error / temperature


def first_maximum(values: Tensor, error: Tensor) -> Expected:
    """The lowest id of the maximum; no other score may be so near that rounding decides."""
    best = values.argmax(dim=1)
    largest = values.gather(1, best[:, None])
    assert bool(((values == largest) | (values < largest - 2 * error.amax(dim=1, keepdim=True))).all())
    return Expected(best)


def _read(scores: Scores) -> int:
    seen = 0 if scores.seen is None else scores.seen.numel() * 4
    return (scores.x.numel() + scores.weight.numel()) * scores.x.itemsize + seen


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
    out, best = draw.empty(rows, dtype=F32), draw.empty(rows, dtype=torch.int64)

    def expected() -> dict[str, Expected]:
        values, error = exact_scores(scores)
        truth = values.gather(1, ids.cpu()[:, None])[:, 0] - values.logsumexp(dim=1)
        # Exponentials have an error of 2^-22 (ex2.approx) and that of their arguments; sums have at most 128 terms.
        tolerance = 2 * error.amax(dim=1) + 2.0**-24 * (8 + 128 + 4 * truth.abs())
        return {"out": Expected(truth, tolerance), "best": first_maximum(values, error)}

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
    scores = Scores(x, weight, CAP, False, temperature if noisy else None, seen, 1.5)
    steps = draw.exact(torch.arange(len(x)) * 2**32 + 3)
    out = draw.empty(len(x), dtype=torch.int64)

    def expected() -> dict[str, Expected]:
        values, error = exact_scores(scores)
        if noisy:
            noise = gumbel(seed, steps.cpu()[:, None], torch.arange(len(weight))).double()
            values, error = values + noise, error + 2.0**-20
        return {"out": first_maximum(values, error)}

    return Call(
        launch=lambda: lm_head.argmax(out, scores, seed=seed, steps=steps if noisy else None),
        outputs={"out": out},
        expected=expected,
        minimum_bytes=_read(scores) + len(x) * (16 if noisy else 8),
        operations=_operations(scores),
    )


def build_table(draw: Draw, *shape: object, marked: bool = False) -> Call:
    """The launch for filters: all scores."""
    x, weight = operands(draw, *shape)
    seen = seen_bits(draw, len(x), len(weight)) if marked else None
    scores = Scores(x, weight, CAP, False, 0.8, seen, 1.5)
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
        minimum_bytes=_read(scores) + out.numel() * 4,
        operations=_operations(scores),
    )


BUILDERS = {
    "lm_head_argmax": build_argmax,
    "lm_head_logprob": build_logprob,
    "lm_head_sample": build_sample,
    "table": build_table,
}


def _case(op: str, name: str, *shape: object, traffic: float | None = None, **options: object) -> Case:
    build = BUILDERS[op]
    # Tensor cores add the columns of a product, and a GPU the exponentials, in another order than the interpreter.
    return Case(
        "lm_head_sample" if op == "table" else op,
        name,
        lambda draw: build(draw, *shape, **options),
        exact=False,
        traffic=traffic,
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
    _case("lm_head_logprob", "equals, 17 rows, stepwise", 17, 150, 16, stepwise=True, whole=True),
    _case("lm_head_logprob", "f32", 17, 65, 35, F32),
    _case("lm_head_sample", "as in decoding", 1, 128, 2304, traffic=1 + 2 * 2 * 8 / (129 * 4608 + 16)),
    # Whole words of 32 ids, which end in the middle of a tile.
    _case("lm_head_sample", "of the greatest, penalised", 2, 224, 33, marked=True, noisy=False),
    _case("lm_head_sample", "penalised, 17 rows", 17, 200, 40, marked=True),
    _case("lm_head_sample", "f32", 2, 65, 35, F32, marked=True, seed=5),
    _case("table", "all scores", 2, 300, 72, traffic=1),
    _case("table", "all scores, penalised, 17 rows", 17, 300, 33, marked=True),
    _case("table", "all scores, f32", 2, 65, 35, F32),
]

MODELS = [
    case
    for shape in GEMMA_2
    for case in (
        _case("lm_head_argmax", f"{shape.name}", 1, shape.vocabulary, shape.hidden_size),
        _case("lm_head_sample", f"{shape.name}", 1, shape.vocabulary, shape.hidden_size),
        _case("lm_head_sample", f"{shape.name}, penalised", 1, shape.vocabulary, shape.hidden_size, marked=True),
        _case("table", f"{shape.name}, all scores", 1, shape.vocabulary, shape.hidden_size),
        _case("lm_head_logprob", f"{shape.name}, 256 rows", 256, shape.vocabulary, shape.hidden_size),
    )
]
