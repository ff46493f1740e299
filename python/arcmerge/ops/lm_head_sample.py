"""lm_head_sample: the next token, drawn from the head's logits without keeping them.

The filters of transformers, in its order, on candidates that include every id that the filters keep: in the reference
the whole vocabulary; on the CPU the ids whose score is above a bound; on a GPU for each row the few tiles of the
vocabulary whose largest score is.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.checks import require, require_dtype, require_head, require_same_device, shapes
from arcmerge.dispatch.registry import op
from arcmerge.ops.gumbel import gumbel
from arcmerge.ops.lm_head import ROWS, logits, native_head

# Steps of an eighth in which top_p sums the mass of scores from the largest down: scores 80 below it have none.
DEPTHS = 640


@op(stepwise_by_reference=("native",))
def lm_head_sample(
    x: Tensor,
    weight: Tensor,
    steps: Tensor,
    *,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seen: Tensor | None = None,
    repetition_penalty: float = 1.0,
    softcap: float = 0.0,
    stepwise: bool = False,
) -> Tensor:
    """Draw an id for each row from softmax(score) over the ids that the filters keep.

    Scores are float32 logits, changed in this order: repetition_penalty, temperature, top_k, top_p, min_p.

    The draw is argmax(score + noise). The noise depends on seed, steps[t] and the id alone, so the result does not
    depend on the batch and the backend, except for ties within rounding. Rows of equal steps have equal noise.

    Without filters, a GPU moves the bytes of `lm_head_argmax`. With filters it keeps the scores, 4 V bytes a row, and
    sorts those of a few tiles of each row: top_k tiles with top_k, for which nothing waits; else as many as the row
    with the flattest distribution needs, for whose number the host waits once.

    Args:
        x, weight, softcap, stepwise: as in `lm_head_argmax`.
        steps: [T] int64, from 0, the index of the token that is drawn.
        seed: 0 or more.
        temperature: logits are divided by it; 0 takes the largest logit, the lowest id among equals, without filters.
        top_k: keeps scores not below the k-th largest; 0 keeps all.
        top_p: keeps an id if all ids that are more probable (or as probable, with a lower id) have together less than
            top_p; 0 or 1 keeps all.
        min_p: keeps an id whose probability is at least min_p times the largest; 0 keeps all.
        seen: [T, ceil(V / 32)] int32, bit i of word j for id 32 j + i: the ids that repetition_penalty applies to.
        repetition_penalty: their logits are divided by it if above 0, else multiplied.

    Returns:
        [T] int64.

    Raises:
        ArcmergeError: for other shapes, dtypes and devices, and for numbers out of range.
    """
    scores = logits(x, weight, softcap, stepwise)
    ids = torch.arange(len(weight), device=x.device)
    if seen is not None:
        scores = penalised(scores, seen, repetition_penalty)
    if not temperature:
        return scores.argmax(dim=1)
    return _draw(kept(scores / temperature, top_k, top_p, min_p), ids, seed, steps)


@lm_head_sample.check
def _check(
    x: Tensor,
    weight: Tensor,
    steps: Tensor,
    *,
    seed: int,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seen: Tensor | None,
    repetition_penalty: float,
    softcap: float,
    **_: object,
) -> None:
    T, V = require_head(x, weight, softcap)
    shapes("T", steps=steps, T=T)
    require_dtype((torch.int64,), steps=steps)
    require_same_device(x=x, steps=steps)
    infinity = float("inf")
    require(0 <= temperature < infinity, "temperature", "be 0 (the largest logit) or more, and finite", temperature)
    require(top_k >= 0, "top_k", "be 0 (keeps all) or more", top_k)
    require(0 <= top_p <= 1, "top_p", "be from 0 to 1 (both keep all)", top_p)
    require(0 <= min_p <= 1, "min_p", "be from 0 (keeps all) to 1", min_p)
    require(seed >= 0, "seed", "be 0 or more", seed)
    require(0 < repetition_penalty < infinity, "repetition_penalty", "be above 0, and finite", repetition_penalty)
    if seen is not None:
        shapes("T ceil(V/32)", seen=seen, T=T, **{"ceil(V/32)": -(-V // 32)})
        require_dtype((torch.int32,), seen=seen)
        require_same_device(x=x, seen=seen)


@lm_head_sample.fake
def _fake(x: Tensor, *_: Tensor, **__: object) -> Tensor:
    return x.new_empty(len(x), dtype=torch.int64)


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [T, V]; those of the ids in `seen` are divided by the penalty if above 0, else multiplied."""
    ids = torch.arange(logits.shape[1], device=logits.device)
    bits = seen[:, ids // 32] >> (ids % 32).int() & 1
    return torch.where(bits.bool(), torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def kept(scores: Tensor, top_k: int, top_p: float, min_p: float, mass: Tensor | None = None) -> Tensor:
    """Scores [T, n] of candidates in the order of their ids, with -inf for those that the filters remove.

    mass: [T, 1], the sum of exp(score - largest) over the vocabulary, if the candidates are not all of it.
    """
    if top_k:
        floor = scores.topk(min(top_k, scores.shape[1])).values[:, -1:]
        scores = scores.masked_fill(scores < floor, float("-inf"))
    if 0 < top_p < 1:
        ordered, order = scores.sort(dim=1, descending=True, stable=True)
        weights = (ordered.double() - ordered[:, :1].double()).exp()
        total = weights.sum(dim=1, keepdim=True) if mass is None else mass
        before = weights.cumsum(dim=1) - weights
        removed = torch.empty_like(order, dtype=torch.bool).scatter_(1, order, before >= top_p * total)
        scores = scores.masked_fill(removed, float("-inf"))
    if min_p:
        shares = (scores.double() - scores.double().amax(dim=1, keepdim=True)).exp()
        scores = scores.masked_fill(shares < min_p, float("-inf"))
    return scores


def _filter(top_k: int, top_p: float, min_p: float) -> bool:
    """Whether the filters may remove an id."""
    return bool(top_k or 0 < top_p < 1 or min_p)


def _draw(scores: Tensor, ids: Tensor, seed: int, steps: Tensor) -> Tensor:
    """The ids, [n] for all rows or [T, n], of which one is drawn by the scores [T, n]."""
    drawn = (scores + gumbel(seed, steps[:, None], ids)).argmax(dim=1, keepdim=True)
    return ids.expand(len(scores), -1).gather(1, drawn)[:, 0]


@lm_head_sample.native
def _native(
    x: Tensor,
    weight: Tensor,
    steps: Tensor,
    *,
    seed: int,
    temperature: float,
    seen: Tensor | None,
    repetition_penalty: float,
    softcap: float,
    **filters: Any,
) -> Tensor:
    out, weight = torch.empty_like(steps), weight.contiguous()
    for first in range(0, len(x), ROWS):
        part = slice(first, first + ROWS)
        bits = None if seen is None else seen[part]
        scores, maxima = _native_scores(x[part], weight, softcap, temperature, bits, repetition_penalty)
        if not temperature:
            out[part] = scores.argmax(dim=1)
        elif _filter(**filters):
            for row, largest, step in zip(scores, maxima, range(first, len(x)), strict=False):
                ids, mass = _likely(row, largest, **filters)
                found = kept(row[ids][None], **filters, mass=mass)
                out[step : step + 1] = _draw(found, ids, seed, steps[step : step + 1])
        else:
            drawn, counters = torch.empty(len(scores), dtype=torch.int64), steps[part].contiguous()
            _C.lm_head_draw(
                drawn.data_ptr(), scores.data_ptr(), len(scores), len(weight), seed & 2**64 - 1, counters.data_ptr()
            )
            out[part] = drawn
    return out


def _native_scores(
    x: Tensor,
    weight: Tensor,
    softcap: float,
    temperature: float,
    seen: Tensor | None,
    repetition_penalty: float,
) -> tuple[Tensor, Tensor]:
    """Scores [T, V], and the largest score of every HEAD_TILE ids, [T, tiles]."""
    x, bits = x.contiguous(), None if seen is None else seen.contiguous()
    scores, maxima = torch.empty(len(x), len(weight)), torch.empty(len(x), -(-len(weight) // _C.LM_HEAD_TILE))
    _C.lm_head_scores(
        scores.data_ptr(),
        maxima.data_ptr(),
        native_head(x, weight, softcap),
        0 if bits is None else bits.data_ptr(),
        repetition_penalty,
        temperature or 1.0,
    )
    return scores, maxima


def _likely(scores: Tensor, maxima: Tensor, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor | None]:
    """Ids, in order, that include all that the filters keep of scores [V], and the mass of all scores for top_p."""
    largest = maxima.max()
    if not largest.isfinite():
        return torch.arange(len(scores)), None
    floor, mass = scores.new_tensor(float("-inf")), None
    if top_k:
        if top_k <= len(maxima):
            # The k largest maxima are scores of k ids, so the k-th largest score is not below the last of them.
            floor = maxima.topk(top_k).values[-1]
    elif 0 < top_p < 1:
        # The mass of all scores within b / 8 of the largest, for every b; `enough` is the first b at which it suffices.
        depths = largest - scores
        shares = (-depths).exp().double()
        mass = shares.sum().reshape(1, 1)
        masses = torch.bincount((depths * 8).clamp(max=DEPTHS).int(), shares, DEPTHS + 1).cumsum(0)
        enough = int((masses < (1 + 1e-4) * top_p * mass[0]).sum())
        if enough < DEPTHS:
            floor = largest - (enough + 1) / 8
    if min_p and not top_k:
        floor = torch.maximum(floor, largest + math.log(min_p))
    # The margins are for float32.
    return (scores >= floor - 1e-4).nonzero()[:, 0], mass


@lm_head_sample.triton
def _triton(
    x: Tensor,
    weight: Tensor,
    steps: Tensor,
    *,
    seed: int,
    temperature: float,
    seen: Tensor | None,
    repetition_penalty: float,
    softcap: float,
    stepwise: bool,
    **filters: Any,
) -> Tensor:
    from arcmerge.kernels.lm_head import Scores, argmax, fill_scores

    out = torch.empty_like(steps)
    if not len(x):
        return out
    scores = Scores(
        x.contiguous(),
        weight.contiguous(),
        softcap,
        stepwise,
        temperature or None,
        None if seen is None else seen.contiguous(),
        repetition_penalty,
    )
    if not temperature:
        argmax(out, scores)
        return out
    if not _filter(**filters):
        argmax(out, scores, seed=seed, steps=steps.contiguous())
        return out
    width = scores.tile.ids
    table = torch.empty(len(x), scores.tiles, width, device=x.device)
    fill_scores(table, scores)
    maxima = table.amax(dim=2)
    tiles, mass = likely_tiles(table, maxima, **filters)
    found = table.gather(1, tiles[:, :, None].expand(-1, -1, width)).flatten(1)
    ids = (tiles[:, :, None] * width + torch.arange(width, device=x.device)).flatten(1)
    return _draw(kept(found, **filters, mass=mass), ids, seed, steps)


def likely_tiles(table: Tensor, maxima: Tensor, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor | None]:
    """For each row, tiles [T, n] int64, in order, that include all ids that the filters keep.

    table, maxima: the scores [T, tiles, width], and [T, tiles], the largest of each tile, which is NaN if one is.

    Returns also the mass [T, 1] of the vocabulary, the sum of exp(score - largest), without top_k, for top_p.
    """
    order = maxima.argsort(dim=1, descending=True, stable=True)
    if top_k:
        # The k largest tile maxima are scores of k ids, so no other tile has a score above the k-th largest.
        return order[:, :top_k].sort(dim=1).values, None
    sums = (table - maxima[:, :, None]).exp().sum(dim=2)
    floor, mass = bound(maxima.double(), sums.double(), top_k, top_p, min_p, table.shape[2])
    # "Not below", so that a row of NaN selects tiles too. Rows that need fewer tiles get their next ones too.
    count = int((~(maxima.double() < floor)).sum(dim=1).max())
    return order[:, :count].sort(dim=1).values, mass


def bound(maxima: Tensor, sums: Tensor, top_k: int, top_p: float, min_p: float, width: int) -> tuple[Tensor, Tensor]:
    """The score [T, 1] below which the filters keep none, and the mass [T, 1] of the vocabulary.

    maxima, sums: [T, tiles] float64: the largest score and the sum of exp(score - largest) of each tile of `width` ids.
    The mass is the sum of exp(score - largest) over all tiles.
    """
    ordered, order = maxima.sort(dim=1, descending=True)
    heights = (ordered - ordered[:, :1]).exp()
    masses = sums.gather(1, order) * heights
    mass = masses.sum(dim=1, keepdim=True)
    floor = torch.full_like(mass, float("-inf"))
    if top_k:
        # The k largest tile maxima are scores of k ids, so the k-th largest score is not below the last of them.
        return (ordered[:, top_k - 1 : top_k] if top_k <= ordered.shape[1] else floor), mass
    if 0 < top_p < 1:
        # The mass of the first j tiles that is at or above their smallest maximum is at least: that of their maxima;
        # and all that they hold, less what width - 1 ids a tile can hold below it. Where it passes top_p of the whole
        # mass, no lower score is kept.
        counts = torch.arange(1, ordered.shape[1] + 1, device=maxima.device)
        certain = torch.maximum(heights.cumsum(1), masses.cumsum(1) - counts * (width - 1) * heights)
        # The margin is for the sums, which are float32.
        enough = (certain >= (1 + 1e-4) * top_p * mass).int()
        first = ordered.gather(1, enough.argmax(dim=1, keepdim=True))
        floor = torch.where(enough.any(dim=1, keepdim=True), first, floor)
    if min_p:
        relative = ordered[:, :1] + torch.tensor(min_p, dtype=torch.float64).log().item() - 1e-9
        floor = torch.maximum(floor, relative)
    return floor, mass
