"""sample: an id for each row, drawn from softmax(score) over the ids that top_k, top_p and min_p keep.

Each filter keeps the scores from a bound on, and one program a row finds the bounds by bisection, without a sort. The
largest score and the sum of exponentials of each tile, which the kernel of the scores has stored, give a first bound;
only tiles that have a score above it are read after that: a few of the 4,000 of a Gemma-2 after most prompts. Then each
step of a bisection reads these tiles, from the caches, and counts the scores above its middle, or sums their
exponentials. Bounds are keys, int32 that order as float32 do, so that a bisection ends after 32 steps or fewer.

top_p keeps of equal scores at its bound those with the lowest ids, as the definition in ops/lm_head_sample.py does.
Exponentials are float32 and their sums float64, in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor, empty, int32

from . import dependent_launch
from .gumbel import gumbel

# Scores that a program reads at a time, 8 a thread.
BLOCK = 2048
LOWEST = tl.constexpr(-0x7F800001)  # the key of -inf


@triton.jit
def _key(scores):
    """int32 that order as float32 do; 0 and -0 have one key."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _score(key):
    """The float32 of a key."""
    bits = key.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _read(scores_ptr, list_ptr, start, count, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Scores of the tiles in a list, in the order of their ids; the ids, and which of them exist."""
    place = start + tl.arange(0, BLOCK)
    inside = place < count * WIDTH
    ids = tl.load(list_ptr + place // WIDTH, mask=inside, other=0) * WIDTH + place % WIDTH
    return tl.load(scores_ptr + ids, mask=inside, other=float("-inf")), ids, inside


@triton.jit
def _above(scores_ptr, list_ptr, count, key, highest, MASS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """How many scores of the tiles in a list are above a key; with MASS the sum of their exp(score - highest)."""
    found = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count * WIDTH, BLOCK):
        scores, _, inside = _read(scores_ptr, list_ptr, start, count, WIDTH, BLOCK)
        if MASS:
            values = tl.exp(scores - highest).to(tl.float64)
        else:
            values = inside.to(tl.float64)
        found += tl.where(inside & (_key(scores) > key), values, 0.0)
    return tl.sum(found, axis=0)


@triton.jit
def _lowest(
    scores_ptr,
    list_ptr,
    count,
    low,
    high,
    limit,
    highest,
    MASS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The lowest key from low to high above which `_above` finds less than the limit."""
    while low < high:
        middle = low + (high - low) // 2
        less = _above(scores_ptr, list_ptr, count, middle, highest, MASS, WIDTH, BLOCK) < limit
        high = tl.where(less, middle, high)
        low = tl.where(less, low, middle + 1)
    return high


@triton.jit
def _first_bound(maxima, sums, highest, total, top_k, top_p, min_p, tiles, WIDTH: tl.constexpr):
    """A key below which the filters keep no score, from the largest score and the mass of each tile."""
    keys, heights = _key(maxima), tl.exp(maxima - highest)
    infinite = top_k == float("inf")
    top = _key(highest).to(tl.int64)
    # The k largest of the maxima are scores of k ids, so that no score below the last of them is kept.
    low = tl.full((), LOWEST, tl.int64)
    high = tl.where(top_k <= tiles, top, low)
    while low < high:
        middle = low + (high - low) // 2
        less = tl.sum((keys > middle).to(tl.int32), axis=0) < top_k
        high = tl.where(less, middle, high)
        low = tl.where(less, low, middle + 1)
    bound = high
    # The mass of a tile at or above a score is at least that of its maximum, and all it has less what WIDTH - 1 ids can
    # have below the score. Where these pass top_p of the whole mass, no lower score is kept. The margin is for sums in
    # float32.
    limit = (1 + 1e-4) * top_p * total
    low = tl.full((), LOWEST, tl.int64)
    high = tl.where(infinite & (top_p < float("inf")), top, low)
    while low < high:
        middle = low + (high - low) // 2
        score = _score(middle)
        certain = tl.maximum(heights, sums - (WIDTH - 1) * tl.exp(score - highest))
        less = tl.sum(tl.where(maxima >= score, certain, 0.0), axis=0) < limit
        high = tl.where(less, middle, high)
        low = tl.where(less, low, middle + 1)
    bound = tl.maximum(bound, tl.maximum(high - 1, LOWEST))
    # With top_k, the mass that top_p takes its share of has scores below this bound.
    relative = _key(highest + tl.log(min_p.to(tl.float32)) - 1e-4).to(tl.int64)
    return tl.where(infinite | (top_p == float("inf")), tl.maximum(bound, relative), bound)


@triton.jit
def _sample_kernel(
    scores_ptr,
    maxima_ptr,
    sums_ptr,
    list_ptr,
    seed_ptr,
    steps_ptr,
    numbers_ptr,
    out_ptr,
    tiles,
    V,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dependent_launch.wait()
    row = tl.program_id(0)
    first = row.to(tl.int64) * tiles
    scores_ptr += first * WIDTH
    list_ptr += first
    lane = tl.arange(0, TILES)
    exists = lane < tiles
    maxima = tl.load(maxima_ptr + first + lane, mask=exists, other=float("-inf"))
    highest = tl.max(maxima, axis=0)
    sums = tl.load(sums_ptr + first + lane, mask=exists, other=0.0) * tl.exp(maxima - highest)
    total = tl.sum(sums.to(tl.float64), axis=0)
    # A filter that keeps all has the limit infinity.
    top_k = tl.load(numbers_ptr + 2)
    top_k = tl.where(top_k > 0, top_k, float("inf"))
    top_p = tl.load(numbers_ptr + 3)
    top_p = tl.where((top_p > 0) & (top_p < 1), top_p, float("inf"))
    min_p = tl.load(numbers_ptr + 4)

    bound = _first_bound(maxima, sums, highest, total, top_k, top_p, min_p, tiles, WIDTH)
    chosen = exists & (_key(maxima) >= bound)
    place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(list_ptr + place, lane, mask=chosen)
    count = tl.sum(chosen.to(tl.int32), axis=0)
    tl.debug_barrier()

    top = _key(highest).to(tl.int64)
    high = tl.where(top_k < float("inf"), top, bound)
    bound = _lowest(scores_ptr, list_ptr, count, bound, high, top_k, highest, False, WIDTH, BLOCK)
    if top_k < float("inf"):
        total = _above(scores_ptr, list_ptr, count, bound - 1, highest, True, WIDTH, BLOCK)
    limit = top_p * total
    high = tl.where(top_p < float("inf"), top, bound)
    bound = _lowest(scores_ptr, list_ptr, count, bound, high, limit, highest, True, WIDTH, BLOCK)
    before = _above(scores_ptr, list_ptr, count, bound, highest, True, WIDTH, BLOCK)
    mass = tl.exp(_score(bound) - highest).to(tl.float64)

    seed, step = tl.load(seed_ptr), tl.load(steps_ptr + row)
    ids_before = tl.zeros((), tl.int32)  # with a score at the bound
    best = tl.full((), float("-inf"), tl.float32)
    best_id = tl.zeros((), tl.int32)
    for start in range(0, count * WIDTH, BLOCK):
        scores, ids, inside = _read(scores_ptr, list_ptr, start, count, WIDTH, BLOCK)
        keys = _key(scores)
        equal = (inside & (keys == bound)).to(tl.int32)
        rank = ids_before + tl.cumsum(equal, axis=0) - equal
        ids_before += tl.sum(equal, axis=0)
        keeps = (keys > bound) | ((equal > 0) & (before + rank * mass < limit))
        keeps = keeps & inside & (ids < V) & (tl.exp(scores - highest) >= min_p)
        noisy = tl.where(keeps, scores + gumbel(seed, step, ids), float("-inf"))
        largest = tl.max(noisy, axis=0)
        found = tl.min(tl.where(keeps & (noisy == largest), ids, V - 1), axis=0)
        best_id = tl.where(largest > best, found, best_id)
        best = tl.maximum(best, largest)
    tl.store(out_ptr + row, best_id.to(tl.int64))


def sample(
    out: Tensor, scores: Tensor, maxima: Tensor, sums: Tensor, steps: Tensor, seed: Tensor, numbers: Tensor, ids: int
) -> None:
    """Fill out [T] int64 with the id of each row that is drawn.

    Args:
        scores: [T, tiles, width] float32, those of ids 0 to ids - 1 and -inf after them.
        maxima, sums: [T, tiles] float32, the largest score of each tile and its sum of exp(score - largest).
        steps, seed: [T] and [1] int64, of the noise.
        numbers: [5] float64, of which the last three are top_k, top_p and min_p as in the op lm_head_sample.
        ids: their count.
    """
    rows, tiles, width = scores.shape
    _sample_kernel[(rows,)](
        scores,
        maxima,
        sums,
        empty(rows, tiles, dtype=int32, device=scores.device),
        seed,
        steps,
        numbers,
        out,
        tiles,
        ids,
        WIDTH=width,
        TILES=triton.next_power_of_2(tiles),
        BLOCK=BLOCK,
        num_warps=8,
        enable_fp_fusion=False,
        **dependent_launch.options(out.device),
    )
