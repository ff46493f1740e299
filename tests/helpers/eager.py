"""Attention as transformers' Gemma-2 computes it by default, for tests to compare with."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward


def by_transformers(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, window: int, dtype: torch.dtype
) -> Tensor:
    """(n, H, Dh) of one sequence, by the function that transformers' Gemma-2 calls by default."""

    class Module(torch.nn.Module):
        num_key_value_groups = query.shape[1] // key.shape[0]

    count, length = len(query), key.shape[1]
    positions = torch.arange(length - count, length)[:, None]
    keys = torch.arange(length)[None]
    visible = (keys <= positions) & ((keys > positions - window) if window else True)
    mask = torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)
    states = query.transpose(0, 1)[None], key[None], value[None]
    out, _ = eager_attention_forward(
        Module().eval(), *(tensor.to(dtype) for tensor in states), mask, scaling=scale, softcap=softcap or None
    )
    return out[0]
