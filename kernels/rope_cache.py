"""rope_cache: (x1, x2) -> (x1*cos - x2*sin, x2*cos + x1*sin) for the halves of every query and key head.

Rotated keys and values are stored in slot position % slots of the cache. Float32; products are rounded to the dtype of
cos_sin, which rounds nothing if it is float32, and sums to that of the states. Reads query, key and value and writes as
many bytes, once, and reads the rows of cos_sin. One program a token, with all its heads.

FMA is off, so that the results have the bits of the reference.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import dependent_launch
from .target import configuration

# Elements of the first halves of keys that a warp loads at a time: 8 a thread, 16 bytes of bf16. More warps would have
# narrower loads. The keys of Gemma-2 have 2 warps for 2.6B and 4 for 9B and 27B, of 32 lanes.
ELEMENTS_OF_A_WARP = {"sm_80": 8 * 32, "gfx942": 8 * 64}


@triton.jit
def _halves(heads_ptr, within, HALF: tl.constexpr):
    return tl.load(heads_ptr, mask=within), tl.load(heads_ptr + HALF, mask=within)


@triton.jit
def _store_halves(heads_ptr, first, second, within, HALF: tl.constexpr):
    tl.store(heads_ptr, first, mask=within)
    tl.store(heads_ptr + HALF, second, mask=within)


@triton.jit
def rotated(first, second, cosine, sine, ROUNDED: tl.constexpr):
    """Float32 halves of heads, rotated by an angle; products are rounded to the dtype ROUNDED."""
    first_cosine = (first * cosine).to(ROUNDED).to(tl.float32)
    second_sine = (second * sine).to(ROUNDED).to(tl.float32)
    second_cosine = (second * cosine).to(ROUNDED).to(tl.float32)
    first_sine = (first * sine).to(ROUNDED).to(tl.float32)
    return first_cosine - second_sine, second_cosine + first_sine


@triton.jit
def _rotate(first, second, angles_ptr, real, HALF: tl.constexpr, ROUNDED: tl.constexpr):
    """Halves of heads, rotated by the row of cos_sin at angles_ptr; products are rounded to the dtype ROUNDED."""
    # Loaded once for every head, from L1, in the layout of the heads: a single row would have a layout of its own, and
    # the heads would be converted to it and back through shared memory.
    angles_ptr, real = tl.broadcast_to(angles_ptr, first.shape), tl.broadcast_to(real, first.shape)
    cosine = tl.load(angles_ptr, mask=real, other=0.0).to(tl.float32)
    sine = tl.load(angles_ptr + HALF, mask=real, other=0.0).to(tl.float32)
    return rotated(first.to(tl.float32), second.to(tl.float32), cosine, sine, ROUNDED)


@triton.jit
def _rope_cache_kernel(
    out_ptr,
    query_ptr,
    key_ptr,
    value_ptr,
    cos_sin_ptr,
    positions_ptr,
    sequences_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slots,
    stride_query,
    stride_key,
    stride_value,
    HEADS: tl.constexpr,
    KEY_VALUE_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KEY_VALUE_HEADS: tl.constexpr,
):
    HALF: tl.constexpr = HEAD_DIM // 2
    ROUNDED: tl.constexpr = cos_sin_ptr.dtype.element_ty
    dependent_launch.wait()
    token = tl.program_id(0).to(tl.int64)
    position = tl.load(positions_ptr + token)
    sequence = tl.load(sequences_ptr + token)
    column = tl.arange(0, HALF)[None, :]
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    within = head < HEADS
    cached_head = tl.arange(0, BLOCK_KEY_VALUE_HEADS)[:, None]
    cached = cached_head < KEY_VALUE_HEADS
    # All loads come before the first store, because the compiler cannot move a load across a store; those that do not
    # depend on the position come before it is known. So the program waits for memory twice.
    columns = cached_head * HEAD_DIM + column
    query_first, query_second = _halves(query_ptr + token * stride_query + head * HEAD_DIM + column, within, HALF)
    key_first, key_second = _halves(key_ptr + token * stride_key + columns, cached, HALF)
    value_first, value_second = _halves(value_ptr + token * stride_value + columns, cached, HALF)
    # A block, because the interpreter cannot use a scalar as a mask.
    real = tl.broadcast_to(position, (1, HALF)) >= 0
    angles_ptr = cos_sin_ptr + position * HEAD_DIM + column

    query_first, query_second = _rotate(query_first, query_second, angles_ptr, real, HALF, ROUNDED)
    key_first, key_second = _rotate(key_first, key_second, angles_ptr, real, HALF, ROUNDED)
    query_first, query_second = tl.where(real, query_first, 0.0), tl.where(real, query_second, 0.0)

    # A position fits into 32 bits, and a 64-bit remainder takes a long routine.
    slot = position.to(tl.int32) % slots
    cached_offsets = ((sequence * KEY_VALUE_HEADS + cached_head) * slots + slot) * HEAD_DIM + column
    _store_halves(out_ptr + (token * HEADS + head) * HEAD_DIM + column, query_first, query_second, within, HALF)
    _store_halves(key_cache_ptr + cached_offsets, key_first, key_second, cached & real, HALF)
    _store_halves(value_cache_ptr + cached_offsets, value_first, value_second, cached & real, HALF)


def rope_cache(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    sequences: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> None:
    """Fill out [T, H, Dh], contiguous, from query, and the slots of the caches from key and value.

    Args:
        query: [T, H, Dh], bf16 or f32, with contiguous rows at any distance; Dh is a power of two.
        key, value: [T, Hkv, Dh], as query.
        cos_sin: [P, Dh], bf16 or f32.
        positions, sequences: [T] int64.
        key_cache, value_cache: [B, Hkv, S, Dh], in the dtype of query.
    """
    tokens, heads, head_dim = query.shape
    key_value_heads, slots = key_cache.shape[1:3]
    block_key_value_heads = triton.next_power_of_2(key_value_heads)
    warps = block_key_value_heads * head_dim // 2 // configuration(ELEMENTS_OF_A_WARP, out.device)
    _rope_cache_kernel[(tokens,)](
        out,
        query,
        key,
        value,
        cos_sin,
        positions,
        sequences,
        key_cache,
        value_cache,
        slots,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        HEADS=heads,
        KEY_VALUE_HEADS=key_value_heads,
        HEAD_DIM=head_dim,
        BLOCK_HEADS=triton.next_power_of_2(heads),
        BLOCK_KEY_VALUE_HEADS=block_key_value_heads,
        num_warps=min(max(warps, 1), 4),
        enable_fp_fusion=False,
        **dependent_launch.options(out.device),
    )
