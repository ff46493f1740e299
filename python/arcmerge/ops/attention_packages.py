"""attention by the packages flash-attn and FlashInfer, from the caches as they are, without a copy.

Both read keys and values by tables of pages. P slots of one sequence, for all its heads, are a page: a view of a cache
[B, Hkv, S, Dh] has the shape [pages, Hkv, P, Dh] if page b * Hkv * S / P + j starts at slot j * P of sequence b. In a
ring buffer the pages of a sequence repeat, token p being in slot p % S.

Differences from the op: bfloat16 alone; the lengths are read on the host, which waits for the GPU; keys before the
window of every query must be finite, because the packages may multiply them by weights of 0.

Sources: flash_attn_varlen_func of flash-attn 2 (`window_size`: keys to the left and right of a query that it sees,
besides its own; causal masks end at the last key), and BatchPrefillWithPagedKVCacheWrapper of FlashInfer
(`window_left`: the same to the left); -1 is no bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module
from itertools import accumulate

import torch
from torch import Tensor

from arcmerge.dispatch.checks import require, require_dtype
from arcmerge.ops.attention import RING_SLOTS, check_lengths

# query, key_cache and value_cache of the plan's shapes -> [T, H, Dh]
Run = Callable[[Tensor, Tensor, Tensor], Tensor]

# flash-attn takes pages of a multiple of so many slots.
FLASH_ATTN_PAGE = 256
FLASHINFER_HEAD_DIMS = (64, 128, 256)
FLASHINFER_WORKSPACE_BYTES = 128 << 20


def plan_flash_attn(
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
    stepwise: bool = False,
) -> Run:
    """What `attention` does with arguments of these shapes and lengths, by flash-attn.

    Raises:
        ArcmergeError: for arguments that break the contract of `attention`, or that the package does not take.
    """
    package = import_module("flash_attn")
    _check(query, stepwise, "flash_attn")
    slots, size = key_cache.shape[2], FLASH_ATTN_PAGE
    require(slots % size == 0, "key_cache", f"have a multiple of {size} slots with flash_attn", slots)
    lengths = _lengths(query, key_cache, cu_seqlens_q, seqlens_k, max_seqlen_q, window)
    tables = _pages(key_cache, lengths, size)
    columns = max(map(len, tables), default=0)
    table = _int32([table + [0] * (columns - len(table)) for table in tables], query)
    cu_seqlens_k = _int32([0, *accumulate(lengths)], query)

    def run(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> Tensor:
        if not query.numel():
            return torch.empty_like(query)
        key, value = (_paged(cache, size).transpose(1, 2) for cache in (key_cache, value_cache))
        out: Tensor = package.flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max(lengths),
            softmax_scale=scale,
            causal=True,
            window_size=(window - 1, 0),
            softcap=softcap,
            block_table=table,
        )
        return out

    return run


def plan_flashinfer(
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
    stepwise: bool = False,
) -> Run:
    """As `plan_flash_attn`, by FlashInfer."""
    package = import_module("flashinfer")
    _check(query, stepwise, "flashinfer")
    (_, heads, head_dim), (_, key_value_heads, slots, _) = query.shape, key_cache.shape
    dims = ", ".join(map(str, FLASHINFER_HEAD_DIMS))
    require(head_dim in FLASHINFER_HEAD_DIMS, "query", f"have heads of {dims} elements with flashinfer", head_dim)
    lengths = _lengths(query, key_cache, cu_seqlens_q, seqlens_k, max_seqlen_q, window)
    size = math.gcd(slots, RING_SLOTS)
    tables = _pages(key_cache, lengths, size)
    workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=query.device)
    wrapper = package.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
    if query.numel():
        wrapper.plan(
            cu_seqlens_q,
            _int32([0, *accumulate(map(len, tables))], query),
            _int32([page for table in tables for page in table], query),
            _int32([(length - 1) % size + 1 for length in lengths], query),
            heads,
            key_value_heads,
            head_dim,
            size,
            causal=True,
            sm_scale=scale,
            window_left=window - 1,
            logits_soft_cap=softcap,
            q_data_type=query.dtype,
            kv_data_type=key_cache.dtype,
        )

    def run(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> Tensor:
        if not query.numel():
            return torch.empty_like(query)
        out: Tensor = wrapper.run(query, (_paged(key_cache, size), _paged(value_cache, size)))
        return out

    return run


PLANS: dict[str, Callable[..., Run]] = {"flash_attn": plan_flash_attn, "flashinfer": plan_flashinfer}


def _check(query: Tensor, stepwise: bool, backend: str) -> None:
    require_dtype((torch.bfloat16,), query=query)
    require(not stepwise, "stepwise", f"be False with {backend}", stepwise)


def _lengths(
    query: Tensor, key_cache: Tensor, cu_seqlens_q: Tensor, seqlens_k: Tensor, max_seqlen_q: int, window: int
) -> list[int]:
    lengths: list[int] = seqlens_k.tolist()
    check_lengths(len(query), key_cache.shape[2], cu_seqlens_q.tolist(), lengths, max_seqlen_q, window)
    return lengths


def _pages(cache: Tensor, lengths: list[int], size: int) -> list[list[int]]:
    """The pages of each sequence's tokens, in order."""
    heads, pages = cache.shape[1], cache.shape[2] // size
    return [
        [sequence * heads * pages + page % pages for page in range(-(-length // size))]
        for sequence, length in enumerate(lengths)
    ]


def _paged(cache: Tensor, size: int) -> Tensor:
    """The view [pages, Hkv, size, Dh] of a cache [B, Hkv, S, Dh]."""
    sequences, heads, slots, head_dim = cache.shape
    pages = ((sequences - 1) * heads + 1) * (slots // size)
    return cache.as_strided((pages, heads, size, head_dim), (size * head_dim, slots * head_dim, head_dim, 1))


def _int32(values: list[int] | list[list[int]], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).to(like.device)
