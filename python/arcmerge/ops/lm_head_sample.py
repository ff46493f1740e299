"""lm_head_sample: the next token, drawn from the head's logits without keeping them.

The filters of transformers, in its order, on whatever candidates are certain to hold all that the filters keep: every
id of the vocabulary in the reference; on the CPU those above a score that says so; on a GPU those of the few tiles of
the vocabulary whose greatest score does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.registry import op
from arcmerge.errors import ArcmergeError
from arcmerge.ops.gumbel import gumbel
from arcmerge.ops.lm_head import logits, native_head, require_head, require_integers

# Rows whose scores the CPU keeps at a time: 16 MB of a Gemma-2.
SCORED = 16
# Steps of an eighth in which top_p sums the mass of scores from the greatest down: what is 80 below has none.
DEPTHS = 640


def lm_head_sample(
    x: Tensor,
    weight: Tensor,
    softcap: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    steps: Tensor,
    seen: Tensor | None,
    repetition_penalty: float,
    stepwise: bool,
) -> Tensor:
    """An id for each row, [T] int64, drawn from softmax(score) over the ids that the filters keep.

    x, weight, softcap, stepwise: as in lm_head_argmax; what follows is in float32 in any case. In this order:
    repetition_penalty: the logits of ids in `seen` ([T, ceil(V / 32)] int32, bit i of word j for id 32 j + i) are
    divided by it if above 0, else multiplied. temperature: scores are logits divided by it; 0 takes the greatest logit,
    the lowest id among equals, without filters. top_k: keeps scores not below the k-th greatest; 0 keeps all. top_p:
    keeps an id if all that are more probable (or as probable, with a lower id) have together less than top_p; 0 or 1
    keeps all. min_p: keeps an id whose probability is at least min_p times the greatest; 0 keeps all.

    The draw is argmax(score + noise): the noise depends on seed, steps[t] ([T] int64, from 0: which token is drawn) and
    the id alone, so on no batch and no backend, but for ties within rounding. Rows of equal steps have equal noise.
    Without filters on a GPU: the traffic of lm_head_argmax. With them the host waits once for how many tiles can hold
    candidates; these are computed again, and a flat distribution under top_p alone may need them all, [T, V] scores.
    Raises ArcmergeError for operands that do not fit together and numbers out of range.
    """
    return _head_sample(
        x, weight, softcap, temperature, top_k, top_p, min_p, seed, steps, seen, repetition_penalty, stepwise
    )


def _check(
    x: Tensor,
    weight: Tensor,
    softcap: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    steps: Tensor,
    seen: Tensor | None,
    repetition_penalty: float,
    stepwise: bool,
) -> None:
    require_head(x, weight, softcap)
    require_integers(x, (len(x),), torch.int64, steps=steps)
    ranges = {
        "temperature": (0 <= temperature < float("inf"), "from 0, which takes the greatest logit, up", temperature),
        "top_k": (top_k >= 0, "from 0, which keeps all, up", top_k),
        "top_p": (0 <= top_p <= 1, "from 0 to 1, which both keep all", top_p),
        "min_p": (0 <= min_p <= 1, "from 0, which keeps all, to 1", min_p),
        "seed": (seed >= 0, "from 0 up", seed),
        "repetition_penalty": (0 < repetition_penalty < float("inf"), "above 0", repetition_penalty),
    }
    for name, (met, rule, value) in ranges.items():
        if not met:
            raise ArcmergeError(f"'{name}' must be {rule}, got {value}")
    if seen is not None:
        require_integers(x, (len(x), -(-len(weight) // 32)), torch.int32, seen=seen)


def _reference(
    x: Tensor,
    weight: Tensor,
    softcap: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    steps: Tensor,
    seen: Tensor | None,
    repetition_penalty: float,
    stepwise: bool,
) -> Tensor:
    scores = logits(x, weight, softcap, stepwise)
    ids = torch.arange(len(weight), device=x.device)
    if seen is not None:
        scores = penalised(scores, seen, repetition_penalty)
    if not temperature:
        return scores.argmax(dim=1)
    return _draw(kept(scores / temperature, top_k, top_p, min_p), ids, seed, steps)


def penalised(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits [T, V] of which those of the ids in `seen` are divided by the penalty if above 0, else multiplied."""
    ids = torch.arange(logits.shape[1], device=logits.device)
    bits = seen[:, ids // 32] >> (ids % 32).int() & 1
    return torch.where(bits.bool(), torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def kept(scores: Tensor, top_k: int, top_p: float, min_p: float, mass: Tensor | None = None) -> Tensor:
    """Scores [T, n] of candidates in the order of their ids, with -inf for those that the filters remove.

    mass: [T, 1], the sum of exp(score - greatest) over the vocabulary if the candidates are not all of it.
    """
    if top_k:
        least = scores.topk(min(top_k, scores.shape[1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, float("-inf"))
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


def _draw(scores: Tensor, ids: Tensor, seed: int, steps: Tensor) -> Tensor:
    return ids[(scores + gumbel(seed, steps[:, None], ids)).argmax(dim=1)]


def _native(
    x: Tensor,
    weight: Tensor,
    softcap: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    steps: Tensor,
    seen: Tensor | None,
    repetition_penalty: float,
    stepwise: bool,
) -> Tensor:
    if stepwise:
        return _reference(
            x,
            weight,
            softcap,
            temperature,
            top_k,
            top_p,
            min_p,
            seed,
            steps,
            seen,
            repetition_penalty,
            stepwise,
        )
    out, weight = torch.empty_like(steps), weight.contiguous()
    for first in range(0, len(x), SCORED):
        part = slice(first, first + SCORED)
        bits = None if seen is None else seen[part]
        scores, maxima = _native_scores(x[part], weight, softcap, temperature, bits, repetition_penalty)
        if not temperature:
            out[part] = scores.argmax(dim=1)
        elif top_k or 0 < top_p < 1 or min_p:
            for row, greatest, step in zip(scores, maxima, range(first, len(x)), strict=False):
                ids, mass = _likely(row, greatest, top_k, top_p, min_p)
                found = kept(row[ids][None], top_k, top_p, min_p, mass)
                out[step : step + 1] = _draw(found, ids, seed, steps[step : step + 1])
        else:
            drawn, counters = torch.empty(len(scores), dtype=torch.int64), steps[part].contiguous()
            _C.head_draw(
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
    """Scores [T, V], and [T, tiles], the greatest of every HEAD_TILE ids."""
    x, bits = x.contiguous(), None if seen is None else seen.contiguous()
    scores, maxima = torch.empty(len(x), len(weight)), torch.empty(len(x), -(-len(weight) // _C.HEAD_TILE))
    _C.head_scores(
        scores.data_ptr(),
        maxima.data_ptr(),
        native_head(x, weight, softcap),
        0 if bits is None else bits.data_ptr(),
        repetition_penalty,
        temperature or 1.0,
    )
    return scores, maxima


def _likely(scores: Tensor, maxima: Tensor, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor | None]:
    """(Ids, in order, that hold all that the filters keep of scores [V]; the mass of all, for top_p.)"""
    greatest = maxima.max()
    if not greatest.isfinite():
        return torch.arange(len(scores)), None
    least, mass = scores.new_tensor(float("-inf")), None
    if top_k:
        if top_k <= len(maxima):
            # The k greatest maxima are scores of k ids, so the k-th greatest score is not below the last of them.
            least = maxima.topk(top_k).values[-1]
    elif 0 < top_p < 1:
        # The mass of all scores that lie within b / 8 of the greatest, for every b: the first b at which it is enough.
        depths = greatest - scores
        shares = (-depths).exp().double()
        mass = shares.sum().reshape(1, 1)
        masses = torch.bincount((depths * 8).clamp(max=DEPTHS).int(), shares, DEPTHS + 1).cumsum(0)
        enough = int((masses < (1 + 1e-4) * top_p * mass[0]).sum())
        if enough < DEPTHS:
            least = greatest - (enough + 1) / 8
    if min_p and not top_k:
        least = torch.maximum(least, greatest + math.log(min_p))
    # The margins are for float32.
    return (scores >= least - 1e-4).nonzero()[:, 0], mass


def _triton(
    x: Tensor,
    weight: Tensor,
    softcap: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    steps: Tensor,
    seen: Tensor | None,
    repetition_penalty: float,
    stepwise: bool,
) -> Tensor:
    from arcmerge.kernels.lm_head import Scores, argmax, candidates, extremes

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
    if not (top_k or 0 < top_p < 1 or min_p):
        argmax(out, scores, seed=seed, steps=steps.contiguous())
        return out
    maxima = torch.empty(len(x), scores.tiles, device=x.device)
    sums = torch.empty_like(maxima)
    extremes(maxima, sums, scores)
    width = scores.tile.ids
    least, mass = bound(maxima.double(), sums.double(), top_k, top_p, min_p, width)
    # "Not below" so that a row of NaN selects tiles too.
    tiles = (~(maxima.double() < least)).any(dim=0).nonzero()
    found = torch.empty(len(x), len(tiles) * width, device=x.device)
    candidates(found, tiles.flatten().int(), scores)
    ids = (tiles * width + torch.arange(width, device=x.device)).flatten()
    return _draw(kept(found, top_k, top_p, min_p, None if top_k else mass), ids, seed, steps)


def bound(maxima: Tensor, sums: Tensor, top_k: int, top_p: float, min_p: float, width: int) -> tuple[Tensor, Tensor]:
    """([T, 1] below which no score is kept; [T, 1], the sum of exp(score - greatest) over the vocabulary).

    maxima, sums: [T, tiles] float64, of tiles of `width` ids: the greatest score, the sum of exp(score - greatest).
    """
    ordered, order = maxima.sort(dim=1, descending=True)
    heights = (ordered - ordered[:, :1]).exp()
    masses = sums.gather(1, order) * heights
    mass = masses.sum(dim=1, keepdim=True)
    least = torch.full_like(mass, float("-inf"))
    if top_k:
        # The k greatest tile maxima are scores of k ids, so the k-th greatest score is not below the last of them.
        return (ordered[:, top_k - 1 : top_k] if top_k <= ordered.shape[1] else least), mass
    if 0 < top_p < 1:
        # Of the first j tiles, this much certainly lies at or above their least maximum: their maxima; or all that
        # they hold, less what width - 1 ids a tile can hold below it. Past top_p of the mass nothing lower is kept.
        counts = torch.arange(1, ordered.shape[1] + 1, device=maxima.device)
        certain = torch.maximum(heights.cumsum(1), masses.cumsum(1) - counts * (width - 1) * heights)
        # The margin is for the sums, which are of float32.
        enough = (certain >= (1 + 1e-4) * top_p * mass).int()
        first = ordered.gather(1, enough.argmax(dim=1, keepdim=True))
        least = torch.where(enough.any(dim=1, keepdim=True), first, least)
    if min_p:
        lowest = ordered[:, :1] + torch.tensor(min_p, dtype=torch.float64).log().item() - 1e-9
        least = torch.maximum(least, lowest)
    return least, mass


_head_sample = op(
    "lm_head_sample(Tensor x, Tensor weight, float softcap, float temperature, int top_k, float top_p, float min_p, "
    "int seed, Tensor steps, Tensor? seen, float repetition_penalty, bool stepwise) -> Tensor",
    check=_check,
    reference=_reference,
    fake=lambda x, *arguments, **named: x.new_empty(len(x), dtype=torch.int64),
    native=_native,
    triton=_triton,
)
