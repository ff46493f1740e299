"""arcmerge's attention for transformers, by name and in accelerated models.

Masks are those of transformers' eager attention. The op runs where a mask expresses causality, a sliding window and
padding at the ends; the eager attention of the model's own architecture handles every other mask.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from arcmerge import ops
from arcmerge.dispatch.checks import HEAD_DIMS
from arcmerge.errors import needed
from arcmerge.integrations.transformers.conditions import ops_apply
from arcmerge.integrations.transformers.masks import MaskRuns, once_a_forward

with needed("transformers", by="arcmerge.integrations.transformers", extra="transformers"):
    from transformers.utils.generic import TransformersKwargs

NAME = "arcmerge"

# Arguments that eager attention ignores as well. Any other argument could change the result.
_IGNORED = {*TransformersKwargs.__annotations__, "cache_position", "position_embeddings", "use_cache", "dropout"}


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any
) -> tuple[Tensor, Tensor | None]:
    """The registered attention function; also takes boolean masks, True where a query sees a key, as sdpa does."""
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        make = partial(_scores, attention_mask, query.dtype)
        attention_mask = once_a_forward(attention_mask, _layer(module), query.dtype, make)
    return eager_attention(module, query, key, value, attention_mask, **named)


def _layer(module: nn.Module) -> int | None:
    index: int | None = getattr(module, "layer_idx", None)
    return index


def _scores(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What eager attention adds to the scores for a boolean mask."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **named: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' eager_attention_forward, computed by the op where the mask allows it.

    Args:
        query: [B, H, T, Dh].
        key, value: [B, Hkv, S, Dh].
        attention_mask: [B, 1, T, S], added to the scores.

    Returns:
        The output [B, T, H, Dh], and the attention weights or None.
    """
    runs = None
    if _is_common(query, key, value, module, named) and ops_apply(module, query, (key, value), attention_mask):
        find = partial(MaskRuns.of, attention_mask, query, key, sliding_window)
        shape = query.shape[0], query.shape[2], key.shape[2], sliding_window
        runs = find() if attention_mask is None else once_a_forward(attention_mask, _layer(module), shape, find)
    if runs is None:
        given = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, **named}
        return _eager(module, query, key, value, attention_mask, given)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    options = {"scale": scale, "softcap": softcap or 0.0, "window": runs.window}
    attended = _attend(query, key, value, runs, options)
    if runs.queries is not None:
        # Eager attention of a query that sees no key is the mean of all values, as all scores are equal.
        mean = value.mean(dim=2, keepdim=True).transpose(1, 2).repeat_interleave(query.shape[1] // key.shape[1], dim=2)
        attended = torch.where(runs.inside[:, :, None, None], attended, mean)
        if (late := runs.late) < query.shape[2]:
            assert attention_mask is not None
            given = {"scaling": scale, "softcap": softcap}
            rest, _ = _eager(module, query[:, :, late:], key, value, attention_mask[:, :, late:], given)
            behind = (runs.slots[late:] >= runs.end[:, None])[:, :, None, None]
            attended[:, late:] = torch.where(behind, rest, attended[:, late:])
    return attended, None


def _is_common(query: Tensor, key: Tensor, value: Tensor, module: nn.Module, named: dict[str, Any]) -> bool:
    """Whether the op supports these shapes and arguments: no attention weights, dropout or sinks."""
    default = getattr(getattr(module, "config", None), "output_attentions", False)
    return (
        not named.get("output_attentions", default)
        and not named.get("dropout")
        and all(name in _IGNORED or argument is None for name, argument in named.items())
        and key.shape == value.shape
        and query.shape[3] == key.shape[3]
        and query.shape[3] in HEAD_DIMS
        and query.shape[1] % key.shape[1] == 0
    )


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, named: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The eager attention of the module's own architecture."""
    modules = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    eager = next(each.eager_attention_forward for each in modules if hasattr(each, "eager_attention_forward"))
    attended: tuple[Tensor, Tensor | None] = eager(module, query, key, value, mask, **named)
    return attended


def _attend(query: Tensor, key: Tensor, value: Tensor, runs: MaskRuns, options: dict[str, Any]) -> Tensor:
    """The output [B, T, H, Dh], not set for queries outside of the interval of their sequence."""
    batch, _, tokens, head_dim = query.shape
    rows, lengths = query.transpose(1, 2), (runs.end - runs.first).to(torch.int32)
    if tokens == 1:
        firsts = runs.first.to(torch.int32) if runs.moved else None
        return _decode(rows[:, 0], key.contiguous(), value.contiguous(), lengths * runs.inside[:, 0], firsts, options)
    if runs.moved:
        # The op expects the tokens of a sequence from slot 0 on. Copies cost a prompt little beside its products.
        slots = torch.arange(key.shape[2], device=key.device)
        order = ((slots + runs.first[:, None]) % len(slots))[:, None, :, None].expand(key.shape)
        key, value = key.gather(2, order), value.gather(2, order)
    key, value = key.contiguous(), value.contiguous()
    starts = torch.zeros(batch + 1, dtype=torch.int32, device=key.device)
    starts[1:] = runs.inside.sum(dim=1).cumsum(dim=0)
    packed = rows.reshape(-1, rows.shape[2], head_dim)
    if runs.queries is None:
        return ops.attention(packed, key, value, starts, lengths, max_seqlen_q=tokens, **options).view(rows.shape)
    inside = ops.attention(packed[runs.queries], key, value, starts, lengths, max_seqlen_q=tokens, **options)
    return torch.zeros_like(packed).index_copy(0, runs.queries, inside).view(rows.shape)


def _decode(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, firsts: Tensor | None, options: dict[str, Any]
) -> Tensor:
    """[B, 1, H, Dh] for one query per sequence: 4 ms a layer less than as a prompt of one token (2.6B, 512 keys, AVX2).

    The op appends the newest key, which transformers has done already: it is given that key again.
    """
    batch, heads, head_dim = query.shape
    newest, row = (lengths - 1).clamp(min=0), torch.arange(batch, device=query.device)
    if firsts is not None:
        newest = (newest + firsts).clamp(max=key.shape[2] - 1)
    qkv = torch.cat([query, key[row, :, newest], value[row, :, newest]], dim=1).flatten(1)
    attended = ops.attention_decode(qkv, key, value, lengths, heads=heads, first_slots=firsts, **options)
    return attended.view(batch, 1, heads, head_dim)
