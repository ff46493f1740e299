"""arcmerge's attention, as transformers calls it by name and as accelerated models do.

Masks are those of transformers' eager attention. Where one says no more than causality, a window and padding at the
ends, the op computes; all else is computed by the eager attention of the model's own architecture.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arcmerge import ops
from arcmerge.dispatch.checks import HEAD_DIMS
from arcmerge.errors import needed
from arcmerge.integrations.transformers.conditions import serves

with needed("transformers", by="arcmerge.integrations.transformers", extra="transformers"):
    from transformers.utils.generic import TransformersKwargs

NAME = "arcmerge"

# What eager attention is given too and does not read; of anything else the op might miss the meaning.
_UNREAD = {*TransformersKwargs.__annotations__, "cache_position", "position_embeddings", "use_cache", "dropout"}


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls by name: takes masks of bool too, True where a query sees a key, as sdpa does."""
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
    """query [B, H, T, Dh], key and value [B, Hkv, S, Dh] -> ([B, T, H, Dh], weights or None).

    attention_mask: what is added to the scores, [B, 1, T, S].
    """
    runs = None
    if _is_common(query, key, value, module, named) and serves(module, query, (key, value), attention_mask):
        runs = _Runs.of(attention_mask, query, key, sliding_window)
    if runs is None:
        given = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, **named}
        return _eager(module, query, key, value, attention_mask, given)
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    attended, asked = _attend(
        query, key, value, runs, {"scale": scale, "softcap": softcap or 0.0, "window": runs.window}
    )
    if not asked.all():
        # What eager attention gives to a query that sees no key: all scores are equally low.
        mean = value.mean(dim=2, keepdim=True).transpose(1, 2).repeat_interleave(query.shape[1] // key.shape[1], dim=2)
        attended = torch.where(asked[:, :, None, None], attended, mean)
        after = runs.places >= runs.end[:, None]
        if columns := after.any(dim=0).nonzero().flatten().tolist():
            assert attention_mask is not None
            given = {"scaling": scale, "softcap": softcap}
            rest, _ = _eager(module, query[:, :, columns], key, value, attention_mask[:, :, columns], given)
            attended[:, columns] = torch.where(after[:, columns, None, None], rest, attended[:, columns])
    return attended, None


def _is_common(query: Tensor, key: Tensor, value: Tensor, module: nn.Module, named: dict[str, Any]) -> bool:
    """Whether shapes and arguments ask for nothing that the op has not: weights, dropout, sinks, other heads."""
    of_config = getattr(getattr(module, "config", None), "output_attentions", False)
    return (
        not named.get("output_attentions", of_config)
        and not named.get("dropout")
        and all(name in _UNREAD or argument is None for name, argument in named.items())
        and key.shape == value.shape
        and query.shape[3] == key.shape[3]
        and query.shape[3] in HEAD_DIMS
        and query.shape[1] % key.shape[1] == 0
    )


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, named: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """The eager attention of the architecture that the module is of."""
    homes = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    eager = next(home.eager_attention_forward for home in homes if hasattr(home, "eager_attention_forward"))
    attended: tuple[Tensor, Tensor | None] = eager(module, query, key, value, mask, **named)
    return attended


def sees_all(mask: Tensor | None, keys: int) -> bool:
    """Whether a mask of eager attention hides none of the keys from a single query."""
    return mask is None or (mask.shape == (1, 1, 1, keys) and mask.is_floating_point() and not mask.any())


class _Runs(NamedTuple):
    """A mask in short: query t of sequence b, in slot places[t], sees the slots from first[b] to end[b] up to its own.

    first, end: [B], int64. places: [T]. window: of the slots up to its own only so many, 0: all.
    """

    first: Tensor
    end: Tensor
    places: Tensor
    window: int

    @classmethod
    def of(cls, mask: Tensor | None, query: Tensor, key: Tensor, window: int | None) -> _Runs | None:
        """None for a mask that says something else."""
        (batch, _, tokens, _), slots, device = query.shape, key.shape[2], key.device
        if mask is None:
            ends = torch.tensor([[0], [slots]], device=device).expand(2, batch)
            return cls(ends[0], ends[1], torch.tensor([slots - 1], device=device), 0) if tokens == 1 else None
        if not mask.is_floating_point() or mask.shape not in ((batch, 1, tokens, slots), (1, 1, tokens, slots)):
            return None
        visible = mask[:, 0] == 0
        if not (visible | (mask[:, 0] == torch.finfo(mask.dtype).min)).all():
            return None
        used, numbers = visible.any(dim=1).to(torch.uint8), torch.arange(slots, device=device)
        first, end = used.argmax(dim=1), slots - used.flip(1).argmax(dim=1)
        end = end.where(used.any(dim=1).to(torch.bool), first)
        run = (numbers >= first[:, None]) & (numbers < end[:, None])
        # The newest key is in the last slot, or in the last that any sequence sees where a cache has room after it.
        for after in dict.fromkeys((slots, int(end.max()))):
            places = torch.arange(after - tokens, after, device=device)
            seen = numbers <= places[:, None]
            if window:
                seen &= numbers > places[:, None] - window
            if after >= tokens and torch.equal(seen & run[:, None], visible):
                return cls(first.expand(batch), end.expand(batch), places, window or 0)
        return None


def _attend(query: Tensor, key: Tensor, value: Tensor, runs: _Runs, how: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """[B, T, H, Dh], and [B, T]: which queries are inside the run of their sequence; others are not set."""
    batch, _, tokens, head_dim = query.shape
    rows, asked = query.transpose(1, 2), (runs.places >= runs.first[:, None]) & (runs.places < runs.end[:, None])
    lengths = (runs.end - runs.first).to(torch.int32)
    if runs.first.any():
        # The op takes the tokens of a sequence from slot 0 on.
        slots = torch.arange(key.shape[2], device=key.device)
        order = ((slots + runs.first[:, None]) % len(slots))[:, None, :, None].expand(key.shape)
        key, value = key.gather(2, order), value.gather(2, order)
    key, value = key.contiguous(), value.contiguous()
    if tokens == 1:
        return _decode(rows[:, 0], key, value, lengths * asked[:, 0], how), asked
    starts = torch.zeros(batch + 1, dtype=torch.int32, device=key.device)
    starts[1:] = asked.sum(dim=1).cumsum(dim=0)
    if asked.all():
        packed = rows.reshape(-1, rows.shape[2], head_dim)
        return ops.attention(packed, key, value, starts, lengths, max_seqlen_q=tokens, **how).view(rows.shape), asked
    out = torch.zeros_like(rows, memory_format=torch.contiguous_format)
    out[asked] = ops.attention(rows[asked], key, value, starts, lengths, max_seqlen_q=tokens, **how)
    return out, asked


def _decode(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, how: dict[str, Any]) -> Tensor:
    """[B, 1, H, Dh], of one query a sequence: 4 ms a layer less than as a prompt of one token (2.6B, 512 keys, AVX2).

    The op appends the newest key, which transformers has done already: it is given that key again.
    """
    batch, heads, head_dim = query.shape
    newest, row = (lengths - 1).clamp(min=0), torch.arange(batch, device=query.device)
    states = [query, key[row, :, newest], value[row, :, newest]]
    qkv = torch.cat(states, dim=1).flatten(1)
    return ops.attention_decode(qkv, key, value, lengths, heads=heads, **how).view(batch, 1, heads, head_dim)
