"""attention_decode: rotary embedding, append to the cache and attention for one new token of every sequence."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.checks import (
    require,
    require_activations,
    require_caches,
    require_contiguous,
    require_heads,
    require_lengths,
    require_limits,
    require_same_dtype,
    require_slots,
    shapes,
)
from arcmerge.dispatch.native import native_cache, native_dtype
from arcmerge.dispatch.recording import current
from arcmerge.dispatch.registry import op
from arcmerge.ops.attention import attend
from arcmerge.ops.rope_cache import rotated


@op(mutates=("key_cache", "value_cache"), stepwise_by_reference=("native", "triton"))
def attention_decode(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    seqlens_k: Tensor,
    *,
    heads: int,
    scale: float,
    cos_sin: Tensor | None = None,
    first_slots: Tensor | None = None,
    softcap: float = 0.0,
    window: int = 0,
    stepwise: bool = False,
) -> Tensor:
    """Rotate the queries and the key of a new token, append its key and value, and attend, for every sequence.

    The visible keys, the content of the cache, the rounding and the other arguments are those of `attention`, except
    that the cache of a window may have any count of slots from `window` on. A row of the result does not depend on the
    others.

    Must move qkv, a row of cos_sin and the result once, the visible keys and values once, and the new ones to the
    cache. A GPU also writes and reads the float32 sums of splits of 128 keys (256 if Hkv > 4), which the L2 cache
    holds: for two heads a group, 3.2 % (1.6 %) of the bytes of bfloat16 keys and values.

    Args:
        qkv: [B, (H + 2 Hkv) * Dh], bfloat16 or float32: the projections of a token, H queries, Hkv keys, Hkv values. Dh
            is 16, 32, 64, 128 or 256.
        key_cache, value_cache: [B, Hkv, S, Dh], in the dtype of qkv, changed in place: position p is in slot p % S. All
            tensors are contiguous and on one device.
        seqlens_k: [B] int32, the tokens of each sequence with the new one, whose position is seqlens_k[b] - 1. 0 for an
            idle row: its result is 0, and nothing else of it is read or written.
        heads: H.
        cos_sin: [P, Dh], from rope_table, P at least the longest sequence; its dtype, float32 or that of qkv, decides
            the rounding as in `rope_cache`. None: no rotation; S must then be at least the longest sequence.
        first_slots: [B] int32, below S: position p of sequence b is in slot (first_slots[b] + p) % S, as in a batch
            that is padded on the left. The CPU copies the caches for it. None: slot p % S.

    Returns:
        [B, H * Dh] in the dtype of qkv.

    Raises:
        ArcmergeError: for arguments that break these rules. Lengths are only checked on the CPU.
    """
    _, key_value_heads, slots, head_dim = key_cache.shape
    states = qkv.unflatten(1, (-1, head_dim))
    query, key, value = states.split([heads, key_value_heads, key_value_heads], dim=1)
    cos_sin = _unrotated(slots, head_dim, qkv.device) if cos_sin is None else cos_sin
    out = torch.zeros_like(query)
    starts = [0] * len(qkv) if first_slots is None else first_slots.tolist()
    for sequence, (length, start) in enumerate(zip(seqlens_k.tolist(), starts, strict=True)):
        if length == 0:
            continue
        row = slice(sequence, sequence + 1)
        positions = torch.arange(max(length - window, 0) if window else 0, length, device=qkv.device)
        angles = cos_sin[length - 1 : length]
        key_cache[sequence, :, (start + length - 1) % slots] = rotated(key[row], angles)[0]
        value_cache[sequence, :, (start + length - 1) % slots] = value[sequence]
        out[row] = attend(
            rotated(query[row], angles),
            key_cache[sequence][:, (start + positions) % slots],
            value_cache[sequence][:, (start + positions) % slots],
            positions[-1:],
            positions,
            scale,
            softcap,
            window,
            stepwise,
        )
    return out.flatten(1)


@lru_cache(maxsize=1)
def _unrotated(length: int, head_dim: int, device: torch.device) -> Tensor:
    """cos_sin of angles that are all zero."""
    with torch.inference_mode(False):  # calls outside of that mode use it too
        table = torch.zeros(length, head_dim, device=device)
        table[:, : head_dim // 2] = 1.0
        return table


@attention_decode.check
def _check(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    seqlens_k: Tensor,
    *,
    heads: int,
    cos_sin: Tensor | None,
    first_slots: Tensor | None,
    softcap: float,
    window: int,
    **_: object,
) -> None:
    B, Hkv, S, Dh = require_caches(key_cache, value_cache, qkv=qkv)
    require_heads(heads, Hkv)
    row = "(H+2Hkv)*Dh"
    shapes(f"B {row}, B", qkv=qkv, seqlens_k=seqlens_k, B=B, **{row: (heads + 2 * Hkv) * Dh})
    P = S
    if cos_sin is not None:
        require_activations(qkv=qkv, cos_sin=cos_sin)
        if cos_sin.dtype != torch.float32:
            require_same_dtype(qkv=qkv, cos_sin=cos_sin)
        P = shapes("P Dh", cos_sin=cos_sin, Dh=Dh)[0]
        require_contiguous(cos_sin=cos_sin)
    require_lengths(key_cache, seqlens_k=seqlens_k)
    require_limits(softcap, window)
    if first_slots is not None:
        shapes("B", first_slots=first_slots, B=B)
        require_lengths(key_cache, first_slots=first_slots)
        if first_slots.device.type == "cpu" and B:
            lowest, highest = (int(bound) for bound in first_slots.aminmax())
            require(0 <= lowest <= highest < S, "first_slots", f"be 0 to {S - 1}, a slot", first_slots.tolist())
    if seqlens_k.device.type == "cpu":
        lengths = seqlens_k.tolist()
        longest = max(lengths, default=0)
        if min(lengths, default=0) < 0 or longest > P:
            rows = "slots of 'key_cache'" if cos_sin is None else "rows of 'cos_sin'"
            require(False, "seqlens_k", f"be 0 to the {P} {rows}", lengths)
        require_slots(S, longest, window, 1)


@attention_decode.fake
def _fake(qkv: Tensor, key_cache: Tensor, *_: Tensor, heads: int, **__: object) -> Tensor:
    return qkv.new_empty(qkv.shape[0], heads * key_cache.shape[3])


@attention_decode.native
def _native(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    seqlens_k: Tensor,
    *,
    heads: int,
    cos_sin: Tensor | None,
    first_slots: Tensor | None,
    **numbers: Any,
) -> Tensor:
    if first_slots is not None:
        count, row = key_cache.shape[2], torch.arange(len(qkv))
        slots = ((torch.arange(count) + first_slots[:, None]) % count)[:, None, :, None].expand(key_cache.shape)
        keys, values = key_cache.gather(2, slots), value_cache.gather(2, slots)
        out = _native(qkv, keys, values, seqlens_k, heads=heads, cos_sin=cos_sin, first_slots=None, **numbers)
        # The new token alone has changed. Of an idle row this writes what is there.
        newest = (seqlens_k.long() - 1) % count
        for states, others in ((key_cache, keys), (value_cache, values)):
            states[row, :, (newest + first_slots) % count] = others[row, :, newest]
        return out
    if cos_sin is None:
        cos_sin = _unrotated(*key_cache.shape[2:], qkv.device)
        if (recording := current()) is not None:
            recording.keep(cos_sin)
    out = _fake(qkv, key_cache, heads=heads)
    _C.attention_decode(
        out.data_ptr(),
        qkv.data_ptr(),
        heads,
        cos_sin.data_ptr(),
        native_dtype(cos_sin.dtype),
        seqlens_k.data_ptr(),
        native_cache(key_cache, value_cache),
        **numbers,
    )
    return out


def clear_counters(key_caches: Sequence[Tensor]) -> None:
    """Begin a step of `attention_decode` with these caches in a CUDA graph, which is right whatever became of others.

    Programs of a launch count how many of them have ended. A launch outside of a graph clears the counters itself.
    """
    from arcmerge.kernels.attention_decode import clear_counters as clear

    clear(key_caches)


@attention_decode.triton
def _triton(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    seqlens_k: Tensor,
    *,
    heads: int,
    cos_sin: Tensor | None,
    first_slots: Tensor | None,
    **numbers: Any,
) -> Tensor:
    from arcmerge.kernels.attention_decode import attention_decode as launch
    from arcmerge.kernels.attention_decode import scratch

    out = _fake(qkv, key_cache, heads=heads)
    if out.numel():
        cos_sin = _unrotated(*key_cache.shape[2:], qkv.device) if cos_sin is None else cos_sin
        left = scratch(key_cache, heads)
        launch(out, *left, qkv, key_cache, value_cache, seqlens_k, cos_sin, first_slots, heads=heads, **numbers)
    return out
