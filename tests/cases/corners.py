"""The far corners of launches with more elements than 32 bits can count: 136 sequences of 8192 tokens.

Tensors are as large as the launch wants, but only what the last blocks read is filled; the rest takes no memory. An
offset that wraps around is out of bounds, or leads to zeros.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from arcmerge.kernels import lm_head
from arcmerge.kernels.attention import attention
from arcmerge.kernels.attention_decode import attention_decode, splits
from arcmerge.kernels.geglu import geglu
from arcmerge.kernels.linear import linear
from arcmerge.kernels.lm_head import Scores
from arcmerge.kernels.rmsnorm import rmsnorm
from arcmerge.kernels.rmsnorm_add_rmsnorm import rmsnorm_add_rmsnorm
from arcmerge.kernels.rope_cache import rope_cache
from arcmerge.ops.lm_head_sample import draw_numbers
from cases import geglu as geglu_cases
from cases import linear as linear_cases
from cases import rmsnorm as rmsnorm_cases
from cases import rmsnorm_add_rmsnorm as rmsnorm_add_rmsnorm_cases
from cases.attention import exact_attention
from cases.case import Call, Expected, Random
from cases.gemma import GEMMA_2
from cases.lm_head import exact_scores, first_maximum
from cases.rope_cache import rotate

BF16, F32, I32, I64 = torch.bfloat16, torch.float32, torch.int32, torch.int64
MODEL = GEMMA_2[1]
SEQUENCES, TOKENS = 136, 8192
ALL_TOKENS = SEQUENCES * TOKENS
WINDOW = 64  # so that few keys must be filled
FILLED = 256
Block = tuple[int, int, int]
_WITHOUT_RESERVE = 0x4000  # MAP_NORESERVE of Linux


@dataclass(frozen=True)
class Corner:
    """blocks: which of a grid run; `build` gives the outputs and the truth of these alone."""

    op: str
    name: str
    build: Callable[[], Call] = field(repr=False)
    blocks: Callable[[Block], list[Block]] = field(repr=False)

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"


def virtual(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Zeros that take memory when they are written to."""
    size = torch.Size(shape).numel() * dtype.itemsize
    room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _WITHOUT_RESERVE)
    return torch.frombuffer(room, dtype=dtype).view(shape)


def filled(tensor: Tensor, seed: int) -> Tensor:
    return tensor.copy_(Random(seed).normal(*tensor.shape, dtype=tensor.dtype))


def last(grid: Block) -> list[Block]:
    return [(grid[0] - 1, grid[1] - 1, grid[2] - 1)]


def _call(launch: Callable[[], object], outputs: dict[str, tuple[Tensor, Expected]]) -> Call:
    values = {name: tensor for name, (tensor, _) in outputs.items()}
    return Call(launch, values, lambda: {name: due for name, (_, due) in outputs.items()}, 0)


def _rmsnorm() -> Call:
    x, out = (virtual(ALL_TOKENS, MODEL.hidden_size) for _ in range(2))
    weight = Random(1).normal(MODEL.hidden_size)
    row, epsilon = filled(x[-1:], 2), rmsnorm_cases.EPSILON
    due = rmsnorm_cases.due(row, weight, BF16)
    return _call(lambda: rmsnorm(out, x, weight, epsilon), {"out": (out[-1:], due)})


def _rmsnorm_add_rmsnorm() -> Call:
    branch, residual, total, normed = (virtual(ALL_TOKENS, MODEL.hidden_size) for _ in range(4))
    weights = [Random(seed).normal(MODEL.hidden_size) for seed in (1, 2)]
    rows = filled(branch[-1:], 3), filled(residual[-1:], 4)
    epsilon = rmsnorm_cases.EPSILON
    dues = rmsnorm_add_rmsnorm_cases.due(*rows, *weights)
    return _call(
        lambda: rmsnorm_add_rmsnorm(total, normed, branch, residual, *weights, epsilon),
        {"total": (total[-1:], dues["total"]), "normed": (normed[-1:], dues["normed"])},
    )


def _geglu() -> Call:
    columns = MODEL.intermediate_size
    both, out = virtual(ALL_TOKENS, 2 * columns), virtual(ALL_TOKENS, columns)
    gate, up = both.split(columns, 1)
    end = slice(14 * 1024 - 1024, columns)  # the last program of a row
    due = geglu_cases.due(filled(gate[-1:, end], 1), filled(up[-1:, end], 2), False)
    return _call(lambda: geglu(out, gate, up, False), {"out": (out[-1:, end], due)})


