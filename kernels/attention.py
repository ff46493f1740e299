"""attention: softmax(softcap(scale * q.k)) v over a cache of keys, for the last tokens of packed sequences.

Flash attention: a program loops over tiles of keys and keeps, for each row of queries, the maximum weight, the sum of
the weights and the weighted sum of the values in float32. A row is a token and a head. The query heads that share a
key-value head are next to each other in a tile, so that each tile of keys is read once for all of them and the diagonal
is as narrow as possible. Tiles of keys that no row sees are not read; only tiles that some row sees in part are masked.

Weights are powers of two: y = log2(e) * score, and under a softcap, with tanh x = 1 - 2 / (1 + e^2x),

    y = c - 2c / (1 + 2^(q.k * factor)),   c = log2(e) * softcap,   factor = 2 * log2(e) * scale / softcap

which is one exponential and one division. The absolute error of a small score is that of float32 at the cap, 50 *
2^-23; only the absolute error of a score matters to a softmax. Weights are rounded to the dtype of the values before
the product.

Must move queries and outputs once and each visible key and value once from memory; the programs of other queries read
the keys from the L2 cache.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dependent_launch
from .proxy import fence
from .target import TRITON, architecture, configuration

LOG2_E = tl.constexpr(math.log2(math.e))
# The logarithm of a weight of 0: below any other, but finite, because NEVER - NEVER must be 0.
NEVER = tl.constexpr(-1e30)
# A ring buffer has a multiple of so many slots, so that no tile of keys runs past its end, into the next head.
RING_SLOTS = tl.constexpr(64)


@triton.jit
def logarithms(products, factor, ceiling, SOFTCAPPED: tl.constexpr):
    """Logarithms to base 2 of the weights, before their maximum is subtracted. products: q.k in float32."""
    if SOFTCAPPED:
        result = ceiling - 2.0 * ceiling / (1.0 + tl.exp2(products * factor))
    else:
        result = products * factor
    return result


def exponents(scale: float, softcap: float) -> tuple[float, float]:
    """The arguments `factor` and `ceiling` of `logarithms`."""
    return (2 * LOG2_E.value * scale / softcap, LOG2_E.value * softcap) if softcap else (LOG2_E.value * scale, 0.0)


# A kernel for any number of slots, not one more for multiples of 16: caches grow.
@triton.jit(do_not_specialize=["slots"])
def _attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    cu_seqlens_q_ptr,
    seqlens_k_ptr,
    out_ptr,
    slots,
    window,
    factor,
    ceiling,
    SOFTCAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    dependent_launch.wait()
    tl.static_assert(RING_SLOTS % BLOCK_N == 0, "a tile of keys must not run past the end of a ring buffer")
    key_value_head = tl.program_id(0)
    # The last tokens see the most keys: their programs start first, and short programs fill the gaps at the end.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    sequence = tl.program_id(2)

    start = tl.load(cu_seqlens_q_ptr + sequence)
    tokens = tl.load(cu_seqlens_q_ptr + sequence + 1) - start
    length = tl.load(seqlens_k_ptr + sequence)
    first_token = tile * TOKENS
    if first_token >= tokens:
        return

    row = tl.arange(0, BLOCK_M)
    token = first_token + row // GROUP
    present = ((token < tokens) & (row < TOKENS * GROUP))[:, None]
    column = tl.arange(0, HEAD_DIM)[None, :]
    offsets = (row // GROUP * HEADS + row % GROUP)[:, None] * HEAD_DIM + column
    first_row = (start + first_token).to(tl.int64) * HEADS + key_value_head * GROUP
    query = tl.load(query_ptr + first_row * HEAD_DIM + offsets, mask=present, other=0.0)
    cache = (sequence * (HEADS // GROUP) + key_value_head).to(tl.int64) * slots * HEAD_DIM
    key_ptr += cache
    value_ptr += cache

    # The rows of the tile see keys from `first` to before `high`; all rows see those from `whole` to before `diagonal`.
    low = length - tokens + first_token
    high = length - tokens + tl.minimum(first_token + TOKENS, tokens)
    first = 0
    whole = 0
    diagonal = (low + 1) // BLOCK_N * BLOCK_N
    if WINDOWED:
        first = tl.maximum(low - window + 1, 0)
        whole = tl.cdiv(tl.maximum(high - window, 0), BLOCK_N) * BLOCK_N
    position = length - tokens + token

    maximum = tl.full((BLOCK_M,), NEVER, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M, HEAD_DIM), tl.float32)
    for begin in range(first // BLOCK_N * BLOCK_N, high, BLOCK_N):
        key_position = begin + tl.arange(0, BLOCK_N)
        # Slots that no row sees may hold any values, also NaN, and 0 * NaN is not 0.
        inside = ((key_position >= first) & (key_position < high))[:, None]
        # A ring buffer has whole tiles, so the slots of a tile are contiguous.
        cached = (begin % slots + tl.arange(0, BLOCK_N))[:, None] * HEAD_DIM + column
        key = tl.load(key_ptr + cached, mask=inside, other=0.0)
        fence()
        products = tl.dot(query, tl.trans(key), input_precision="ieee")
        logarithm = logarithms(products, factor, ceiling, SOFTCAPPED)
        if (begin < whole) | (begin >= diagonal):
            visible = key_position[None, :] <= position[:, None]
            if WINDOWED:
                visible = visible & (key_position[None, :] > position[:, None] - window)
            logarithm = tl.where(visible, logarithm, NEVER)
        new_maximum = tl.maximum(maximum, tl.max(logarithm, axis=1))
        weights = tl.exp2(logarithm - new_maximum[:, None])
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(weights, axis=1)
        value = tl.load(value_ptr + cached, mask=inside, other=0.0)
        fence()
        weighted = tl.dot(weights.to(value.dtype), value, weighted * decay[:, None], input_precision="ieee")
        maximum = new_maximum
    result = (weighted / total[:, None]).to(out_ptr.dtype.element_ty)
    # `moved` is zero, but read from memory, so that the compiler computes the rows again. Otherwise 16 offsets and more
    # stay in registers until the end of the loop, and large tiles spill: on sm_90 a tile of 128 by 64 some 20 words.
    moved = tl.load(cu_seqlens_q_ptr + sequence, volatile=True) - start
    row = tl.arange(0, BLOCK_M) + moved
    token = first_token + row // GROUP
    present = ((token < tokens) & (row < TOKENS * GROUP))[:, None]
    offsets = (row // GROUP * HEADS + row % GROUP)[:, None] * HEAD_DIM + column
    tl.store(out_ptr + first_row * HEAD_DIM + offsets, result, mask=present)


class Tile(NamedTuple):
    """The size of a tile: rows of queries, keys; and the warps and stages of a program."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# The comments give registers a thread and KB of shared memory, as compiled by Triton 3.9; nothing spills. A tile has at
