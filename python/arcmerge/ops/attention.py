"""attention: the last tokens of packed sequences attend to the keys in a cache."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.checks import (
    require,
    require_caches,
    require_heads,
    require_lengths,
    require_limits,
    require_slots,
    shapes,
)
from arcmerge.dispatch.native import native_cache
from arcmerge.dispatch.registry import op

# A ring buffer has a multiple of so many slots, a multiple of every tile of keys.
RING_SLOTS = 64
# Queries that the reference takes at a time: its scores are [H, 256, visible keys].
CHUNK = 256


@op(stepwise_by_reference=("native", "triton"))
def attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    stepwise: bool = False,
) -> Tensor:
    """softmax(softcap * tanh(scale * q.k / softcap)) v, for every query and head.

    The query at position i sees the keys at j <= i, with a window those at i - window < j <= i. Position p is in slot
    p % S of the cache; head h of the queries reads head h // (H / Hkv) of the keys. The cache must hold all keys that
    are seen: S >= the longest sequence, or S a multiple of 64 and at least window + max_seqlen_q - 1. Slots that no
    query sees may hold any values, also NaN.

    Scores, softmax and sums are float32; weights are rounded to the dtype of the values before their product; the
    result is rounded once. Must move queries and result once and each visible key and value once.

    Args:
        query: [T, H, Dh], rotated, bfloat16 or float32: B sequences one after another. Dh is 16, 32, 64, 128 or 256.
        key_cache, value_cache: [B, Hkv, S, Dh], in the dtype of query. All tensors are contiguous and on one device.
        cu_seqlens_q: [B + 1] int32. Sequence b has the queries from cu_seqlens_q[b] to cu_seqlens_q[b + 1], n of them,
            possibly none.
        seqlens_k: [B] int32, the tokens of each sequence, with the n new ones: its query i is at position
            seqlens_k[b] - n + i.
        max_seqlen_q: the largest n.
        scale: factor of the scores.
        softcap: bound of the scores; 0 for none.
        window: keys that a query sees; 0 for all.
        stepwise: round scores, each step of the softcap and the softmax to the dtype of query, as
            `eager_attention_forward` of transformers' Gemma-2 does. The reference computes it on all devices.

    Returns:
        [T, H, Dh] in the dtype of query.

    Raises:
        ArcmergeError: for arguments that break these rules. Lengths are only checked on the CPU, because reading them
            from a GPU would wait for it.
    """
    out = torch.empty_like(query)
    slots, starts = key_cache.shape[2], cu_seqlens_q.tolist()
    for sequence, length in enumerate(seqlens_k.tolist()):
        start, end = starts[sequence : sequence + 2]
        for first in range(start, end, CHUNK):
            rows = torch.arange(first, min(first + CHUNK, end), device=query.device)
            query_positions = length - end + rows
            lowest = length - end + first - window + 1 if window else 0
            keys = torch.arange(max(lowest, 0), length - end + first + len(rows), device=query.device)
            out[rows] = attend(
                query[rows],
                key_cache[sequence][:, keys % slots],
                value_cache[sequence][:, keys % slots],
                query_positions,
                keys,
                scale,
                softcap,
                window,
                stepwise,
            )
    return out


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    scale: float,
    softcap: float,
    window: int,
    stepwise: bool,
) -> Tensor:
    """The formula for one sequence, also in float64: query [n, H, Dh], key and value [Hkv, L, Dh] -> [n, H, Dh]."""
    group = query.shape[1] // key.shape[0]
    key, value = key.repeat_interleave(group, dim=0), value.repeat_interleave(group, dim=0)
    exact = query.dtype if stepwise else torch.promote_types(query.dtype, torch.float32)
    scores = query.transpose(0, 1).to(exact) @ key.to(exact).mT * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    ages = query_positions[:, None] - key_positions
    visible = (ages >= 0) & (ages < window) if window else ages >= 0
    scores = scores.masked_fill(~visible, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(exact, torch.float32)).to(exact)
    return (weights @ value.to(exact)).transpose(0, 1).to(query.dtype)


@attention.check
def _check(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    softcap: float,
    window: int,
    **_: object,
) -> None:
    B, Hkv, S, Dh = require_caches(key_cache, value_cache, query=query)
    T, H = shapes("T H Dh", query=query, Dh=Dh)[:2]
    require_heads(H, Hkv)
    shapes("B+1, B", cu_seqlens_q=cu_seqlens_q, seqlens_k=seqlens_k, B=B, **{"B+1": B + 1})
    require_lengths(key_cache, cu_seqlens_q=cu_seqlens_q, seqlens_k=seqlens_k)
    require_limits(softcap, window)
    if seqlens_k.device.type == "cpu":
        check_lengths(T, S, cu_seqlens_q.tolist(), seqlens_k.tolist(), max_seqlen_q, window)


def check_lengths(tokens: int, slots: int, starts: list[int], lengths: list[int], max_new: int, window: int) -> None:
    """Check the starts and lengths of sequences: T, S, cu_seqlens_q, seqlens_k, max_seqlen_q and the window."""
    counts = [end - start for start, end in pairwise(starts)]
    if min(counts, default=0) < 0 or starts[0] != 0 or starts[-1] != tokens:
        require(False, "cu_seqlens_q", f"rise from 0 to the {tokens} rows of 'query'", starts)
    longest = max(counts, default=0)
    if longest > max_new:
        require(False, "max_seqlen_q", f"be {longest} or more", max_new)
    for index, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        if length < count:
            require(False, f"seqlens_k[{index}]", f"include the {count} queries of the sequence", length)
    require_slots(slots, max(lengths, default=0), window, max_new)
    if slots % RING_SLOTS and max(lengths, default=0) > slots:
        require(False, "key_cache", f"have a multiple of {RING_SLOTS} slots as a ring buffer", slots)


@attention.fake
def _fake(query: Tensor, *_: Tensor, **__: object) -> Tensor:
    return torch.empty_like(query)


@attention.native
def _native(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cu_seqlens_q: Tensor,
    seqlens_k: Tensor,
    *,
    max_seqlen_q: int,
    **numbers: Any,
) -> Tensor:
    out = _fake(query)
    _C.attention(
        out.data_ptr(),
        query.data_ptr(),
        query.shape[1],
        native_cache(key_cache, value_cache),
        cu_seqlens_q.data_ptr(),
        seqlens_k.data_ptr(),
        **numbers,
    )
    return out


@attention.triton
def _triton(*tensors: Tensor, max_seqlen_q: int, **numbers: Any) -> Tensor:
    from arcmerge.kernels.attention import attention as launch

    out = _fake(*tensors)
    if max_seqlen_q:
        launch(out, *tensors, max_seqlen_q=max_seqlen_q, **numbers)
    return out


@attention.on_demand("flash_attn")
def _flash_attn(*tensors: Tensor, **numbers: Any) -> Tensor:
    return _by_package("flash_attn", *tensors, **numbers)


@attention.on_demand("flashinfer")
def _flashinfer(*tensors: Tensor, **numbers: Any) -> Tensor:
    return _by_package("flashinfer", *tensors, **numbers)


def _by_package(backend: str, *tensors: Tensor, **numbers: Any) -> Tensor:
    from arcmerge.ops.attention_packages import plan

    return plan(backend, *tensors, **numbers)(*tensors[:3])
