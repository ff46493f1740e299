"""arcmerge's attention and its mask, as transformers calls them by name."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import eager_mask
from transformers.models.gemma2 import modeling_gemma2 as gemma2

from arcmerge import ops
from arcmerge.ops.attention import HEAD_DIMS

NAME = "arcmerge"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """query [B, H, T, Dh], key and value [B, Hkv, S, Dh] -> ([B, T, H, Dh], weights or None).

    attention_mask: from `visible_keys`. Rows of padding come out as zeros. What ops.attention has not goes through
    transformers' eager attention: gradients, dropout, masks of four dimensions, attention to what follows, other heads.
    """
    batch, tokens, head_dim = query.shape[0], query.shape[2], query.shape[3]
    causal = getattr(module, "is_causal", True)
    recorded = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
    of_four = attention_mask is not None and attention_mask.dim() == 4
    if recorded or dropout or of_four or not causal or head_dim not in HEAD_DIMS:
        mask = _added(attention_mask, query, key, sliding_window) if causal or of_four else None
        return gemma2.eager_attention_forward(
            module, query, key, value, mask, dropout=dropout, scaling=scaling, softcap=softcap
        )
    device = query.device
    how: dict[str, Any] = {
        "scale": head_dim**-0.5 if scaling is None else scaling,
        "softcap": softcap or 0.0,
        "window": sliding_window or 0,
    }
    rows = query.transpose(1, 2)
    if attention_mask is None:
        visible, asked = None, torch.ones(batch, tokens, dtype=torch.bool, device=device)
        lengths = torch.full((batch,), key.shape[2], dtype=torch.int32, device=device)
    else:
        visible = attention_mask.to(device, torch.bool)
        end = _end(visible)
        asked = visible[:, end - tokens : end]
        lengths = visible.sum(dim=1, dtype=torch.int32)
        # The op takes the tokens of a sequence from slot 0 on.
        order = (~visible).to(torch.uint8).argsort(dim=1, stable=True)[:, None, :, None].expand(key.shape)
        key, value = key.gather(2, order), value.gather(2, order)
    key, value = key.contiguous(), value.contiguous()
    if tokens == 1:
        return _decode(rows[:, 0], key, value, lengths * asked[:, 0], how), None
    starts = torch.zeros(batch + 1, dtype=torch.int32, device=device)
    starts[1:] = asked.sum(dim=1).cumsum(dim=0)
    packed = rows.reshape(-1, rows.shape[2], head_dim) if visible is None else rows[asked]
    found = ops.attention(packed.contiguous(), key, value, starts, lengths, tokens, **how)
    if visible is None:
        return found.view(rows.shape), None
    out = torch.zeros_like(rows, memory_format=torch.contiguous_format)
    out[asked] = found
    return out, None


def _end(visible: Tensor) -> int:
    """After the last key that any sequence sees; queries stand at the last positions before."""
    return int(visible.any(dim=0).nonzero().max()) + 1


def _added(mask: Tensor | None, query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """What eager attention adds to its logits, [B, 1, T, S], of any mask that attention_forward takes."""
    if mask is not None and mask.dim() == 4 and mask.dtype != torch.bool:
        return mask
    if mask is None or mask.dim() == 2:
        keys, tokens = key.shape[2], query.shape[2]
        end = keys if mask is None else _end(mask)
        slots = torch.arange(keys, device=key.device)
        places = torch.arange(end - tokens, end, device=key.device)[:, None]
        seen = (slots <= places) & (slots > places - (window or keys))
        mask = seen[None, None] if mask is None else seen & mask[:, None, None]
    hidden = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, hidden)


def _decode(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, how: dict[str, Any]) -> Tensor:
    """[B, 1, H, Dh], of one query a sequence: 4 ms a layer less than as a prompt of one token (2.6B, 512 keys, AVX2).

    The op rotates and appends the newest key, which transformers has done: so it is given that key again, and a
    rotation by nothing, which changes no bit.
    """
    batch, heads, head_dim = query.shape
    newest, row = (lengths - 1).clamp(min=0), torch.arange(batch, device=query.device)
    states = [query, key[row, :, newest], value[row, :, newest]]
    qkv = torch.cat(states, dim=1).flatten(1)
    table = _no_rotation(key.shape[2], head_dim, key.device)
    counters = torch.zeros(batch, key.shape[1], dtype=torch.int32, device=key.device)
    return ops.attention_decode(qkv, table, lengths, key, value, counters, heads, **how).view(batch, 1, heads, head_dim)


@lru_cache(maxsize=1)
def _no_rotation(keys: int, head_dim: int, device: torch.device) -> Tensor:
    """A rope table whose angles are all zero."""
    table = torch.zeros(keys, head_dim, device=device)
    table[:, : head_dim // 2] = 1.0
    return table


def visible_keys(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    device: torch.device | str = "cpu",
    **named: Any,
) -> Tensor | None:
    """[batch, keys] bool: which keys are tokens that some query may see; None: all. Causality and windows are the op's.

    Where that does not say it all, as of several sequences in one row: the mask of transformers' eager attention.
    """
    if attention_mask is not None:
        device = attention_mask.device
    if allow_is_bidirectional_skip or (not allow_is_causal_skip and q_length > 1):
        mask: Tensor | None = eager_mask(
            batch_size,
            q_length,
            kv_length,
            q_offset,
            kv_offset,
            attention_mask=attention_mask,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip,
            device=device,
            **named,
        )
        return mask
    written = torch.arange(kv_offset, kv_offset + kv_length, device=device) < q_offset + q_length
    visible = written.expand(batch_size, -1)
    if attention_mask is not None:
        padding = attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
        visible = visible & nn.functional.pad(padding, (0, kv_length - padding.shape[1]))
    return None if visible.all() else visible
