"""One token of one sequence through a decoder layer of transformers: a replay of recorded native calls.

Between native calls, each of which evicts everything else from the processor's caches, an operation of torch takes
20 to 40 us and an op 150 (2.6B, EPYC 7003). A layer made of modules has about 40 such calls, this one has six, so that
decoding is 1.66 times as fast as without ops; the same ops called by modules made it 1.37 times as fast.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from arcmerge import ops
from arcmerge.dispatch.recording import recorded
from arcmerge.gemma2.runtime.decoder_layer import attention_block, decoder_layer
from arcmerge.gemma2.weights import LayerWeights
from arcmerge.integrations.transformers.masks import hides_no_key

# Tokens by which the buffers of keys and values grow: 0.5 MB per layer of 2.6B.
_GROWTH = 128


class RotaryTable:
    """transformers' cos and sin of the current step, as a row of the rope table that all layers read."""

    def __init__(self, positions: int) -> None:
        self.positions = positions
        self.lock = threading.Lock()  # held from the writing of the row to the end of the step that reads it
        self._table = torch.empty(0)
        self._written: tuple[Tensor, int] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return RotaryTable, (self.positions,)

    def at(self, embeddings: tuple[Tensor, Tensor], position: int) -> Tensor:
        """[positions, Dh]; row `position` holds `embeddings`, cos and sin [1, 1, Dh]."""
        cosine, sine = embeddings
        if self._written is None or self._written[0] is not cosine or self._written[1] != position:
            head_dim = cosine.shape[2]
            if cosine.device.type != "cpu":
                # A new table for each step: on another stream, a kernel may still read the last one.
                self._table = cosine.new_empty(self.positions, head_dim)
            elif self._table.shape != (self.positions, head_dim) or self._table.dtype != cosine.dtype:
                with torch.inference_mode(False):  # steps outside of that mode could not write to an inference tensor
                    self._table = torch.zeros(self.positions, head_dim, dtype=cosine.dtype)
            torch.cat([cosine[0, 0, : head_dim // 2], sine[0, 0, : head_dim // 2]], out=self._table[position])
            self._written = cosine, position
        return self._table


@dataclass
class _Buffers:
    """Keys and values [1, Hkv, S, Dh] with free slots, and the views of them that a layer of a cache holds."""

    both: tuple[Tensor, Tensor]
    keys: Tensor
    values: Tensor

    @classmethod
    @torch.inference_mode(False)
    @torch.no_grad()
    def copied_from(cls, cached: Any) -> _Buffers:
        _, heads, tokens, head_dim = cached.keys.shape
        slots = (tokens // _GROWTH + 1) * _GROWTH
        buffers = [states.new_zeros(1, heads, slots, head_dim) for states in (cached.keys, cached.values)]
        for buffer, states in zip(buffers, (cached.keys, cached.values), strict=True):
            buffer[:, :, :tokens] = states
        return cls((buffers[0], buffers[1]), cached.keys, cached.values)

    def can_append(self, cached: Any) -> bool:
        """Whether the cache still holds the views that it was given, and a slot is free."""
        full = self.both[0].shape[2] == self.keys.shape[2]
        return not full and cached.keys is self.keys and cached.values is self.values

    def show(self, cached: Any, tokens: int) -> None:
        """Give the cache views of the first `tokens` slots."""
        cached.keys, cached.values = (buffer[:, :, :tokens] for buffer in self.both)
        self.keys, self.values = cached.keys, cached.values
        if cached.is_sliding:
            cached.cumulative_length = tokens


class DecodeStep:
    """A Gemma2DecoderLayer for one token of one sequence.

    The layer of the DynamicCache gets views of larger buffers. They behave like any tensor: changes in place reach the
    buffers, and tensors that replace them are copied to new buffers.
    """

    def __init__(self, layer: Any, rotary: RotaryTable) -> None:
        self._layer = layer
        self._rotary = rotary
        self._buffers: WeakKeyDictionary[Any, _Buffers] = WeakKeyDictionary()
        self._recorded: list[Any] = []

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles, which are parts of a layer's, start without a recording."""
        return DecodeStep, (self._layer, self._rotary)

    def supports(self, x: Tensor, mask: Tensor | None, cache: Any) -> bool:
        """Whether x [B, T, D] is one token that sees all keys of a DynamicCache, which drops and moves no tokens."""
        index = self._layer.self_attn.layer_idx
        if x.shape[:2] != (1, 1) or type(cache) is not DynamicCache or cache.offloading or index >= len(cache.layers):
            return False
        cached: Any = cache.layers[index]
        if type(cached) not in (DynamicLayer, DynamicSlidingWindowLayer) or not cached.is_initialized:
            return False
        length = cached.get_seq_length() + 1
        if cached.is_sliding and (cached.record_past or length >= cached.sliding_window):
            return False
        keys = cached.keys
        is_complete = keys.shape[2] + 1 == length <= self._rotary.positions
        is_alike = keys.dtype == x.dtype and keys.device == x.device and len(keys) == 1
        return is_complete and is_alike and hides_no_key(mask, length, index)

    def __call__(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor], cache: DynamicCache) -> Tensor:
        """[1, 1, D]: the residual stream x [1, 1, D] after the layer; appends its key and value to the cache."""
        cached: Any = cache.layers[self._layer.self_attn.layer_idx]
        with self._rotary.lock:
            buffers = self._buffers.get(cached)
            if buffers is None or not buffers.can_append(cached):
                buffers = self._buffers[cached] = _Buffers.copied_from(cached)
            length = cached.keys.shape[2] + 1
            table = self._rotary.at(position_embeddings, length - 1)
            if x.device.type == "cpu":
                out = self._replayed(x, length, table, buffers)
            else:
                lengths = torch.full((1,), length, dtype=torch.int32, device=x.device)
                out = self._run(x[0], lengths, table, buffers)
            buffers.show(cached, length)
            return out[None]

    def _replayed(self, x: Tensor, length: int, table: Tensor, buffers: _Buffers) -> Tensor:
        tensors = [*self._weights(), table, *buffers.both]
        # A recording holds addresses, which parameters that were replaced or moved have left.
        memory = [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors]
        if (state := [x.dtype, self._eps(), *self._constants().values(), *memory]) != self._recorded:
            self._record(x, length, table, buffers)
            self._recorded = state
        self._x.copy_(x[0])
        self._length.fill_(length)
        if self._recording.whole:
            self._recording.replay()
        else:
            self._out = self._run(self._x, self._length, table, buffers)
        return self._out.clone()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _record(self, x: Tensor, length: int, table: Tensor, buffers: _Buffers) -> None:
        self._x = x[0].clone()
        self._length = torch.full((1,), length, dtype=torch.int32)
        with recorded() as self._recording:
            self._out = self._run(self._x, self._length, table, buffers)

    def _weights(self) -> list[Tensor]:
        weights: list[Tensor] = self._layer.weights()
        return weights

    def _eps(self) -> float:
        eps: float = self._layer.input_layernorm.eps
        return eps

    def _constants(self) -> dict[str, Any]:
        """The arguments of the recorded attention that are no tensors. No window: the mask hides no key."""
        attention = self._layer.self_attn
        return {"scale": attention.scaling, "softcap": attention.attn_logit_softcapping or 0.0}

    def _run(self, x: Tensor, lengths: Tensor, table: Tensor, buffers: _Buffers) -> Tensor:
        weights, eps = LayerWeights(*self._weights()), self._eps()

        def attend(qkv: Tensor) -> Tensor:
            heads = len(weights.q_proj) // self._layer.self_attn.head_dim
            return ops.attention_decode(qkv, *buffers.both, lengths, heads=heads, cos_sin=table, **self._constants())

        normed = ops.rmsnorm(x, weights.input_layernorm, eps=eps)
        attention = partial(attention_block, weights, attend=attend)
        # transformers' next layer applies its own norm. The one that is computed here, with any weight of this size,
        # takes 15 us; on a GPU it is the store of a row. A norm and a sum without it would be two calls.
        unused = weights.post_feedforward_layernorm
        return decoder_layer(weights, x, normed, attention, unused, eps)[0]
