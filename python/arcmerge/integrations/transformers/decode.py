"""One token of one sequence through a decoder layer of transformers: one replay of native calls.

Between native calls, each of which pushes everything else out of the processor's caches, an operation of torch takes
20 to 40 us and an op 150 (2.6B, EPYC 7003): a layer as modules makes some 40 of them, here it makes six. So decoding
is 1.66 times as fast as without ops, where calls of the same ops by modules were 1.37 times.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from arcmerge import ops
from arcmerge.dispatch.recording import recorded
from arcmerge.integrations.transformers.attention import sees_all

# Tokens for which keys and values get room at once: 0.5 MB a layer of 2.6B.
_ROOM = 128


class Rotation:
    """transformers' cos and sin of a step, as the row of a rope table that all layers read."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.lock = threading.Lock()  # of the row from its writing to the end of the step that reads it
        self._table = torch.empty(0)
        self._written: tuple[Tensor, int] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Rotation, (self.positions,)

    def table(self, embeddings: tuple[Tensor, Tensor], position: int) -> Tensor:
        """[positions, Dh], of which row `position` is that of embeddings: cos and sin [1, 1, Dh]."""
        cosine, sine = embeddings
        if self._written is None or self._written[0] is not cosine or self._written[1] != position:
            head_dim = cosine.shape[2]
            if self._table.shape != (self.positions, head_dim) or self._table.dtype != cosine.dtype:
                with torch.inference_mode(False):  # or no step outside of that mode could write to it
                    self._table = torch.zeros(self.positions, head_dim, dtype=cosine.dtype)
            torch.cat([cosine[0, 0, : head_dim // 2], sine[0, 0, : head_dim // 2]], out=self._table[position])
            self._written = cosine, position
        return self._table


@dataclass
class _Room:
    """Keys and values [1, Hkv, S, Dh] with free slots, and the views of them that a layer of a cache holds."""

    buffers: tuple[Tensor, Tensor]
    keys: Tensor
    values: Tensor

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def of(cls, kept: Any) -> _Room:
        _, heads, tokens, head_dim = kept.keys.shape
        slots = (tokens // _ROOM + 1) * _ROOM
        buffers = [states.new_zeros(1, heads, slots, head_dim) for states in (kept.keys, kept.values)]
        for buffer, states in zip(buffers, (kept.keys, kept.values), strict=True):
            buffer[:, :, :tokens] = states
        return cls((buffers[0], buffers[1]), kept.keys, kept.values)

    def serves(self, kept: Any) -> bool:
        """Whether the cache still holds the views that it was given, and there is a free slot."""
        full = self.buffers[0].shape[2] == self.keys.shape[2]
        return not full and kept.keys is self.keys and kept.values is self.values

    def grow(self, kept: Any, tokens: int) -> None:
        """Let the cache see `tokens` slots."""
        kept.keys, kept.values = (buffer[:, :, :tokens] for buffer in self.buffers)
        self.keys, self.values = kept.keys, kept.values
        if kept.is_sliding:
            kept.cumulative_length = tokens


class DecodingStep:
    """A Gemma2DecoderLayer for one token of one sequence, whose DynamicCache gets views of buffers with room for more.

    Those views are as good as other tensors: changes in place reach the buffers, and what replaces them is copied anew.
    """

    def __init__(self, layer: Any, rotation: Rotation) -> None:
        self._layer = layer
        self._rotation = rotation
        self._rooms: WeakKeyDictionary[Any, _Room] = WeakKeyDictionary()
        self._recorded: list[Any] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles, as parts of a layer's, begin anew."""
        return DecodingStep, (self._layer, self._rotation)

    def serves(self, x: Tensor, mask: Tensor | None, cache: Any) -> bool:
        """x: [B, T, D]. Whether it is one token that sees all of a DynamicCache, which does not drop or move tokens."""
        number = self._layer.self_attn.layer_idx
        if x.shape[:2] != (1, 1) or type(cache) is not DynamicCache or cache.offloading or number >= len(cache.layers):
            return False
        kept: Any = cache.layers[number]
        if type(kept) not in (DynamicLayer, DynamicSlidingWindowLayer) or not kept.is_initialized:
            return False
        length = kept.get_seq_length() + 1
        if kept.is_sliding and (kept.record_past or length >= kept.sliding_window):
            return False
        keys = kept.keys
        is_whole = keys.shape[2] + 1 == length <= self._rotation.positions
        return is_whole and keys.dtype == x.dtype and len(keys) == 1 and sees_all(mask, length)

    def __call__(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], cache: DynamicCache) -> Tensor:
        """[1, 1, D] of x [1, 1, D], the residual stream; its key and value go to the cache."""
        kept: Any = cache.layers[self._layer.self_attn.layer_idx]
        with self._rotation.lock:
            room = self._rooms.get(kept)
            if room is None or not room.serves(kept):
                room = self._rooms[kept] = _Room.of(kept)
            length = kept.keys.shape[2] + 1
            table = self._rotation.table(position_embeddings, length - 1)
            reads = [*self._weights(), table, *room.buffers]
            # Parameters that were replaced or moved would leave a recording with addresses of nothing.
            memory = [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in reads]
            if (now := [x.dtype, self._eps(), *self._numbers().values(), *memory]) != self._recorded:
                self._record(x, length, table, room)
                self._recorded = now
            self._x.copy_(x[0])
            self._length.fill_(length)
            if self._recording.whole:
                self._recording.replay()
            else:
                self._out = self._through(table, room)
            room.grow(kept, length)
            return self._out.clone()[None]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _record(self, x: Tensor, length: int, table: Tensor, room: _Room) -> None:
        self._x = x[0].clone()
        self._length = torch.full((1,), length, dtype=torch.int32)
        with recorded() as self._recording:
            self._out = self._through(table, room)

    def _weights(self) -> list[Tensor]:
        weights: list[Tensor] = self._layer.weights()
        return weights

    def _eps(self) -> float:
        eps: float = self._layer.input_layernorm.eps
        return eps

    def _numbers(self) -> dict[str, Any]:
        """What the recorded calls are given beside tensors. The mask has said that no window hides a key."""
        attention = self._layer.self_attn
        return {"scale": attention.scaling, "softcap": attention.attn_logit_softcapping or 0.0}

    def _through(self, table: Tensor, room: _Room) -> Tensor:
        query, key, value, output, gate, up, down, *norms = self._weights()
        eps = self._eps()
        qkv = ops.linear(ops.rmsnorm(self._x, norms[0], eps=eps), [query, key, value])
        attended = ops.attention_decode(
            qkv,
            *room.buffers,
            self._length,
            heads=len(query) // self._layer.self_attn.head_dim,
            cos_sin=table,
            **self._numbers(),
        )
        branch = ops.linear(attended, [output])
        residual, normed = ops.rmsnorm_add_rmsnorm(branch, self._x, norms[1], norms[2], eps=eps)
        branch = ops.linear(ops.linear_geglu(normed, gate, up), [down])
        # Of the sum alone; that its norm is computed too costs 15 us.
        return ops.rmsnorm_add_rmsnorm(branch, residual, norms[3], norms[3], eps=eps)[0]
