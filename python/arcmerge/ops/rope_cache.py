"""rope_cache: rotary position embedding of queries and keys, with keys and values written to the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.backend import native_cache, native_dtype
from arcmerge.dispatch.checks import require_activations, require_dtype_of, require_shape
from arcmerge.dispatch.registry import op
from arcmerge.errors import ArcmergeError


def rope_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    positions: Tensor,
    sequences: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> Tensor:
    """Rotate query and key by their positions; write key and value to the cache; return the rotated query.

    With x1, x2 the halves of a head, cos and sin those of the table's row: (x1*cos - x2*sin, x2*cos + x1*sin).

    query: [T, H, Dh]. key, value: [T, Hkv, Dh]. All bfloat16 or all float32, with contiguous heads side by side and
    rows at any distance, so that the three may be views of one [T, (H + 2 Hkv) * Dh]. Dh: a power of two. table:
    [P, Dh], contiguous, from rope_table. positions, sequences: [T], int64, contiguous. key_cache, value_cache:
    [B, Hkv, S, Dh], contiguous, in the dtype of query: row t is written to slot positions[t] % S of sequence
    sequences[t].

    A row whose position is negative is padding: its query comes out as zero, and nothing of it is cached. Positions
    must be below P, sequences in 0..B-1, and no two rows may share a slot: those are values, which nobody checks.

    Returns [T, H, Dh], contiguous, in the dtype of query. The dtype of the table decides the rounding: with float32
    all is float32, rounded once; with bfloat16, which must then be that of query too, every product and the sum is
    rounded, as in transformers. Moves the bytes of query, key and value twice, and the used rows of the table once.
    Raises ArcmergeError for other shapes, dtypes and strides.
    Source: apply_rotary_pos_emb of transformers' Gemma-2.
    """
    return _rope_cache(query, key, value, table, positions, sequences, key_cache, value_cache)


def rope_table(length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """[length, head_dim]: cos, then sin, of position * theta^(-2i / head_dim), for i in 0..head_dim/2 - 1.

    Angles are the float32 numbers of transformers, those that the weights were trained with, although near position
    8192 they are off by some 2^-11; cosines and sines are rounded once.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    # On the CPU, so that every device gets the same table.
    angles = torch.arange(length, dtype=torch.float32)[:, None] * (1.0 / theta**exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype).to(device)


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    positions: Tensor,
    sequences: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> None:
    states = {"query": query, "key": key, "value": value}
    caches = {"key_cache": key_cache, "value_cache": value_cache}
    require_activations(**states, table=table, **caches)
    require_dtype_of("query", query, key=key, value=value, **caches)
    if table.dtype == torch.bfloat16:
        require_dtype_of("query", query, table=table)
    for name, tensor, dimensions in (("query", query, 3), ("key", key, 3), ("key_cache", key_cache, 4)):
        if tensor.dim() != dimensions:
            raise ArcmergeError(f"'{name}' must have {dimensions} dimensions, got {tensor.dim()}")
    rows, _, head_dim = query.shape
    sequence_count, key_value_heads, slots, _ = key_cache.shape
    require_shape((rows, key_value_heads, head_dim), key=key, value=value)
    require_shape((sequence_count, key_value_heads, slots, head_dim), **caches)
    require_shape((rows,), positions=positions, sequences=sequences)
    require_shape((len(table), head_dim), table=table)
    if head_dim < 2 or head_dim & (head_dim - 1):
        raise ArcmergeError(f"'query' must have a power of two of columns a head, 2 or more, got {head_dim}")
    for name, tensor in states.items():
        if tensor.numel() and tensor.stride()[1:] != (head_dim, 1):
            strides = tensor.stride()
            raise ArcmergeError(f"'{name}' must have contiguous heads side by side, got the strides {strides}")
    for name, tensor in {"table": table, "positions": positions, "sequences": sequences, **caches}.items():
        if not tensor.is_contiguous():
            raise ArcmergeError(f"'{name}' must be contiguous, got the strides {tensor.stride()}")
    for name, tensor in (("positions", positions), ("sequences", sequences)):
        if tensor.dtype != torch.int64:
            raise ArcmergeError(f"'{name}' must be int64, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ArcmergeError(f"'{name}' must be on the device of 'query' {query.device}, got {tensor.device}")


def rotated(states: Tensor, table: Tensor) -> Tensor:
    """The definition: [T, heads, Dh] by the rows [T, Dh] of a table, rounded as the table's dtype says."""
    cosine, sine = table[:, None].chunk(2, dim=-1)
    first, second = states.to(table.dtype).chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(states.dtype)


def _reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    positions: Tensor,
    sequences: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> Tensor:
    real = positions >= 0
    rows, slots = table[positions[real]], positions[real] % key_cache.shape[2]
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    out[real] = rotated(query[real], rows)
    key_cache[sequences[real], :, slots] = rotated(key[real], rows)
    value_cache[sequences[real], :, slots] = value[real]
    return out


def _native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    positions: Tensor,
    sequences: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> Tensor:
    out = query.new_empty(query.shape)
    rows = [(states.data_ptr(), states.stride(0) * states.itemsize) for states in (query, key, value)]
    _C.rope_cache(
        out.data_ptr(),
        rows[0],
        query.shape[1],
        rows[1],
        rows[2],
        len(query),
        table.data_ptr(),
        native_dtype(table.dtype),
        positions.data_ptr(),
        sequences.data_ptr(),
        native_cache(key_cache, value_cache),
    )
    return out


def _triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    positions: Tensor,
    sequences: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> Tensor:
    from arcmerge.kernels.rope_cache import rope_cache as launch

    out = query.new_empty(query.shape)
    if out.numel():
        launch(out, query, key, value, table, positions, sequences, key_cache, value_cache)
    return out


def _fake(query: Tensor, *others: Tensor) -> Tensor:
    return query.new_empty(query.shape)


_rope_cache = op(
    "rope_cache(Tensor query, Tensor key, Tensor value, Tensor table, Tensor positions, Tensor sequences,"
    " Tensor(a!) key_cache, Tensor(b!) value_cache) -> Tensor",
    check=_check,
    reference=_reference,
    fake=_fake,
    native=_native,
    triton=_triton,
)