class _Caches(NamedTuple):
    """Keys and values of all sequences, of which the last slots of the last head of the last sequence are filled."""

    keys: Tensor
    values: Tensor

    def seen(self) -> tuple[Tensor, Tensor]:
        return self.keys[-1, -1:, -FILLED:], self.values[-1, -1:, -FILLED:]


def _caches() -> _Caches:
    caches = _Caches(*(virtual(SEQUENCES, MODEL.key_value_heads, TOKENS, MODEL.head_dim) for _ in range(2)))
    for seed, states in enumerate(caches.seen(), 10):
        filled(states, seed)
    return caches


def _attention() -> Call:
    caches, group, rows = _caches(), MODEL.heads // MODEL.key_value_heads, 32  # the least tokens of a tile
    query, out = (virtual(ALL_TOKENS, MODEL.heads, MODEL.head_dim) for _ in range(2))
    filled(query[-128:], 1)
    scale, softcap = MODEL.query_pre_attn_scalar**-0.5, MODEL.softcap
    due = exact_attention(query[-rows:, -group:], *caches.seen(), scale, softcap, WINDOW, BF16)
    return _call(
        lambda: attention(
            out,
            query,
            *caches,
            torch.arange(SEQUENCES + 1, dtype=I32) * TOKENS,
            torch.full((SEQUENCES,), TOKENS, dtype=I32),
            max_seqlen_q=TOKENS,
            scale=scale,
            softcap=softcap,
            window=WINDOW,
        ),
        {"out": (out[-rows:, -group:], Expected(*due))},
    )


def _attention_decode() -> Call:
    caches, heads, kv, size = _caches(), MODEL.heads, MODEL.key_value_heads, MODEL.head_dim
    group, count = heads // kv, splits(TOKENS, kv)
    states = virtual(SEQUENCES, heads + 2 * kv, size)
    filled(states[-1], 1)
    angles, out = Random(2).normal(TOKENS, size, dtype=F32), virtual(SEQUENCES, heads, size)
    scale, softcap = MODEL.query_pre_attn_scalar**-0.5, MODEL.softcap
    query, new_key = (
        rotate(states[-1:, heads - group : heads], angles[-1:]),
        rotate(states[-1:, -kv - 1 : -kv], angles[-1:]),
    )
    keys, values = (tensor.clone() for tensor in caches.seen())
    keys[:, -1], values[:, -1] = new_key[:, 0], states[-1:, -1]
    due = exact_attention(query, keys, values, scale, softcap, WINDOW, BF16)
    partial, statistics = (
        virtual(SEQUENCES, kv, count, group, size, dtype=F32),
        virtual(SEQUENCES, kv, count, group, 2, dtype=F32),
    )
    return _call(
        lambda: attention_decode(
            out.flatten(1),
            partial,
            statistics,
            torch.zeros(SEQUENCES, kv, dtype=I32),
            states.flatten(1),
            *caches,
            torch.full((SEQUENCES,), TOKENS, dtype=I32),
            angles,
            heads=heads,
            scale=scale,
            softcap=softcap,
            window=WINDOW,
        ),
        {
            "out": (out[-1:, -group:], Expected(*due)),
            "keys": (caches.keys[-1, -1:, -1], Expected(keys[:, -1])),
            "values": (caches.values[-1, -1:, -1], Expected(values[:, -1])),
        },
    )


def _rope_cache() -> Call:
    caches, heads, kv, size = _caches(), MODEL.heads, MODEL.key_value_heads, MODEL.head_dim
    states, out = virtual(ALL_TOKENS, heads + 2 * kv, size), virtual(ALL_TOKENS, heads, size)
    filled(states[-1], 1)
    angles = Random(2).normal(TOKENS, size, dtype=F32)
    positions, sequences = virtual(ALL_TOKENS, dtype=I64), virtual(ALL_TOKENS, dtype=I64)
    positions[-1], sequences[-1] = TOKENS - 1, SEQUENCES - 1
    rotated = rotate(states[-1:, : heads + kv], angles[-1:])
    return _call(
        lambda: rope_cache(out, *states.split([heads, kv, kv], 1), angles, positions, sequences, *caches),
        {
            "out": (out[-1:], Expected(rotated[:, :heads])),
            "keys": (caches.keys[-1:, :, -1], Expected(rotated[:, heads:])),
            "values": (caches.values[-1:, :, -1], Expected(states[-1:, -kv:].clone())),
        },
    )


