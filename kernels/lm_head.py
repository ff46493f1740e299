"""lm_head: functions of logits = softcap * tanh(x W^T / softcap) over a vocabulary, without the logits in memory.

A program multiplies a block of rows by a tile of the vocabulary, in a loop over D, and stores a few numbers a row for
its tile: the maximum score, its id, the sum of exponentials, the score of one wanted id. A second kernel reduces the
tiles of a row in a fixed order. Up to 16 rows read the weight once (1.18 GB for Gemma-2 2.6B); more rows read it once
from memory, because the row blocks of one tile run at the same time and share it in the L2 cache.

A score is a logit; for sampling, it is the logit after repetition penalty and temperature, plus Gumbel noise that
depends on seed, step and id alone: argmax(score + noise) has the distribution softmax(score) (FlashSampling, arXiv
2603.15854). For filters, such as top_k, all scores are stored (see sample.py). Penalty, temperature and seed are in the
memory of the GPU, so that one CUDA graph serves all of them.

FMA is off, so that all launches give equal bits; matrix instructions do not depend on it. The bits of a row do not
depend on the other rows, except that more than 16 rows, and more than 64, use another tile.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dependent_launch
from .gumbel import gumbel
from .proxy import fence
from .target import configuration, enough_registers

BEYOND = tl.constexpr(2**31 - 1)  # above every id


@triton.jit
def _tanh(x):
    """Within 5 units in the last place where exp2 is exact.

    1 - 2 / (1 + e^2x) cancels near 0; the minimax polynomial there has a relative error of 3.6e-8.
    """
    square = x * x
    cubic = -0.33332959 + square * (0.13321008 + square * (-0.052690666 + square * 0.016474731))
    near = x + x * square * cubic
    far = 1.0 - 2.0 / (1.0 + tl.exp2(2.885390081777927 * x))
    return tl.where(square < 0.3, near, far)


@triton.jit
def _round(values, STEPWISE: tl.constexpr, dtype: tl.constexpr):
    if STEPWISE:
        values = values.to(dtype).to(tl.float32)
    return values


@triton.jit
def _scores(
    x_ptr,
    weight_ptr,
    seen_ptr,
    rows,
    ids,
    D,
    V,
    softcap,
    numbers_ptr,
    STEPWISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scores [BLOCK_T, BLOCK_V] float32; -inf for ids from V on, which read the last row. All rows must exist."""
    inner = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * D + inner[None, :]
    weight_ptrs = weight_ptr + tl.minimum(ids, V - 1).to(tl.int64)[None, :] * D + inner[:, None]
    products = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for start in range(0, D, BLOCK_K):
        inside = start + inner < D
        x = tl.load(x_ptrs + start, mask=inside[None, :], other=0.0)
        weight = tl.load(weight_ptrs + start, mask=inside[:, None], other=0.0)
        fence()
        products = tl.dot(x, weight, products, input_precision="ieee")
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    scores = _round(products, STEPWISE, dtype)
    if softcap is not None:
        capped = _round(_tanh(_round(tl.div_rn(scores, softcap), STEPWISE, dtype)), STEPWISE, dtype)
        scores = _round(capped * softcap, STEPWISE, dtype)
    if seen_ptr is not None:
        words = rows.to(tl.int64)[:, None] * tl.cdiv(V, 32) + (ids // 32)[None, :]
        seen = (tl.load(seen_ptr + words, mask=(ids < V)[None, :], other=0) >> (ids % 32)[None, :]) & 1
        penalty = tl.load(numbers_ptr + 1).to(tl.float32)
        penalised = tl.where(scores < 0, scores * penalty, tl.div_rn(scores, penalty))
        scores = tl.where(seen != 0, penalised, scores)
    if numbers_ptr is not None:
        scores = tl.div_rn(scores, tl.load(numbers_ptr).to(tl.float32))
    return tl.where((ids < V)[None, :], scores, float("-inf"))


@triton.jit(do_not_specialize=["T"])
def _tiles_kernel(
    x_ptr,
    weight_ptr,
    seen_ptr,
    numbers_ptr,
    seed_ptr,
    steps_ptr,
    wanted_ptr,
    scores_ptr,
    maxima_ptr,
    best_ptr,
    sums_ptr,
    wanted_scores_ptr,
    T,
    D,
    V,
    softcap,
    STEPWISE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dependent_launch.wait()
    tile = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = row < T
    # Rows and ids beyond the end repeat the last one, so that loads in the loop need no masks.
    rows = tl.minimum(row, T - 1)
    ids = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    scores = _scores(
        x_ptr, weight_ptr, seen_ptr, rows, ids, D, V, softcap, numbers_ptr, STEPWISE, BLOCK_T, BLOCK_V, BLOCK_K
    )
    if steps_ptr is not None:
        scores += gumbel(tl.load(seed_ptr), tl.load(steps_ptr + rows)[:, None], ids[None, :])
    if scores_ptr is not None:
        width = tl.num_programs(1).to(tl.int64) * BLOCK_V
        tl.store(scores_ptr + row.to(tl.int64)[:, None] * width + ids[None, :], scores, mask=exists[:, None])
    maxima = tl.max(scores, axis=1)
    index = row.to(tl.int64) * tl.cdiv(V, BLOCK_V) + tile
    tl.store(maxima_ptr + index, maxima, mask=exists)
    if best_ptr is not None:
        # "Not less" is also true for NaN, so that an id of the tile is always found.
        best = tl.min(tl.where(scores < maxima[:, None], BEYOND, ids[None, :]), axis=1)
        tl.store(best_ptr + index, best, mask=exists)
    if sums_ptr is not None:
        sums = tl.sum(tl.exp(scores - maxima[:, None]), axis=1)
        tl.store(sums_ptr + index, sums, mask=exists)
    if wanted_ptr is not None:
        wanted = tl.load(wanted_ptr + rows).to(tl.int32) - tile * BLOCK_V
        here = wanted[:, None] == tl.arange(0, BLOCK_V)[None, :]
        score = tl.sum(tl.where(here, scores, 0.0), axis=1)
        # The last tile may be short.
        within = (wanted >= 0) & (wanted < tl.minimum(BLOCK_V, V - tile * BLOCK_V))
        tl.store(wanted_scores_ptr + row, score, mask=exists & within)


@triton.jit
def _rows_kernel(
    maxima_ptr, best_ptr, sums_ptr, wanted_scores_ptr, logprob_ptr, best_out_ptr, tiles, BLOCK: tl.constexpr
):
    dependent_launch.wait()
    row = tl.program_id(0)
    offsets = tl.arange(0, BLOCK)
    inside = offsets < tiles
    index = row.to(tl.int64) * tiles + offsets
    maxima = tl.load(maxima_ptr + index, mask=inside, other=float("-inf"))
    highest = tl.max(maxima, axis=0)
    ids = tl.load(best_ptr + index, mask=inside, other=BEYOND)
    tl.store(best_out_ptr + row, tl.min(tl.where(maxima < highest, BEYOND, ids), axis=0).to(tl.int64))
    if sums_ptr is not None:
        sums = tl.load(sums_ptr + index, mask=inside, other=0.0)
        total = tl.sum(sums * tl.exp(maxima - highest), axis=0)
        tl.store(logprob_ptr + row, tl.load(wanted_scores_ptr + row) - highest - tl.log(total))


class Tile(NamedTuple):
    """A tile: rows of x, ids, and `inner` columns at a time; the warps of a program, and its stages by architecture."""

    rows: int
    ids: int
    inner: int
    warps: int
    stages: Mapping[str, int]


# No launch of a Gemma-2 spills. Few rows are bound by bandwidth: at latencies near 700 ns an H100 needs 18 KB in flight
# for each multiprocessor (3.35 TB/s over 132), a B200 38 KB. A stage is 20 KB, 16 of them weight, and shared memory
# holds all stages but one: with 60 KB a program, the 163 KB of sm_80 hold two and the 227 KB of sm_90 three; with 40
# KB, the 99 KB of sm_86 and sm_120 hold two.
FEW_ROWS = 16
FEW = Tile(16, 64, 128, 4, {"sm_80": 4, "sm_86": 3, "sm_90": 4, "sm_120": 3, "gfx942": 2})
# As many rows as a matrix instruction of a group of warps has at least are bound by bandwidth, too. 48 KB, on sm_90 and
# sm_100 64 KB, and 48 to 89 registers, with the noise of sampling, which would spill in the tile of many rows. With 4
# warps, rows that are not aligned would spill on sm_120.
SOME_ROWS = 64
SOME = Tile(64, 64, 64, 8, {"sm_80": 4, "gfx942": 2})
# More rows are bound by matrix instructions. 64 KB, on sm_90 and sm_100 128 KB, and 155 to 177 registers; 256 ids a
# tile spill.
MANY = Tile(128, 128, 64, 8, {"sm_80": 3, "sm_90": 4, "sm_120": 3, "gfx942": 2})
# Without tensor cores; 64 ids spill where D is odd.
FLOAT32 = Tile(16, 32, 32, 4, {"sm_80": 2, "gfx942": 2})


class Scores(NamedTuple):
    """The scores to compute.

    Args:
        x, weight: [T, D] and [V, D], contiguous, both bf16 or both f32.
        softcap: bound of the logits; 0 for none.
        stepwise: round to the dtype of x after the product and every step of the cap.
        numbers: [2] float64 or more, the temperature, which divides the logits, and the penalty; None for neither.
        seen: [T, ceil(V / 32)] int32, bit i of word j for id 32 j + i: the ids whose logits are divided by the penalty
            if above 0, else multiplied.
    """

    x: Tensor
    weight: Tensor
    softcap: float
    stepwise: bool
    numbers: Tensor | None = None
    seen: Tensor | None = None

    @property
    def tile(self) -> Tile:
        if self.x.dtype == torch.float32:
            return FLOAT32
        if len(self.x) <= FEW_ROWS:
            return FEW
        return SOME if len(self.x) <= SOME_ROWS or self.numbers is not None else MANY

    @property
    def tiles(self) -> int:
        """The count of tiles in the vocabulary; the last may be short."""
        return -(-len(self.weight) // self.tile.ids)

    @property
    def row_blocks(self) -> int:
        return -(-len(self.x) // self.tile.rows)

    def scalars(self) -> dict[str, object]:
        (T, D), V = self.x.shape, len(self.weight)
        return {"T": T, "D": D, "V": V, "STEPWISE": self.stepwise, "softcap": self.softcap or None}

    def blocks(self) -> dict[str, int | bool]:
        rows, ids, inner, warps, stages = self.tile
        sizes = {"BLOCK_T": rows, "BLOCK_V": ids, "BLOCK_K": inner}
        stages_here = configuration(stages, self.x.device)
        options = {"num_warps": warps, "num_stages": stages_here, "enable_fp_fusion": False}
        if self.tile is MANY:
            options |= enough_registers(self.x.device)
        return {**sizes, **options, **dependent_launch.options(self.x.device)}


def argmax(out: Tensor, scores: Scores, *, seed: Tensor | None = None, steps: Tensor | None = None) -> None:
    """Fill out [T] int64 with the id of the maximum score, the lowest among equals.

    seed, steps: of the noise that is added to the scores, [1] and [T] int64; None for none.
    """
    maxima, best = _partials(scores, torch.float32), _partials(scores, torch.int32)
    _launch(scores, maxima, best=best, seed=seed, steps=steps)
    _launch_rows(scores, maxima, best, out)


def logprob(out: Tensor, best_out: Tensor, scores: Scores, ids: Tensor) -> None:
    """Fill out [T] float32 with the log-probabilities of ids [T] int64, and best_out [T] int64 as `argmax` does.

    A log-probability is the score less the logarithm of the sum of exponentials; NaN for an id outside the vocabulary.
    """
    maxima, sums, best = (_partials(scores, dtype) for dtype in (torch.float32, torch.float32, torch.int32))
    wanted_scores = torch.full_like(out, float("nan"))
    _launch(scores, maxima, best=best, sums=sums, wanted=ids, wanted_scores=wanted_scores)
    _launch_rows(scores, maxima, best, best_out, sums, wanted_scores, out)


def fill_scores(out: Tensor, scores: Scores) -> tuple[Tensor, Tensor]:
    """Fill out [T, tiles, width] float32 with all scores, width = scores.tile.ids; -inf for ids from V on.

    Returns:
        The largest score of each tile, and the sum of exp(score - largest), both [T, tiles] float32.
    """
    maxima, sums = _partials(scores, torch.float32), _partials(scores, torch.float32)
    _launch(scores, maxima, sums=sums, out=out)
    return maxima, sums


def _partials(scores: Scores, dtype: torch.dtype) -> Tensor:
    return torch.empty(len(scores.x), scores.tiles, dtype=dtype, device=scores.x.device)


def _launch(
    scores: Scores,
    maxima: Tensor,
    *,
    best: Tensor | None = None,
    sums: Tensor | None = None,
    wanted: Tensor | None = None,
    wanted_scores: Tensor | None = None,
    out: Tensor | None = None,
    seed: Tensor | None = None,
    steps: Tensor | None = None,
) -> None:
    # Row blocks vary fastest: those that read the same tile of the weight run together and share it in the cache.
    _tiles_kernel[(scores.row_blocks, scores.tiles)](
        x_ptr=scores.x,
        weight_ptr=scores.weight,
        seen_ptr=scores.seen,
        numbers_ptr=scores.numbers,
        seed_ptr=seed,
        steps_ptr=steps,
        wanted_ptr=wanted,
        scores_ptr=out,
        maxima_ptr=maxima,
        best_ptr=best,
        sums_ptr=sums,
        wanted_scores_ptr=wanted_scores,
        **scores.scalars(),
        **scores.blocks(),
    )


def _launch_rows(
    scores: Scores,
    maxima: Tensor,
    best: Tensor,
    best_out: Tensor,
    sums: Tensor | None = None,
    wanted_scores: Tensor | None = None,
    out: Tensor | None = None,
) -> None:
    _rows_kernel[(len(best_out),)](
        maxima,
        best,
        sums,
        wanted_scores,
        out,
        best_out,
        scores.tiles,
        BLOCK=triton.next_power_of_2(scores.tiles),
        num_warps=4,
        enable_fp_fusion=False,
        **dependent_launch.options(best_out.device),
    )