# most RING_SLOTS keys. With two stages, the next keys are loaded when the previous are used up: for two programs on a
# multiprocessor, or where shared memory has no room for a third stage.
TILES = {
    256: {
        "sm_80": Tile(64, 32, 4, 2),  # 255, 70: two programs a multiprocessor. 128 by 64 fits once, 148 KB
        "sm_86": Tile(64, 32, 8, 2),  # 163, 70 of 99: 102.7 with three stages
        "sm_90": Tile(128, 32, 8, 3),  # 216, 164. 128 by 64 has room for two stages only, 248, 197
        "sm_100": Tile(128, 32, 8, 3),  # 250, 165
        "sm_120": Tile(64, 32, 8, 2),  # 156, 70 of 99
        "gfx942": Tile(64, 32, 4, 2),  # 283 of 512, 36 of 64
    },
    128: {
        "sm_80": Tile(64, 64, 4, 2),  # 168, 58: two programs
        "sm_86": Tile(128, 32, 8, 3),  # 172, 74 of 99
        "sm_90": Tile(128, 64, 8, 3),  # 167, 131
        "sm_100": Tile(128, 64, 8, 3),  # 221, 132
        "sm_120": Tile(128, 32, 8, 3),  # 162, 74 of 99
        "gfx942": Tile(128, 64, 8, 1),  # 225, 33 of 64
    },
}
# Without tensor cores: larger tiles spill with heads of 256, on sm_90 32 by 32 some 8,800 words.
FLOAT32 = Tile(16, 16, 4, 1)


def _tile(states: Tensor, head_dim: int) -> Tile:
    if states.dtype == torch.float32:
        return FLOAT32
    return configuration(TILES[128 if head_dim <= 128 else 256], states.device)


def _is_specialised(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> bool:
    """Whether the kernel of attention_hopper.py can run: it is for sm_90, in Gluon as of Triton 3.9."""
    return (
        not triton.knobs.runtime.interpret
        and query.dtype == torch.bfloat16
        and query.shape[2] in (128, 256)
        and architecture(query.device) == "sm_90"
        and TRITON >= (3, 9)
        # A tensor map starts at a multiple of 16 bytes.
        and (key_cache.data_ptr() | value_cache.data_ptr()) % 16 == 0
    )


def attention(
    out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    scale: float,
    softcap: float,
    window: int,
) -> None:
    """Fill out [T, H, Dh], as defined by the op of this name; all tensors are contiguous."""
    heads, head_dim = query.shape[1:]
    sequences, key_value_heads, slots, _ = key_cache.shape
    group = heads // key_value_heads
    tile = _tile(query, head_dim)
    tokens = tile.block_m // group
    factor, ceiling = exponents(scale, softcap)
    if _is_specialised(query, key_cache, value_cache):
        from .attention_hopper import attention_hopper

        attention_hopper(
            out,
            query,
            key_cache,
            value_cache,
            cu_seqlens_q,
            seqlens_k,
            max_seqlen_q=max_seqlen_q,
            factor=factor,
            ceiling=ceiling,
            window=window,
        )
        return
    _attention_kernel[(key_value_heads, triton.cdiv(max_seqlen_q, tokens), sequences)](
        query,
        key_cache,
        value_cache,
        cu_seqlens_q,
        seqlens_k,
        out,
        slots,
        window,
        factor,
        ceiling,
        SOFTCAPPED=softcap > 0,
        WINDOWED=window > 0,
        HEADS=heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        TOKENS=tokens,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
        **dependent_launch.options(query.device),
    )
