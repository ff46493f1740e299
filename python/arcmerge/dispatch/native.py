"""Tensors as the native backend takes them: addresses and dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dtypes import MERGEABLE

_IDS = {getattr(torch, dtype.name): dtype.native for dtype in MERGEABLE}


def native_dtype(dtype: torch.dtype) -> int:
    """The id of a torch.dtype in the native backend."""
    return _IDS[dtype]


def operand(tensor: Tensor) -> _C.Operand:
    """A contiguous CPU tensor, which the native backend reads in place."""
    return _C.Operand(tensor.data_ptr(), native_dtype(tensor.dtype))


def native_selection(
    tensor: Tensor,
    cuts: Tensor | None,
    keys: Tensor,
    probabilities: Tensor,
    row_scales: Tensor | None,
    *,
    joint: bool,
    rounded: bool,
) -> _C.Selection:
    """What selects elements of tensors such as `tensor`; `row_scales`, if any, are contiguous and read in place."""
    return _C.Selection(
        [] if cuts is None else cuts.tolist(),
        keys.tolist(),
        probabilities.tolist(),
        tensor.shape[-1] if tensor.ndim else 1,
        joint,
        rounded,
        0 if row_scales is None else row_scales.data_ptr(),
    )


def native_cache(key_cache: Tensor, value_cache: Tensor) -> _C.KvCache:
    """Contiguous CPU caches [B, Hkv, S, Dh], which the native backend reads and writes in place."""
    sequences, heads, slots, head_dim = key_cache.shape
    dtype = native_dtype(key_cache.dtype)
    return _C.KvCache(key_cache.data_ptr(), value_cache.data_ptr(), sequences, heads, slots, head_dim, dtype)
