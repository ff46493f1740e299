"""attention_decode: one token of each sequence: rotate, append to the cache, attend, in one launch.

The slots of a cache are cut into splits of a fixed size. A program computes a split for all query heads that share a
key-value head, so that a key is read once. It loops over slots, not over positions: slot s holds the last position p <
length with p % S = s, so a ring buffer needs no special case, nor does a sequence that starts in another slot than 0.
The program of the split that has the slot of the new token takes its key and value from registers and starts its
softmax with them; no program reads a slot that another program writes.

Every program stores the maximum weight, the sum of its weights and the weighted sum of the values, in float32. A
counter tells the last program of a head, which combines them in the order of the splits and clears the counter. Thus
the bits of a sequence depend on its keys and on the shape of its cache, not on the batch, and a CUDA graph of the
launch stays valid while sequences grow: programs of splits without visible keys end at once.

Products are matrix products; the few heads of a group are padded to the 16 rows of an instruction. Keys then go from
memory to shared memory without passing registers, more than one tile of them in flight. Weights are powers of two, see
attention.py; they are rounded to the dtype of the values before the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import dependent_launch
from .attention import NEVER, exponents, logarithms
from .rope_cache import rotated
from .target import configuration, enough_registers


@triton.jit
def _rotated(head_ptr, rows, present, cos_sin_ptr, HEAD_DIM: tl.constexpr):
    """Rows of `HEAD_DIM` elements, rotated by a row of cos_sin and rounded to their dtype; 0 where not present."""
    HALF: tl.constexpr = HEAD_DIM // 2
    DTYPE: tl.constexpr = cos_sin_ptr.dtype.element_ty
    column = tl.arange(0, HALF)[None, :]
    cosine = tl.load(cos_sin_ptr + column).to(tl.float32)
    sine = tl.load(cos_sin_ptr + HALF + column).to(tl.float32)
    pointers = head_ptr + rows[:, None] * HEAD_DIM + column
    first = tl.load(pointers, mask=present[:, None], other=0.0).to(tl.float32)
    second = tl.load(pointers + HALF, mask=present[:, None], other=0.0).to(tl.float32)
    new_first, new_second = rotated(first, second, cosine, sine, DTYPE)
    both = tl.permute(tl.join(new_first, new_second), (0, 2, 1))
    return tl.reshape(both, (rows.shape[0], HEAD_DIM)).to(head_ptr.dtype.element_ty)


@triton.jit
def _is_active(split, first_split, active, splits):
    """Active splits follow one another from the first, wrapping around the end of the cache."""
    return (split < splits) & ((split - first_split + splits) % splits < active)


@triton.jit
def _combine(
    out_ptr,
    partial_ptr,
    statistics_ptr,
    first_split,
    active,
    splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The output of one key-value head, from its active splits, CHUNK of them at a time.

    The number of splits is no constant of the kernel: a cache that grows would compile it again. `.cg` reads from the
    L2 cache, which programs share.
    """
    column = tl.arange(0, HEAD_DIM)
    lane = tl.arange(0, CHUNK)
    for member in tl.static_range(GROUP):
        maxima = tl.full((CHUNK,), NEVER, tl.float32)
        for start in range(0, splits, CHUNK):
            split = start + lane
            inside = _is_active(split, first_split, active, splits)
            statistics = statistics_ptr + (split * GROUP + member) * 2
            maxima = tl.maximum(maxima, tl.load(statistics, mask=inside, other=NEVER, cache_modifier=".cg"))
        maximum = tl.max(maxima, axis=0)
        totals = tl.zeros((CHUNK,), tl.float32)
        weighted = tl.zeros((CHUNK, HEAD_DIM), tl.float32)
        for start in range(0, splits, CHUNK):
            split = start + lane
            inside = _is_active(split, first_split, active, splits)
            row = split * GROUP + member
            decay = tl.exp2(tl.load(statistics_ptr + row * 2, mask=inside, other=NEVER, cache_modifier=".cg") - maximum)
            total = tl.load(statistics_ptr + row * 2 + 1, mask=inside, other=0.0, cache_modifier=".cg")
            offsets = row[:, None] * HEAD_DIM + column[None, :]
            partial = tl.load(partial_ptr + offsets, mask=inside[:, None], other=0.0, cache_modifier=".cg")
            totals += total * decay
            weighted += partial * decay[:, None]
        result = tl.sum(weighted, axis=0) / tl.sum(totals, axis=0)
        tl.store(out_ptr + member * HEAD_DIM + column, result.to(out_ptr.dtype.element_ty))


