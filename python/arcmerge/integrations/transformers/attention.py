"""arcmerge's attention for transformers, by name and in accelerated models.

Masks are those of transformers' eager attention. The op runs where a mask expresses causality, a sliding window and
padding at the ends; the eager attention of the model's own architecture handles every other mask.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arcmerge import ops
from arcmerge.dispatch.checks import HEAD_DIMS
from arcmerge.errors import needed
from arcmerge.integrations.transformers.conditions import ops_apply

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
        hidden = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, hidden)
    return eager_attention(module, query, key, value, attention_mask, **named)


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
        runs = _MaskRuns.of(attention_mask, query, key, sliding_window)
    if runs is None:
        given = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, **named}
        return _eager(module, query, key, value, attention_mask, given)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    options = {"scale": scale, "softcap": softcap or 0.0, "window": runs.window}
    attended, inside = _attend(query, key, value, runs, options)
    if not inside.all():
        # Eager attention of a query that sees no key is the mean of all values, as all scores are equal.
        mean = value.mean(dim=2, keepdim=True).transpose(1, 2).repeat_interleave(query.shape[1] // key.shape[1], dim=2)
        attended = torch.where(inside[:, :, None, None], attended, mean)
        after = runs.slots >= runs.end[:, None]
        if columns := after.any(dim=0).nonzero().flatten().tolist():
            assert attention_mask is not None
            given = {"scaling": scale, "softcap": softcap}
            rest, _ = _eager(module, query[:, :, columns], key, value, attention_mask[:, :, columns], given)
            attended[:, columns] = torch.where(after[:, columns, None, None], rest, attended[:, columns])
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


def hides_no_key(mask: Tensor | None, keys: int) -> bool:
    """Whether a mask of eager attention lets a single query see all keys."""
    return mask is None or (mask.shape == (1, 1, 1, keys) and mask.is_floating_point() and not mask.any())


class _MaskRuns(NamedTuple):
    """A mask as intervals: query t of sequence b sees the slots from first[b] to end[b], up to its own slot.

    first, end: [B] int64. slots: [T], the slot of each query's own key. window: how many slots up to its own a query
    sees; 0: all.
    """

    first: Tensor
    end: Tensor
    slots: Tensor
    window: int

    @classmethod
    def of(cls, mask: Tensor | None, query: Tensor, key: Tensor, window: int | None) -> _MaskRuns | None:
        """The intervals of a mask; None for any other mask."""
        (batch, _, tokens, _), count, device = query.shape, key.shape[2], key.device
        if mask is None:
            ends = torch.tensor([[0], [count]], device=device).expand(2, batch)
            return cls(ends[0], ends[1], torch.tensor([count - 1], device=device), 0) if tokens == 1 else None
        if not mask.is_floating_point() or mask.shape not in ((batch, 1, tokens, count), (1, 1, tokens, count)):
            return None
        visible = mask[:, 0] == 0
        if not (visible | (mask[:, 0] == torch.finfo(mask.dtype).min)).all():
            return None
        used, indices = visible.any(dim=1).to(torch.uint8), torch.arange(count, device=device)
        first, end = used.argmax(dim=1), count - used.flip(1).argmax(dim=1)
        end = end.where(used.any(dim=1).to(torch.bool), first)
        run = (indices >= first[:, None]) & (indices < end[:, None])
        # The newest key is in the last slot, or, where a cache has free slots, in the last one that a sequence sees.
        for after in dict.fromkeys((count, int(end.max()))):
            slots = torch.arange(after - tokens, after, device=device)
            seen = indices <= slots[:, None]
            if window:
                seen &= indices > slots[:, None] - window
            if after >= tokens and torch.equal(seen & run[:, None], visible):
                return cls(first.expand(batch), end.expand(batch), slots, window or 0)
        return None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, runs: _MaskRuns, options: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """The output [B, T, H, Dh], and which queries are inside the run of their sequence [B, T]; others are not set."""
    batch, _, tokens, head_dim = query.shape
    rows, inside = query.transpose(1, 2), (runs.slots >= runs.first[:, None]) & (runs.slots < runs.end[:, None])
    lengths = (runs.end - runs.first).to(torch.int32)
    if runs.first.any():
        # The op expects the tokens of a sequence from slot 0 on.
        slots = torch.arange(key.shape[2], device=key.device)
        order = ((slots + runs.first[:, None]) % len(slots))[:, None, :, None].expand(key.shape)
        key, value = key.gather(2, order), value.gather(2, order)
    key, value = key.contiguous(), value.contiguous()
    if tokens == 1:
        return _decode(rows[:, 0], key, value, lengths * inside[:, 0], options), inside
    starts = torch.zeros(batch + 1, dtype=torch.int32, device=key.device)
    starts[1:] = inside.sum(dim=1).cumsum(dim=0)
    if inside.all():
        packed = rows.reshape(-1, rows.shape[2], head_dim)
        return ops.attention(packed, key, value, starts, lengths, max_seqlen_q=tokens, **options).view(
            rows.shape
        ), inside
    out = torch.zeros_like(rows, memory_format=torch.contiguous_format)
    out[inside] = ops.attention(rows[inside], key, value, starts, lengths, max_seqlen_q=tokens, **options)
    return out, inside


def _decode(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, options: dict[str, Any]) -> Tensor:
    """[B, 1, H, Dh] for one query per sequence: 4 ms a layer less than as a prompt of one token (2.6B, 512 keys, AVX2).

    The op appends the newest key, which transformers has done already: it is given that key again.
    """
    batch, heads, head_dim = query.shape
    newest, row = (lengths - 1).clamp(min=0), torch.arange(batch, device=query.device)
    qkv = torch.cat([query, key[row, :, newest], value[row, :, newest]], dim=1).flatten(1)
    attended = ops.attention_decode(qkv, key, value, lengths, heads=heads, **options)
    return attended.view(batch, 1, heads, head_dim)
