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
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
from types import ModuleType

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


@dataclass(frozen=True)
class _Call:
    """Arguments of `attention`, on the host where the packages need them.

    Attributes:
        lengths: of the keys of each sequence.
        size: the slots of a page.
        tables: the pages of each sequence.
    """

    query: Tensor
    key_cache: Tensor
    cu_seqlens_q: Tensor
    max_seqlen_q: int
    scale: float
    softcap: float
    window: int
    lengths: list[int]
    size: int
    tables: list[list[int]]


def plan(
    backend: str,
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
    """What `attention` does with arguments of these shapes and lengths, by the package `backend`.

    Raises:
        ArcmergeError: for arguments that break the contract of `attention`, or that the package does not take.
    """
    package = import_module(backend)
    require_dtype((torch.bfloat16,), query=query)
    require(not stepwise, "stepwise", f"be False with {backend}", stepwise)
    page_size, planned = PACKAGES[backend]
    size = page_size(query, key_cache)
    lengths: list[int] = seqlens_k.tolist()
    check_lengths(len(query), key_cache.shape[2], cu_seqlens_q.tolist(), lengths, max_seqlen_q, window)
    if not query.numel():
        return lambda query, *_: torch.empty_like(query)
    tables = _pages(key_cache, lengths, size)
    call = _Call(query, key_cache, cu_seqlens_q, max_seqlen_q, scale, softcap, window, lengths, size, tables)
    return planned(package, call)


def _flash_attn_page_size(query: Tensor, key_cache: Tensor) -> int:
    slots, size = key_cache.shape[2], FLASH_ATTN_PAGE
    require(slots % size == 0, "key_cache", f"have a multiple of {size} slots with flash_attn", slots)
    return size


def _plan_flash_attn(package: ModuleType, call: _Call) -> Run:
    columns = max(map(len, call.tables))
    table = _int32([pages + [0] * (columns - len(pages)) for pages in call.tables], call.query)
    cu_seqlens_k = _int32([0, *accumulate(call.lengths)], call.query)

    def run(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> Tensor:
        key, value = (_paged(cache, call.size).transpose(1, 2) for cache in (key_cache, value_cache))
        out: Tensor = package.flash_attn_varlen_func(
            query,
            key,
            value,
            call.cu_seqlens_q,
            cu_seqlens_k,
            call.max_seqlen_q,
            max(call.lengths),
            softmax_scale=call.scale,
            causal=True,
            window_size=(call.window - 1, 0),
            softcap=call.softcap,
            block_table=table,
        )
        return out

    return run


def _flashinfer_page_size(query: Tensor, key_cache: Tensor) -> int:
    head_dim, dims = query.shape[2], ", ".join(map(str, FLASHINFER_HEAD_DIMS))
    require(head_dim in FLASHINFER_HEAD_DIMS, "query", f"have heads of {dims} elements with flashinfer", head_dim)
    return math.gcd(key_cache.shape[2], RING_SLOTS)


def _plan_flashinfer(package: ModuleType, call: _Call) -> Run:
    (_, heads, head_dim), key_value_heads = call.query.shape, call.key_cache.shape[1]
    workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=call.query.device)
    wrapper = package.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
    wrapper.plan(
        call.cu_seqlens_q,
        _int32([0, *accumulate(map(len, call.tables))], call.query),
        _int32([page for table in call.tables for page in table], call.query),
        _int32([(length - 1) % call.size + 1 for length in call.lengths], call.query),
        heads,
        key_value_heads,
        head_dim,
        call.size,
        causal=True,
        sm_scale=call.scale,
        window_left=call.window - 1,
        logits_soft_cap=call.softcap,
        q_data_type=call.query.dtype,
        kv_data_type=call.key_cache.dtype,
    )

    def run(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> Tensor:
        out: Tensor = wrapper.run(query, (_paged(key_cache, call.size), _paged(value_cache, call.size)))
        return out

    return run


# The slots of a page, after a check of what the package takes; and its plan.
PACKAGES: dict[str, tuple[Callable[[Tensor, Tensor], int], Callable[[ModuleType, _Call], Run]]] = {
    "flash_attn": (_flash_attn_page_size, _plan_flash_attn),
    "flashinfer": (_flashinfer_page_size, _plan_flashinfer),
}


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