# A kernel for any number of slots, not one more for multiples of 16: caches grow.
@triton.jit(do_not_specialize=["slots"])
def _attention_decode_kernel(
    qkv_ptr,
    cos_sin_ptr,
    seqlens_k_ptr,
    first_slots_ptr,
    key_ptr,
    value_ptr,
    counters_ptr,
    partial_ptr,
    statistics_ptr,
    out_ptr,
    slots,
    window,
    factor,
    ceiling,
    SOFTCAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    WAITS_FOR_STORES: tl.constexpr,
):
    dependent_launch.wait()
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    key_value_head = tl.program_id(1)
    key_value_heads = tl.num_programs(1)
    sequence = tl.program_id(2).to(tl.int64)
    head = sequence * key_value_heads + key_value_head
    column = tl.arange(0, HEAD_DIM)[None, :]
    row = tl.arange(0, ROWS)
    out_ptr += head * GROUP * HEAD_DIM

    length = tl.load(seqlens_k_ptr + sequence)
    if length == 0:
        if split == 0:
            nothing = tl.zeros((ROWS, HEAD_DIM), out_ptr.dtype.element_ty)
            tl.store(out_ptr + row[:, None] * HEAD_DIM + column, nothing, mask=(row < GROUP)[:, None])
        return

    # Visible positions are in the slots from that of `first` on, which may wrap around the end of the cache.
    new = length - 1
    first = 0
    if WINDOWED:
        first = tl.maximum(length - window, 0)
    offset = 0
    if first_slots_ptr is not None:
        offset = tl.load(first_slots_ptr + sequence)
    new_slot = (offset + new) % slots
    first_slot = (offset + first) % slots
    first_split = first_slot // KEYS
    last_split = new_slot // KEYS
    active = last_split - first_split + 1
    if first_slot > new_slot:
        active = tl.minimum(active + splits, splits)
    if not _is_active(split, first_split, active, splits):
        return

    heads = key_value_heads * GROUP
    qkv_ptr += sequence * (heads + 2 * key_value_heads) * HEAD_DIM
    cos_sin_ptr += new.to(tl.int64) * HEAD_DIM
    key_ptr += head * slots * HEAD_DIM
    value_ptr += head * slots * HEAD_DIM

    member = tl.arange(0, MEMBERS)
    query = _rotated(qkv_ptr + key_value_head * GROUP * HEAD_DIM, member, member < GROUP, cos_sin_ptr, HEAD_DIM)
    one = tl.arange(0, 1)
    present = split + one == last_split
    new_key = _rotated(qkv_ptr + (heads + key_value_head) * HEAD_DIM, one, present, cos_sin_ptr, HEAD_DIM)
    new_value = tl.load(
        qkv_ptr + (heads + key_value_heads + key_value_head) * HEAD_DIM + column, mask=present[:, None], other=0.0
    )
    tl.store(key_ptr + new_slot * HEAD_DIM + column, new_key, mask=present[:, None])
    tl.store(value_ptr + new_slot * HEAD_DIM + column, new_value, mask=present[:, None])

    product = tl.sum(query.to(tl.float32) * new_key.to(tl.float32), axis=1)
    # In splits that do not have its slot, the weight of the new token becomes 0 at the first visible key.
    own = tl.where(split == last_split, logarithms(product, factor, ceiling, SOFTCAPPED), NEVER)
    # The rows of a matrix instruction: the members of the group, repeated.
    query = tl.reshape(tl.broadcast_to(query[None], (ROWS // MEMBERS, MEMBERS, HEAD_DIM)), (ROWS, HEAD_DIM))
    maximum = tl.reshape(tl.broadcast_to(own[None], (ROWS // MEMBERS, MEMBERS)), (ROWS,))
    total = tl.full((ROWS,), 1.0, tl.float32)
    weighted = tl.broadcast_to(new_value.to(tl.float32), (ROWS, HEAD_DIM))
    for start in range(split * KEYS, tl.minimum((split + 1) * KEYS, slots), BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        # Tokens since the slot was written; 0 is the new token, which is included already.
        age = new_slot - slot
        age = tl.where(age < 0, age + slots, age)
        visible = (slot < slots) & (age > 0) & (age <= new - first)
        offsets = slot[:, None] * HEAD_DIM + column
        key = tl.load(key_ptr + offsets, mask=visible[:, None], other=0.0)
        value = tl.load(value_ptr + offsets, mask=visible[:, None], other=0.0)
        products = tl.dot(query, tl.trans(key), input_precision="ieee")
        logarithm = tl.where(visible[None, :], logarithms(products, factor, ceiling, SOFTCAPPED), NEVER)
        new_maximum = tl.maximum(maximum, tl.max(logarithm, axis=1))
        # Before the first visible key, weights of hidden keys are 1; its decay, which is 0, removes them.
        weights = tl.exp2(logarithm - new_maximum[:, None])
        decay = tl.exp2(maximum - new_maximum)
        total = total * decay + tl.sum(weights, axis=1)
        weighted = tl.dot(weights.to(value.dtype), value, weighted * decay[:, None], input_precision="ieee")
        maximum = new_maximum

    partial_ptr += head * splits * GROUP * HEAD_DIM
    statistics_ptr += head * splits * GROUP * 2
    rows = split * GROUP + row
    tl.store(partial_ptr + rows[:, None] * HEAD_DIM + column, weighted, mask=(row < GROUP)[:, None])
    tl.store(statistics_ptr + rows * 2, maximum, mask=row < GROUP)
    tl.store(statistics_ptr + rows * 2 + 1, total, mask=row < GROUP)
    # All threads of a program must have stored before one of them increments the counter. AMD's barrier does not wait
    # for stores to global memory, and the thread that counts waits for those of its own wave only.
    if WAITS_FOR_STORES:
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1", "=v,v,~{memory}", [row], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()
    if tl.atomic_add(counters_ptr + head, 1, sem="acq_rel") == active - 1:
        _combine(
            out_ptr,
            partial_ptr,
            statistics_ptr,
            first_split,
            active,
            splits,
            GROUP,
            HEAD_DIM,
            CHUNK,
        )
        tl.store(counters_ptr + head, 0)


class Tile(NamedTuple):
    """The keys of a tile; the warps and stages of a program."""

    block_n: int
    warps: int
    stages: int


# By the size of a head, so that with three stages 64 KB of keys and values are in flight in each program; 25 KB a
# multiprocessor would suffice for the 3.35 TB/s of an H100 at a latency of 1 us. As compiled by Triton 3.9: at most 168
# registers, no spills and 68 KB of shared memory, so one program a multiprocessor on sm_86, sm_89 and sm_120, two or
# three on the others.
TILES = {
    256: {"sm_80": Tile(32, 4, 3), "gfx942": Tile(32, 4, 2)},
    128: {"sm_80": Tile(64, 4, 3), "gfx942": Tile(32, 4, 2)},
}
# Splits that are combined at a time.
CHUNK = 8
# Without tensor cores: 32 keys spill 900 words with heads of 256.
FLOAT32 = Tile(16, 4, 1)


def _tile(states: Tensor, head_dim: int) -> Tile:
    if states.dtype == torch.float32:
        return FLOAT32
    return configuration(TILES[128 if head_dim <= 128 else 256], states.device)


def keys_per_split(key_value_heads: int) -> int:
    """The size of a split: small for few heads, so that 4096 keys of one sequence occupy 128 programs or more."""
    return 128 if key_value_heads <= 4 else 256


def splits(slots: int, key_value_heads: int) -> int:
    """The count of splits of a cache."""
    return -(-slots // keys_per_split(key_value_heads))


# Counters by cache: a captured CUDA graph keeps their address.
_counters = WeakTensorKeyDictionary()


def scratch(key_cache: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors by which the programs of a launch communicate, for key_cache [B, Hkv, S, Dh] and H = heads.

    Returns:
        partial: [B, Hkv, splits, H / Hkv, Dh] float32, weighted sums of values.
        statistics: [B, Hkv, splits, H / Hkv, 2] float32, maxima and sums of weights.
        counters: [B, Hkv] int32 zeros, the splits that are done. Two launches at a time may not share a cache. Every
            launch leaves zeros, for the next replay of a CUDA graph; one that was interrupted may not, so that they are
            cleared before every launch outside of a capture. A graph begins with `clear_counters`.
    """
    sequences, key_value_heads, slots, head_dim = key_cache.shape
    shape = (sequences, key_value_heads, splits(slots, key_value_heads), heads // key_value_heads)
    partial = torch.empty(*shape, head_dim, dtype=torch.float32, device=key_cache.device)
    statistics = torch.empty(*shape, 2, dtype=torch.float32, device=key_cache.device)
    counters = _counters.get(key_cache)
    capturing = key_cache.is_cuda and torch.cuda.is_current_stream_capturing()
    if counters is None:
        with torch.inference_mode(False):  # calls outside of that mode use them too
            counters = torch.zeros(sequences, key_value_heads, dtype=torch.int32, device=key_cache.device)
        # In a capture, filling with zeros becomes a part of the graph, so that only its replays may use the tensor.
        if not capturing:
            _counters[key_cache] = counters
    elif not capturing:
        counters.zero_()
    return partial, statistics, counters


def clear_counters(key_caches: Sequence[Tensor]) -> None:
    """Clear the counters of caches that have some: one operation for all layers of a step, at the start of a graph."""
    if known := [counters for cache in key_caches if (counters := _counters.get(cache)) is not None]:
        torch._foreach_zero_(known)


def attention_decode(
    out: Tensor,
    partial: Tensor,
    statistics: Tensor,
    counters: Tensor,
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    seqlens_k: Tensor,
    cos_sin: Tensor,
    first_slots: Tensor | None = None,
    *,
    heads: int,
    scale: float,
    softcap: float,
    window: int,
) -> None:
    """Fill out [B, H * Dh] and the slots of the new tokens, as defined by the op of this name; all contiguous.

    partial, statistics, counters: of `scratch`.
    """
    sequences, key_value_heads, slots, head_dim = key_cache.shape
    group = heads // key_value_heads
    count = splits(slots, key_value_heads)
    tile = _tile(qkv, head_dim)
    factor, ceiling = exponents(scale, softcap)
    _attention_decode_kernel[(count, key_value_heads, sequences)](
        qkv,
        cos_sin,
        seqlens_k,
        first_slots,
        key_cache,
        value_cache,
        counters,
        partial,
        statistics,
        out,
        slots,
        window,
        factor,
        ceiling,
        SOFTCAPPED=softcap > 0,
        WINDOWED=window > 0,
        GROUP=group,
        MEMBERS=triton.next_power_of_2(group),
        ROWS=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        KEYS=keys_per_split(key_value_heads),
        BLOCK_N=tile.block_n,
        CHUNK=CHUNK,
        WAITS_FOR_STORES=configuration({"sm_80": False, "gfx942": True}, qkv.device),
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=False,
        **dependent_launch.options(qkv.device),
        # Larger heads would lose a program on a multiprocessor, and do not spill.
        **(enough_registers(qkv.device) if head_dim < 64 else {}),
    )
