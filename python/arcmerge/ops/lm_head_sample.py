"""lm_head_sample: the next token, drawn from the head's logits without keeping them.

The filters of transformers, in its order, on candidates that include every id that the filters keep: in the reference
the whole vocabulary; on the CPU the ids whose score is above a bound; on a GPU for each row the few tiles of the
vocabulary whose largest score is. `lm_head_draw` takes the options in tensors, for CUDA graphs.
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

    Without filters, a GPU moves the bytes of `lm_head_argmax`. With filters it also writes the scores, 4 V bytes a row,
    and reads those of a few tiles of each row some twenty times, from its caches.

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
    top_k: int,
    top_p: float,
    min_p: float,
    **named: Any,
) -> Tensor:
    filters = bool(temperature) and _filter(top_k, top_p, min_p)
    # From memory that is not pinned, so the host does not wait.
    values = draw_numbers(temperature, repetition_penalty, top_k, top_p, min_p).to(x.device, non_blocking=True)
    key = torch.tensor([seed & 2**63 - 1]).to(x.device, non_blocking=True)
    return _launch(x, weight, steps, key, values, draws=bool(temperature), filters=filters, seen=seen, **named)


def _launch(
    x: Tensor,
    weight: Tensor,
    steps: Tensor,
    seed: Tensor,
    numbers: Tensor,
    *,
    draws: bool,
    filters: bool,
    seen: Tensor | None,
    softcap: float,
    stepwise: bool,
) -> Tensor:
    from arcmerge.kernels.lm_head import Scores, argmax, fill_scores
    from arcmerge.kernels.sample import sample

    out = torch.empty_like(steps)
    if not len(x):
        return out
    bits = None if seen is None else seen.contiguous()
    scores = Scores(x.contiguous(), weight.contiguous(), softcap, stepwise, numbers, bits)
    if filters:
        table = torch.empty(len(x), scores.tiles, scores.tile.ids, device=x.device)
        maxima, sums = fill_scores(table, scores)
        sample(out, table, maxima, sums, steps.contiguous(), seed, numbers, len(weight))
    elif draws:
        argmax(out, scores, seed=seed, steps=steps.contiguous())
    else:
        argmax(out, scores)
    return out


def draw_numbers(
    temperature: float = 1.0, repetition_penalty: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """The options as `lm_head_draw` takes them, [5] float64 on the CPU; a temperature of 0, as without a draw, is 1."""
    return torch.tensor([temperature or 1.0, repetition_penalty, top_k, top_p, min_p], dtype=torch.float64)


@op()
def lm_head_draw(
    x: Tensor,
    weight: Tensor,
    steps: Tensor,
    seed: Tensor,
    numbers: Tensor,
    *,
    draws: bool = True,
    filters: bool = True,
    seen: Tensor | None = None,
    softcap: float = 0.0,
    stepwise: bool = False,
) -> Tensor:
    """`lm_head_sample` with its options in tensors, which a CUDA graph reads anew in every replay.

    A GPU waits for nothing, except by the reference, which reads the options on the host.

    Args:
        x, weight, steps, seen, softcap, stepwise: as in `lm_head_sample`.
        seed: [1] int64.
        numbers: [5] float64: temperature, repetition_penalty, top_k, top_p and min_p, as in `lm_head_sample`, except
            that the temperature is above 0. They are only checked on the CPU.
        draws: whether to draw; else the largest score is taken, as with a temperature of 0.
        filters: whether top_k, top_p and min_p apply, to what is drawn; without them the scores are not kept.

    Returns:
        [T] int64.

    Raises:
        ArcmergeError: as in `lm_head_sample`.
    """
    sample = lm_head_sample.implementations["reference"]
    options = _options(seed, numbers, draws, filters)
    drawn: Tensor = sample(x, weight, steps, seen=seen, softcap=softcap, stepwise=stepwise, **options)
    return drawn


@lm_head_draw.check
def _check_draw(
    x: Tensor,
    weight: Tensor,
    steps: Tensor,
    seed: Tensor,
    numbers: Tensor,
    *,
    draws: bool,
    filters: bool,
    seen: Tensor | None,
    softcap: float,
    **_: object,
) -> None:
    shapes("1, 5", seed=seed, numbers=numbers)
    require_dtype((torch.int64,), seed=seed)
    require_dtype((torch.float64,), numbers=numbers)
    require_same_device(x=x, seed=seed, numbers=numbers)
    on_cpu = numbers.device.type == "cpu" and seed.device.type == "cpu"
    options = _options(seed, numbers, True, filters) if on_cpu else _UNKNOWN
    require(options["temperature"] > 0, "temperature", "be above 0", options["temperature"])
    _check(x, weight, steps, seen=seen, softcap=softcap, **options)


_UNKNOWN = {"seed": 0, "temperature": 1.0, "repetition_penalty": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def _options(seed: Tensor, numbers: Tensor, draws: bool, filters: bool) -> dict[str, Any]:
    """The options of `lm_head_sample`; the host waits for them."""
    temperature, penalty, top_k, top_p, min_p = numbers.tolist()
    found = {"seed": int(seed), "temperature": temperature if draws else 0.0, "repetition_penalty": penalty}
    return {**_UNKNOWN, **found, **({"top_k": int(top_k), "top_p": top_p, "min_p": min_p} if filters else {})}


@lm_head_draw.fake
def _fake_draw(x: Tensor, *tensors: Tensor, **__: object) -> Tensor:
    return _fake(x)


@lm_head_draw.native
def _native_draw(
    x: Tensor,
    weight: Tensor,
    steps: Tensor,
    seed: Tensor,
    numbers: Tensor,
    *,
    draws: bool,
    filters: bool,
    stepwise: bool,
    **named: Any,
) -> Tensor:
    function = lm_head_sample.implementations["reference" if stepwise else "native"]
    rounded = {"stepwise": True} if stepwise else {}
    drawn: Tensor = function(x, weight, steps, **_options(seed, numbers, draws, filters), **rounded, **named)
    return drawn


lm_head_draw.triton(_launch)