def _lm_head_argmax() -> Call:
    x, out = virtual(ALL_TOKENS, MODEL.hidden_size), virtual(ALL_TOKENS, dtype=I64)
    filled(x[-1:], 1)
    weight = Random(2).normal(130, MODEL.hidden_size, scale=15 * MODEL.hidden_size**-0.5)
    scores = Scores(x, weight, MODEL.final_softcap, False)
    due = first_maximum(*exact_scores(scores._replace(x=x[-1:])))
    return _call(lambda: lm_head.argmax(out, scores), {"out": (out[-1:], due)})


def _lm_head_tiles() -> Call:
    """The maximum and the sum of a tile of 32 ids, of a vocabulary so large that the weight has 2^31 elements too."""
    ids = 600_032
    x, weight = virtual(ALL_TOKENS, MODEL.hidden_size), virtual(ids, MODEL.hidden_size)
    seen = virtual(ALL_TOKENS, ids // 32, dtype=I32)
    row, own = filled(x[-1:], 1), weight[-32:]
    own.copy_(Random(2).normal(32, MODEL.hidden_size, scale=15 * MODEL.hidden_size**-0.5))
    seen[-1, -1] = 0x5A3C6699
    scores = Scores(x, weight, MODEL.final_softcap, False, numbers=draw_numbers(0.7, 1.3), seen=seen)
    maxima, sums = (virtual(ALL_TOKENS, scores.tiles, dtype=F32) for _ in range(2))
    values, error = exact_scores(scores._replace(x=row, weight=own, seen=seen[-1:, -1:]))
    largest, worst = values.amax(dim=1, keepdim=True), error.amax(dim=1, keepdim=True)
    mass = (values - largest).exp().sum(dim=1, keepdim=True)
    return _call(
        lambda: lm_head._launch(scores, maxima, sums=sums),
        {
            "maxima": (maxima[-1:, -1:], Expected(largest, worst)),
            "sums": (sums[-1:, -1:], Expected(mass, mass * (2 * worst + 2.0**-24 * (8 + 128)))),
        },
    )


def _lm_head_rows() -> Call:
    """The reduction of the tiles of a row alone: those of 256,000 ids are too many to compute here."""
    scores = Scores(virtual(ALL_TOKENS, 8), virtual(MODEL.vocabulary, 8), 0.0, False)
    maxima, best = (virtual(ALL_TOKENS, scores.tiles, dtype=dtype) for dtype in (F32, I32))
    out = virtual(ALL_TOKENS, dtype=I64)
    highest = filled(maxima[-1], 1).argmax()
    best[-1] = torch.arange(scores.tiles, dtype=I32) * scores.tile.ids
    due = Expected(highest[None] * scores.tile.ids)
    return _call(lambda: lm_head._launch_rows(scores, maxima, best, out), {"out": (out[-1:], due)})


def _linear() -> Call:
    rows = 2**31 // MODEL.hidden_size + 33
    x, weight, out = Random(1).normal(4, MODEL.hidden_size), virtual(rows, MODEL.hidden_size), virtual(4, rows)
    due = linear_cases.due(x, filled(weight[-1:], 2))
    return _call(lambda: linear(out, x, [weight]), {"out": (out[:, -1:], due)})


CORNERS = [
    Corner("rmsnorm", "the last row", _rmsnorm, last),
    Corner("rmsnorm_add_rmsnorm", "the last row", _rmsnorm_add_rmsnorm, last),
    Corner("geglu", "the end of the last row", _geglu, last),
    Corner("rope_cache", "the last token", _rope_cache, last),
    # The tiles of a sequence run from the last to the first.
    Corner("lm_head_logprob", "the tiles of the last row", _lm_head_rows, last),
    Corner("lm_head_sample", "the last tile of the last row", _lm_head_tiles, last),
    Corner("linear", "the last row of the weight", _linear, last),
    Corner("attention", "the last tile", _attention, lambda grid: [(grid[0] - 1, 0, grid[2] - 1)]),
    Corner("attention_decode", "the last split", _attention_decode, last),
    Corner(
        "lm_head_argmax", "the last row", _lm_head_argmax, lambda grid: [(grid[0] - 1, y, 0) for y in range(grid[1])]
    ),
]
