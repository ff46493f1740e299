"""attention: the last tokens of packed sequences attend to the keys in a cache."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.backend import native_cache
from arcmerge.dispatch.checks import require_activations, require_dtype_of, require_shape
from arcmerge.dispatch.registry import op
from arcmerge.errors import ArcmergeError

HEAD_DIMS = (16, 32, 64, 128, 256)
# Queries that the reference takes at a time: its scores then take (H, 256, visible keys).
CHUNK = 256


def attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_start: Tensor,
    lengths: Tensor,
    longest_query: int,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    stepwise: bool = False,
) -> Tensor:
    """softmax(softcap * tanh(scale * q.k / softcap)) v, for every query and head.

    query: (T, H, Dh), with positions already rotated in, of B sequences one after another; sequence b has the rows from
    query_start[b] to query_start[b + 1], n of them, possibly none. query_start: (B + 1,) int32. lengths: (B,) int32,
    the tokens of a sequence with these n, so that its query i is at position lengths[b] - n + i. longest_query: the
    greatest n. key_cache, value_cache: (B, Hkv, S, Dh), in which position p lies in slot p % S; head h of the queries
    reads head h // (H / Hkv) of the keys. All contiguous and on one device; query and caches of one dtype, bfloat16 or
    float32; Dh 16, 32, 64, 128 or 256.

    A query at position i sees the keys at j <= i, with window > 0 those at i - window < j <= i. softcap 0: none. What
    they see must be in the cache: S >= the greatest length, or S a multiple of 64 and at least window +
    longest_query - 1. Slots that no query sees may hold anything, NaN too.

    Scores, softmax and sums are float32; weights are rounded to the dtype of the values before they meet them; the
    result (T, H, Dh) is rounded once. stepwise: scores, each step of the softcap and the softmax are rounded to the
    dtype of the query, as `eager_attention_forward` of transformers' Gemma-2 does; the reference alone does that.

    Must move queries and result once and each visible key and value once. Raises ArcmergeError for what is not as said;
    it reads lengths only on the CPU, as on a GPU that would wait for the device.
    """
    return _attention(
        query, key_cache, value_cache, query_start, lengths, longest_query, scale, softcap, window, stepwise
    )


def require_caches(key_cache: Tensor, value_cache: Tensor, **states: Tensor) -> None:
    """Two caches (B, Hkv, S, Dh) in the dtype of the states, all contiguous on one device; ArcmergeError if not."""
    caches = {"key_cache": key_cache, "value_cache": value_cache}
    require_activations(**states, **caches)
    ((name, first),) = states.items()
    require_dtype_of(name, first, **caches)
    if key_cache.dim() != 4:
        raise ArcmergeError(f"'key_cache' must have 4 dimensions, got {key_cache.dim()}")
    require_shape(key_cache.shape, value_cache=value_cache)
    head_dim = key_cache.shape[3]
    if head_dim not in HEAD_DIMS:
        raise ArcmergeError(f"'key_cache' must have heads of {', '.join(map(str, HEAD_DIMS))} elements, got {head_dim}")
    require_contiguous(**states, **caches)


def require_contiguous(**tensors: Tensor) -> None:
    """ArcmergeError if a tensor has gaps or another order."""
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ArcmergeError(f"'{name}' must be contiguous, got the strides {tensor.stride()}")


def require_integers(shape: tuple[int, ...], alike: Tensor, **tensors: Tensor) -> None:
    """int32 tensors of a shape, contiguous, on the device of `alike`; ArcmergeError if not."""
    require_shape(shape, **tensors)
    require_contiguous(**tensors)
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32:
            raise ArcmergeError(f"'{name}' must be int32, got {tensor.dtype}")
        if tensor.device != alike.device:
            raise ArcmergeError(f"'{name}' must be on the device of the caches {alike.device}, got {tensor.device}")


def require_heads(heads: int, key_value_heads: int) -> None:
    """Heads of queries share the heads of keys evenly; ArcmergeError if not."""
    if heads < 1 or heads % key_value_heads:
        raise ArcmergeError(f"heads of queries must be a multiple of the {key_value_heads} heads of keys, got {heads}")


def require_limits(softcap: float, window: int) -> None:
    """ArcmergeError for negative numbers."""
    if softcap < 0 or window < 0:
        raise ArcmergeError(f"'softcap' and 'window' must be 0, for none, or more, got {softcap} and {window}")


def require_room(slots: int, longest: int, window: int, new: int) -> None:
    """A slot for every token of the longest sequence, or for all that `new` queries see; ArcmergeError if neither."""
    needed = min(longest, window + new - 1) if window else longest
    if slots < needed:
        raise ArcmergeError(f"'key_cache' must have {needed} slots or more for {longest} tokens, got {slots}")


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
    """The formula: (n, H, Dh) of one sequence, with query (n, H, Dh), key and value (Hkv, L, Dh), float64 ones too."""
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


def _check(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_start: Tensor,
    lengths: Tensor,
    longest_query: int,
    scale: float,
    softcap: float,
    window: int,
    stepwise: bool,
) -> None:
    require_caches(key_cache, value_cache, query=query)
    sequences, key_value_heads, slots, head_dim = key_cache.shape
    if query.dim() != 3 or query.shape[2] != head_dim:
        raise ArcmergeError(f"'query' must have the shape (T, H, {head_dim}), got {tuple(query.shape)}")
    require_heads(query.shape[1], key_value_heads)
    require_integers((sequences + 1,), key_cache, query_start=query_start)
    require_integers((sequences,), key_cache, lengths=lengths)
    require_limits(softcap, window)
    if lengths.device.type == "cpu":
        _check_values(len(query), slots, query_start.tolist(), lengths.tolist(), longest_query, window)


def _check_values(tokens: int, slots: int, starts: list[int], lengths: list[int], longest: int, window: int) -> None:
    counts = [end - start for start, end in pairwise(starts)]
    if min(counts, default=0) < 0 or starts[0] != 0 or starts[-1] != tokens:
        raise ArcmergeError(f"'query_start' must rise from 0 to the {tokens} rows of 'query', got {starts}")
    if max(counts, default=0) > longest:
        raise ArcmergeError(f"'longest_query' must be {max(counts)} or more, got {longest}")
    for number, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        if length < count:
            raise ArcmergeError(f"'lengths[{number}]' must include the {count} queries of the sequence, got {length}")
    require_room(slots, max(lengths, default=0), window, longest)
    if slots % 64 and max(lengths, default=0) > slots:
        raise ArcmergeError(f"'key_cache' must have a multiple of 64 slots to be a ring, got {slots}")


def _reference(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_start: Tensor,
    lengths: Tensor,
    longest_query: int,
    scale: float,
    softcap: float,
    window: int,
    stepwise: bool,
) -> Tensor:
    out = torch.empty_like(query)
    slots, starts = key_cache.shape[2], query_start.tolist()
    for sequence, length in enumerate(lengths.tolist()):
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


def _native(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_start: Tensor,
    lengths: Tensor,
    longest_query: int,
    scale: float,
    softcap: float,
    window: int,
    stepwise: bool,
) -> Tensor:
    if stepwise:
        return _reference(
            query, key_cache, value_cache, query_start, lengths, longest_query, scale, softcap, window, stepwise
        )
    out = torch.empty_like(query)
    _C.attention(
        out.data_ptr(),
        query.data_ptr(),
        query.shape[1],
        native_cache(key_cache, value_cache),
        query_start.data_ptr(),
        lengths.data_ptr(),
        scale,
        softcap,
        window,
    )
    return out


def _triton(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    query_start: Tensor,
    lengths: Tensor,
    longest_query: int,
    scale: float,
    softcap: float,
    window: int,
    stepwise: bool,
) -> Tensor:
    arguments = (query, key_cache, value_cache, query_start, lengths, longest_query, scale, softcap, window)
    if stepwise:
        return _reference(*arguments, stepwise)
    from arcmerge.kernels.attention import attention as launch

    out = torch.empty_like(query)
    if longest_query:
        launch(out, *arguments)
    return out


def _fake(query: Tensor, *_: object) -> Tensor:
    return torch.empty_like(query)


_attention = op(
    "attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor query_start, Tensor lengths,"
    " int longest_query, float scale, float softcap, int window, bool stepwise) -> Tensor",
    check=_check,
    reference=_reference,
    fake=_fake,
    native=_native,
    triton=_triton,
)
