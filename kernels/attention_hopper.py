"""attention on sm_90 as FlashAttention 3 does it (Shah et al., arXiv 2407.08608), for heads of 128 and 256 in bfloat16.

A program has three partitions. Four warps copy tiles of keys and values to rings of two stages in shared memory, by
tensor maps (TMA). Two warpgroups have 64 rows of queries each; while the tensor cores add the values of one tile, a
warpgroup computes the softmax of the next. The formula, the order of the rows and the order of the sums are those of
`attention`; weights stay in registers.

A ring has two barriers a stage: `ready`, when a tile is complete, and `free`, when both warpgroups have read it. Copies
fill what lies behind the last slot of a cache with zeros. Slots that no row sees may hold NaN, and 0 * NaN is not 0: of
the values in the first and the last tile the copying warps replace these by zeros before they say that it is ready.

Needs Gluon as of Triton 3.9, which has no interpreter: the compiled code is executed in the emulator instead.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

NEVER = gl.constexpr(-1e30)
STAGES = gl.constexpr(2)
WARPGROUPS = gl.constexpr(2)
# Rows of queries of a warpgroup, which is also what one product takes.
ROWS = gl.constexpr(64)
# Rows of values whose unseen slots are replaced at a time; the copying warps have 24 registers a thread.
PIECE = gl.constexpr(8)
# Sixteen bytes a thread, a row of 256 bytes half a warp.
WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
# The most slots that one copy takes: a ring buffer has a multiple of so many.
RING_SLOTS = 64


@gluon.jit
def _logarithms(products, factor, ceiling, SOFTCAPPED: gl.constexpr):
    """As `logarithms` of attention.py; the reciprocal has an error of one unit in the last place."""
    result = products * factor
    if SOFTCAPPED:
        denominator = 1.0 + gl.exp2(result)
        reciprocal = gl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [denominator], dtype=gl.float32, is_pure=True, pack=1
        )
        result = ceiling - 2.0 * ceiling * reciprocal
    return result


@gluon.jit
def _copy(keys, values, key_ring, value_ring, barriers, loaded, head, slots, first, high):
    """Copy the tiles of keys and values from that of `first` to before `high`."""
    BLOCK_N: gl.constexpr = keys.block_shape[1]
    HEAD_DIM: gl.constexpr = keys.block_shape[2]
    tile_bytes: gl.constexpr = keys.block_type.nbytes
    key_ready, key_free, value_ready, value_free = barriers
    start = first // BLOCK_N * BLOCK_N
    partial = 0
    for number in range(gl.cdiv(high - start, BLOCK_N)):
        stage = number % STAGES
        # A barrier that was never used counts as in the phase after 1.
        phase = number // STAGES & 1 ^ 1
        begin = start + number * BLOCK_N
        place = [head, begin % slots, 0]
        mbarrier.wait(key_free.index(stage), phase)
        mbarrier.expect(key_ready.index(stage), tile_bytes)
        tma.async_load(keys, place, key_ready.index(stage), key_ring.index(stage))
        mbarrier.wait(value_free.index(stage), phase)
        if (begin >= first) & (begin + BLOCK_N <= high):
            mbarrier.expect(value_ready.index(stage), tile_bytes)
            tma.async_load(values, place, value_ready.index(stage), value_ring.index(stage))
        else:
            mbarrier.expect(loaded, tile_bytes)
            tma.async_load(values, place, loaded, value_ring.index(stage))
            mbarrier.wait(loaded, partial)
            partial ^= 1
            tile = value_ring.index(stage).reshape([BLOCK_N, HEAD_DIM])
            for piece in gl.static_range(BLOCK_N // PIECE):
                rows = tile.slice(piece * PIECE, PIECE, dim=0)
                position = begin + piece * PIECE + gl.arange(0, PIECE, gl.SliceLayout(1, WIDE))
                inside = ((position >= first) & (position < high))[:, None]
                rows.store(gl.where(inside, rows.load(WIDE), 0.0))
            fence_async_shared()
            mbarrier.arrive(value_ready.index(stage))


@gluon.jit
def _softmax(
    products,
    maximum,
    total,
    begin,
    bounds,
    position,
    column,
    factor,
    ceiling,
    SOFTCAPPED: gl.constexpr,
    WINDOWED: gl.constexpr,
):
    """The weights of a tile and what decays by them: (maximum, total, decay, weights)."""
    whole, diagonal, window = bounds
    logarithm = _logarithms(products, factor, ceiling, SOFTCAPPED)
    if (begin < whole) | (begin >= diagonal):
        key_position = begin + column
        visible = key_position[None, :] <= position[:, None]
        if WINDOWED:
            visible = visible & (key_position[None, :] > position[:, None] - window)
        logarithm = gl.where(visible, logarithm, NEVER)
    new_maximum = gl.maximum(maximum, gl.max(logarithm, axis=1))
    weights = gl.exp2(logarithm - new_maximum[:, None])
    decay = gl.exp2(maximum - new_maximum)
    return new_maximum, total * decay + gl.sum(weights, axis=1), decay, weights


@gluon.jit
def _rows(
    first_token, tokens, offset, HALF: gl.constexpr, HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr
):
    """Offsets of the elements of this warpgroup's rows from the first row of the tile, and which rows exist."""
    TOKENS: gl.constexpr = ROWS * WARPGROUPS // GROUP
    row = HALF * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, WIDE)) + offset
    present = (first_token + row // GROUP < tokens) & (row < TOKENS * GROUP)
    column = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, WIDE))[None, :]
    return (row // GROUP * HEADS + row % GROUP)[:, None] * HEAD_DIM + column, present[:, None]


@gluon.jit
def _attend(
    shared,
    HALF: gl.constexpr,
    SOFTCAPPED: gl.constexpr,
    WINDOWED: gl.constexpr,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
):
    """The rows of warpgroup HALF. shared: what both warpgroups get."""
    pointers, queries, key_ring, value_ring, barriers, lengths, window, factor, ceiling = shared
    BLOCK_N: gl.constexpr = key_ring.shape[2]
    HEAD_DIM: gl.constexpr = key_ring.shape[3]
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    query_ptr, out_ptr, start_ptr = pointers
    key_ready, key_free, value_ready, value_free = barriers
    start, first_token, tokens, length, first, high = lengths

    first_row = ((start + first_token).to(gl.int64) * HEADS + gl.program_id(0) * GROUP) * HEAD_DIM
    offsets, present = _rows(first_token, tokens, 0, HALF, HEADS, GROUP, HEAD_DIM)
    query = queries.index(HALF)
    query.store(gl.load(query_ptr + first_row + offsets, mask=present, other=0.0))
    fence_async_shared()
    gl.barrier()

    # All rows of the program see the keys from `whole` to before `diagonal`.
    low = length - tokens + first_token
    whole = gl.to_tensor(0)
    if WINDOWED:
        whole = gl.cdiv(gl.maximum(high - window, 0), BLOCK_N) * BLOCK_N
    bounds = (whole, (low + 1) // BLOCK_N * BLOCK_N, window)
    position = low + (HALF * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, scores))) // GROUP
    column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, scores))
    begin = first // BLOCK_N * BLOCK_N
    tiles = gl.cdiv(high - begin, BLOCK_N)

    maximum = gl.full([ROWS], NEVER, gl.float32, gl.SliceLayout(1, scores))
    total = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, scores))
    nothing = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, scores)
    weighted = gl.full([ROWS, HEAD_DIM], 0.0, gl.float32, sums)
    mbarrier.wait(key_ready.index(0), 0)
    key = key_ring.index(0).reshape([BLOCK_N, HEAD_DIM]).permute((1, 0))
    products = warpgroup_mma(query, key, nothing, use_acc=False, is_async=True)
    products = warpgroup_mma_wait(0, deps=[products])
    mbarrier.arrive(key_free.index(0))
    maximum, total, decay, weights = _softmax(
        products, maximum, total, begin, bounds, position, column, factor, ceiling, SOFTCAPPED, WINDOWED
    )
    weights = gl.convert_layout(weights.to(gl.bfloat16), operand)
    for number in range(1, tiles):
        stage = number % STAGES
        before = (number - 1) % STAGES
        begin += BLOCK_N
        mbarrier.wait(key_ready.index(stage), number // STAGES & 1)
        key = key_ring.index(stage).reshape([BLOCK_N, HEAD_DIM]).permute((1, 0))
        products = warpgroup_mma(query, key, nothing, use_acc=False, is_async=True)
        mbarrier.wait(value_ready.index(before), (number - 1) // STAGES & 1)
        value = value_ring.index(before).reshape([BLOCK_N, HEAD_DIM])
        adding = warpgroup_mma(weights, value, weighted, is_async=True)
        products = warpgroup_mma_wait(1, deps=[products])
        mbarrier.arrive(key_free.index(stage))
        maximum, total, decay, new_weights = _softmax(
            products, maximum, total, begin, bounds, position, column, factor, ceiling, SOFTCAPPED, WINDOWED
        )
        weighted = warpgroup_mma_wait(0, deps=[adding])
        mbarrier.arrive(value_free.index(before))
        weighted = weighted * gl.convert_layout(decay, gl.SliceLayout(1, sums))[:, None]
        weights = gl.convert_layout(new_weights.to(gl.bfloat16), operand)
    last = tiles - 1
    mbarrier.wait(value_ready.index(last % STAGES), last // STAGES & 1)
    value = value_ring.index(last % STAGES).reshape([BLOCK_N, HEAD_DIM])
    weighted = warpgroup_mma(weights, value, weighted, is_async=True)
    weighted = warpgroup_mma_wait(0, deps=[weighted])
    result = weighted / gl.convert_layout(total, gl.SliceLayout(1, sums))[:, None]
    query.store(result.to(gl.bfloat16))
    gl.barrier()
    # `moved` is zero, but read from memory, so that the compiler computes the rows again. Otherwise their addresses
    # stay in registers until the end of the loop, and those spill.
    moved = gl.load(start_ptr, volatile=True) - start
    offsets, present = _rows(first_token, tokens, moved, HALF, HEADS, GROUP, HEAD_DIM)
    gl.store(out_ptr + first_row + offsets, query.load(WIDE), mask=present)


@gluon.jit
def _attention_hopper_kernel(
    query_ptr,
    keys,
    values,
    cu_seqlens_q_ptr,
    seqlens_k_ptr,
    out_ptr,
    slots,
    window,
    factor,
    ceiling,
    SOFTCAPPED: gl.constexpr,
    WINDOWED: gl.constexpr,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
):
    HEAD_DIM: gl.constexpr = keys.block_shape[2]
    TOKENS: gl.constexpr = ROWS * WARPGROUPS // GROUP
    gdc_wait()
    gdc_launch_dependents()
    # As in `attention`: the last tokens see the most keys.
    tile = gl.num_programs(1) - 1 - gl.program_id(1)
    sequence = gl.program_id(2)
    start = gl.load(cu_seqlens_q_ptr + sequence)
    tokens = gl.load(cu_seqlens_q_ptr + sequence + 1) - start
    length = gl.load(seqlens_k_ptr + sequence)
    first_token = tile * TOKENS
    if first_token < tokens:
        first = gl.to_tensor(0)
        if WINDOWED:
            first = gl.maximum(length - tokens + first_token - window + 1, 0)
        high = length - tokens + gl.minimum(first_token + TOKENS, tokens)
        head = sequence * (HEADS // GROUP) + gl.program_id(0)

        queries = gl.allocate_shared_memory(
            gl.bfloat16,
            [WARPGROUPS, ROWS, HEAD_DIM],
            gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], gl.bfloat16),
        )
        key_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES] + keys.block_shape, keys.layout)
        value_ring = gl.allocate_shared_memory(gl.bfloat16, [STAGES] + values.block_shape, values.layout)
        key_ready = mbarrier.allocate_mbarrier(batch=STAGES)
        key_free = mbarrier.allocate_mbarrier(batch=STAGES)
        value_ready = mbarrier.allocate_mbarrier(batch=STAGES)
        value_free = mbarrier.allocate_mbarrier(batch=STAGES)
        loaded = mbarrier.allocate_mbarrier()
        for stage in gl.static_range(STAGES):
            mbarrier.init(key_ready.index(stage), count=1)
            mbarrier.init(value_ready.index(stage), count=1)
            mbarrier.init(key_free.index(stage), count=WARPGROUPS)
            mbarrier.init(value_free.index(stage), count=WARPGROUPS)
        mbarrier.init(loaded, count=1)
        fence_async_shared()
        barriers = (key_ready, key_free, value_ready, value_free)
        lengths = (start, first_token, tokens, length, first, high)
        pointers = (query_ptr, out_ptr, cu_seqlens_q_ptr + sequence)
        shared = (pointers, queries, key_ring, value_ring, barriers, lengths, window, factor, ceiling)
        gl.warp_specialize(
            [
                (_attend, (shared, 0, SOFTCAPPED, WINDOWED, HEADS, GROUP)),
                (_attend, (shared, 1, SOFTCAPPED, WINDOWED, HEADS, GROUP)),
                (_copy, (keys, values, key_ring, value_ring, barriers, loaded, head, slots, first, high)),
            ],
            # Of the 168 * 384 registers of a program, each thread that computes gets 240.
            [4, 4],
            [240, 24],
        )


