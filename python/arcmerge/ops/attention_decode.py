"""attention_decode: rotary embedding, append to the cache and attention for one new token of every sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.backend import native_cache, native_dtype
from arcmerge.dispatch.checks import require_activations, require_dtype_of, require_shape
from arcmerge.dispatch.registry import op
from arcmerge.errors import ArcmergeError
from arcmerge.ops.attention import (
    attend,
    require_caches,
    require_contiguous,
    require_heads,
    require_integers,
    require_limits,
    require_room,
)
from arcmerge.ops.rope_cache import rotated


def attention_decode(
    qkv: Tensor,
    table: Tensor,
    lengths: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    counters: Tensor,
    heads: int,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    stepwise: bool = False,
) -> Tensor:
    """Rotate the queries and the key of a new token, append its key and value, and attend, for every sequence.

    qkv: (B, (H + 2 Hkv) * Dh), a row of projections: H = heads queries, Hkv keys, Hkv values. table: (P, Dh), from
    rope_table; its dtype, float32 or that of qkv, decides the rounding as in rope_cache. lengths: (B,) int32, the
    tokens of a sequence with the new one, whose position is therefore lengths[b] - 1 < P; 0 for an idle row, of which
    nothing is read or written and whose result is 0. key_cache, value_cache: (B, Hkv, S, Dh), changed in place:
    position p lies in slot p % S. counters: (B, Hkv) int32, zeros, and zeros again in the end. All contiguous and on
    one device; qkv and caches of one dtype, bfloat16 or float32; Dh 16, 32, 64, 128 or 256.

    Which keys are visible, what must be in the cache, softcap, window, stepwise and the rounding inside: as in
    `attention`; a ring may have any number of slots from `window` on.

    Returns (B, H * Dh) in the dtype of qkv. Must move qkv, a row of the table and the result once, the visible keys
    and values once, and the new ones to the cache. A GPU also writes and reads again what splits of 128 keys (256
    where Hkv > 4) leave each other in float32: 3.2 % of the keys' and values' bytes in bfloat16 (1.6 %) for two heads
    a group, which the L2 cache holds. A row does not depend on the others. Raises ArcmergeError for what is not as
    said; it reads lengths only on the CPU.
    """
    return _attention_decode(
        qkv, table, lengths, key_cache, value_cache, counters, heads, scale, softcap, window, stepwise
    )


def _check(
    qkv: Tensor,
    table: Tensor,
    lengths: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    counters: Tensor,
    heads: int,
    scale: float,
    softcap: float,
    window: int,
    stepwise: bool,
) -> None:
    require_caches(key_cache, value_cache, qkv=qkv)
    sequences, key_value_heads, slots, head_dim = key_cache.shape
    require_heads(heads, key_value_heads)
    require_shape((sequences, (heads + 2 * key_value_heads) * head_dim), qkv=qkv)
    require_activations(qkv=qkv, table=table)
    if table.dtype != torch.float32:
        require_dtype_of("qkv", qkv, table=table)
    require_shape((len(table), head_dim), table=table)
    require_contiguous(table=table)
    require_integers((sequences,), key_cache, lengths=lengths)
    require_integers((sequences, key_value_heads), key_cache, counters=counters)
    require_limits(softcap, window)
    if lengths.device.type == "cpu":
        longest = max(lengths.tolist(), default=0)
        if min(lengths.tolist(), default=0) < 0 or longest > len(table):
            raise ArcmergeError(f"'lengths' must be 0 to the {len(table)} rows of 'table', got {lengths.tolist()}")
        require_room(slots, longest, window, 1)


def _reference(
    qkv: Tensor,
    table: Tensor,
    lengths: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    counters: Tensor,
    heads: int,
    scale: float,
    softcap: float,
    window: int,
    stepwise: bool,
) -> Tensor:
    _, key_value_heads, slots, head_dim = key_cache.shape
    states = qkv.unflatten(1, (-1, head_dim))
    query, key, value = states.split([heads, key_value_heads, key_value_heads], dim=1)
    out = torch.zeros_like(query)
    for sequence, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        row = slice(sequence, sequence + 1)
        positions = torch.arange(max(length - window, 0) if window else 0, length, device=qkv.device)
        angles = table[length - 1 : length]
        key_cache[sequence, :, (length - 1) % slots] = rotated(key[row], angles)[0]
        value_cache[sequence, :, (length - 1) % slots] = value[sequence]
        out[row] = attend(
            rotated(query[row], angles),
            key_cache[sequence][:, positions % slots],
            value_cache[sequence][:, positions % slots],
            positions[-1:],
            positions,
            scale,
            softcap,
            window,
            stepwise,
        )
    return out.flatten(1)


def _native(
    qkv: Tensor,
    table: Tensor,
    lengths: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    counters: Tensor,
    heads: int,
    scale: float,
    softcap: float,
    window: int,
    stepwise: bool,
) -> Tensor:
    if stepwise:
        return _reference(
            qkv, table, lengths, key_cache, value_cache, counters, heads, scale, softcap, window, stepwise
        )
    out = qkv.new_empty(len(qkv), heads * key_cache.shape[3])
    _C.attention_decode(
        out.data_ptr(),
        qkv.data_ptr(),
        heads,
        table.data_ptr(),
        native_dtype(table.dtype),
        lengths.data_ptr(),
        native_cache(key_cache, value_cache),
        scale,
        softcap,
        window,
    )
    return out


def _triton(
    qkv: Tensor,
    table: Tensor,
    lengths: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    counters: Tensor,
    heads: int,
    scale: float,
    softcap: float,
    window: int,
    stepwise: bool,
) -> Tensor:
    arguments = (qkv, table, lengths, key_cache, value_cache, counters, heads, scale, softcap, window)
    if stepwise:
        return _reference(*arguments, stepwise)
    from arcmerge.kernels.attention_decode import attention_decode as launch
    from arcmerge.kernels.attention_decode import splits

    sequences, key_value_heads, slots, head_dim = key_cache.shape
    out = qkv.new_empty(sequences, heads * head_dim)
    shape = (sequences, key_value_heads, splits(slots, key_value_heads), heads // key_value_heads)
    partial = torch.empty(*shape, head_dim, dtype=torch.float32, device=qkv.device)
    statistics = torch.empty(*shape, 2, dtype=torch.float32, device=qkv.device)
    if out.numel():
        launch(out, partial, statistics, *arguments)
    return out


def _fake(
    qkv: Tensor,
    table: Tensor,
    lengths: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    counters: Tensor,
    heads: int,
    *_: object,
) -> Tensor:
    return qkv.new_empty(len(qkv), heads * key_cache.shape[3])


_attention_decode = op(
    "attention_decode(Tensor qkv, Tensor table, Tensor lengths, Tensor(a!) key_cache, Tensor(b!) value_cache,"
    " Tensor(c!) counters, int heads, float scale, float softcap, int window, bool stepwise) -> Tensor",
    check=_check,
    reference=_reference,
    fake=_fake,
    native=_native,
    triton=_triton,
)
