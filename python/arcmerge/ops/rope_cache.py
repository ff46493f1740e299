"""rope_cache: rotary position embedding of queries and keys, with keys and values written to the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.checks import (
    require,
    require_activations,
    require_contiguous,
    require_contiguous_rows,
    require_dtype,
    require_same_device,
    require_same_dtype,
    shapes,
)
from arcmerge.dispatch.native import native_cache, native_dtype
from arcmerge.dispatch.registry import op


@op(mutates=("key_cache", "value_cache"))
def rope_cache(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    sequences: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> Tensor:
    """Rotate query and key by their positions; write key and value to the cache; return the rotated query.

    With x1, x2 the halves of a head, and cos, sin those of a row of cos_sin: (x1*cos - x2*sin, x2*cos + x1*sin). Row t
    is written to slot positions[t] % S of sequence sequences[t]. A row with a negative position is padding: its query
    becomes zero, and nothing of it is cached.

    The dtype of cos_sin decides the rounding: with float32 all arithmetic is float32, rounded once; with bfloat16,
    every product and the sum is rounded, as in transformers. Moves the bytes of query, key and value twice, and the
    rows of cos_sin that are used once.
    Source: apply_rotary_pos_emb of transformers' Gemma-2.

    Args:
        query: [T, H, Dh], bfloat16 or float32; Dh is a power of two.
        key, value: [T, Hkv, Dh], in the dtype of query. The rows of all three are contiguous, at any distance, so that
            the three may be views of one [T, (H + 2 Hkv) * Dh].
        cos_sin: [P, Dh], contiguous, from `rope_table`: float32, or bfloat16 if query is.
        positions: [T] int64, contiguous, each below P.
        sequences: [T] int64, contiguous, each from 0 to B - 1. No two rows may share a slot. The values of positions
            and sequences are not checked.
        key_cache, value_cache: [B, Hkv, S, Dh], contiguous, in the dtype of query.

    Returns:
        [T, H, Dh], contiguous, in the dtype of query.

    Raises:
        ArcmergeError: for other shapes, dtypes, devices and strides.
    """
    real = positions >= 0
    rows, slots = cos_sin[positions[real]], positions[real] % key_cache.shape[2]
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    out[real] = rotated(query[real], rows)
    key_cache[sequences[real], :, slots] = rotated(key[real], rows)
    value_cache[sequences[real], :, slots] = value[real]
    return out


def rope_table(length: int, head_dim: int, theta: float, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The cos_sin of the first positions: cos, then sin, of position * theta^(-2i / Dh), for i in 0..Dh/2 - 1.

    Angles are float32 as in transformers, because the weights were trained with these, although near position 8192
    they are off by some 2^-11; cosines and sines are rounded once.

    Args:
        length: number of positions, P.
        head_dim: Dh.
        theta: base of the angles.
        dtype, device: of the result.

    Returns:
        [P, Dh].
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    # On the CPU, so that every device gets the same table.
    angles = torch.arange(length, dtype=torch.float32)[:, None] * (1.0 / theta**exponents)
    return torch.cat([angles.cos(), angles.sin()], dim=1).to(dtype).to(device)


def rotated(states: Tensor, cos_sin: Tensor) -> Tensor:
    """The definition: states [T, heads, Dh] by the rows cos_sin [T, Dh], rounded as the dtype of cos_sin says."""
    cosine, sine = cos_sin[:, None].chunk(2, dim=-1)
    first, second = states.to(cos_sin.dtype).chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1).to(states.dtype)


@rope_cache.check
def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    sequences: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
) -> None:
    caches = {"key_cache": key_cache, "value_cache": value_cache}
    indices = {"positions": positions, "sequences": sequences}
    require_activations(query=query, key=key, value=value, cos_sin=cos_sin, **caches)
    require_same_dtype(query=query, key=key, value=value, **caches)
    if cos_sin.dtype == torch.bfloat16:
        require_same_dtype(query=query, cos_sin=cos_sin)
    _, Hkv, _, Dh = shapes("B Hkv S Dh, B Hkv S Dh", **caches)
    T = shapes("T H Dh, T Hkv Dh, T Hkv Dh", query=query, key=key, value=value, Hkv=Hkv, Dh=Dh)[0]
    shapes("P Dh, T, T", cos_sin=cos_sin, **indices, Dh=Dh, T=T)
    require(Dh > 1 and not Dh & (Dh - 1), "query", "have a power of two of columns a head, 2 or more", Dh)
    require_contiguous_rows(query=query, key=key, value=value)
    require_contiguous(cos_sin=cos_sin, **indices, **caches)
    require_dtype((torch.int64,), **indices)
    require_same_device(query=query, **indices)


@rope_cache.fake
def _fake(query: Tensor, *_: Tensor) -> Tensor:
    return query.new_empty(query.shape)


@rope_cache.native
def _native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    sequences: Tensor,
    *caches: Tensor,
) -> Tensor:
    out = _fake(query)
    rows = [(states.data_ptr(), states.stride(0) * states.itemsize) for states in (query, key, value)]
    _C.rope_cache(
        out.data_ptr(),
        rows[0],
        query.shape[1],
        rows[1],
        rows[2],
        len(query),
        cos_sin.data_ptr(),
        native_dtype(cos_sin.dtype),
        positions.data_ptr(),
        sequences.data_ptr(),
        native_cache(*caches),
    )
    return out


@rope_cache.triton
def _triton(*tensors: Tensor) -> Tensor:
    from arcmerge.kernels.rope_cache import rope_cache as launch

    out = _fake(*tensors)
    if out.numel():
        launch(out, *tensors)
    return out