def _map(cache: Tensor, block_n: int) -> TensorDescriptor:
    """How to copy `block_n` slots of a head at a time."""
    rows = cache.view(-1, *cache.shape[2:])
    block = [1, block_n, cache.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(block, gl.bfloat16)
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), block, layout)


def attention_hopper(
    out: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    factor: float,
    ceiling: float,
    window: int,
) -> None:
    """Fill out as `attention` does. factor, ceiling: `exponents` of its scale and softcap."""
    heads, head_dim = query.shape[1:]
    sequences, key_value_heads, slots, _ = key_cache.shape
    group = heads // key_value_heads
    # Heads of 128 have room for more keys, if no tile of so many runs past the end of a ring buffer.
    block_n = 128 if head_dim == 128 and slots % 128 == 0 else RING_SLOTS
    grid = key_value_heads, triton.cdiv(max_seqlen_q, ROWS.value * WARPGROUPS.value // group), sequences
    _attention_hopper_kernel[grid](
        query,
        _map(key_cache, block_n),
        _map(value_cache, block_n),
        cu_seqlens_q,
        seqlens_k,
        out,
        slots,
        window,
        factor,
        ceiling,
        SOFTCAPPED=ceiling > 0,
        WINDOWED=window > 0,
        HEADS=heads,
        GROUP=group,
        num_warps=4,
        num_stages=STAGES.value,
        enable_fp_fusion=False,
        launch_pdl=True,
    )
