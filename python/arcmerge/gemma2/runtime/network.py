"""The network in reading order: embedding, decoder layers, final norm. It calls ops and nothing else.

Source: Gemma 2 (arXiv 2408.00118), and transformers' modeling_gemma2.py for every rounding and constant.
"""

from __future__ import annotations

from functools import partial
from typing import TypedDict

import torch
from torch import Tensor

from arcmerge import ops
from arcmerge.gemma2.config import Gemma2Config
from arcmerge.gemma2.runtime.decoder_layer import attention_block, decoder_layer
from arcmerge.gemma2.runtime.kept_graphs import KeptGraphs
from arcmerge.gemma2.runtime.kv_cache import Batch, KVCache
from arcmerge.gemma2.runtime.model_lock import LockedModel
from arcmerge.gemma2.weights import Weights
from arcmerge.ops.rope_cache import rope_table


class _AttentionOptions(TypedDict):
    scale: float
    softcap: float
    window: int
    stepwise: bool


class Network(LockedModel):
    """Maps tokens to the hidden states that the lm_head takes.

    Callers hold `lock` while they run the network or change its weights.

    Args:
        config: the sizes and constants.
        weights: all on one device and in one dtype.
        stepwise: round after every step as transformers does in eager mode. Otherwise the residual stream, RoPE and
            everything inside an op stay in float32, which is closer to exact arithmetic.

    Attributes:
        graphs: what decoding has captured.
    """

    def __init__(self, config: Gemma2Config, weights: Weights, stepwise: bool) -> None:
        super().__init__()
        self.config = config
        self.weights = weights
        self.stepwise = stepwise
        self.graphs = KeptGraphs()
        dtype, device = weights.norm.dtype, weights.norm.device
        self._residual_dtype = dtype if stepwise else torch.float32
        # Training rounded the root to the dtype of the weights, so 59.75 for 9B, not 59.87.
        self._embedding_scale = torch.tensor(config.hidden_size**0.5, dtype=dtype, device=device)
        self._cos_sin = rope_table(
            config.max_position_embeddings, config.head_dim, config.rope_theta, self._residual_dtype, device
        )

    def __call__(self, batch: Batch, cache: KVCache) -> Tensor:
        """Hidden states [T, hidden_size] after the final norm; writes the batch's keys and values to the cache."""
        self.pause_if_exiting()
        return self.layers(self.embed(batch.tokens), batch, cache)

    def embed(self, tokens: Tensor) -> Tensor:
        """The residual stream [T, hidden_size] that the first layer takes."""
        embedded = torch.nn.functional.embedding(tokens, self.weights.embed_tokens)
        return embedded.to(self._residual_dtype) * self._embedding_scale

    def layers(self, residual: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        """Hidden states [T, hidden_size] after all layers and the final norm, computed by ops only."""
        eps, stepwise = self.config.rms_norm_eps, self.stepwise
        layers = self.weights.layers
        next_norms = [*(layer.input_layernorm for layer in layers[1:]), self.weights.norm]
        normed = ops.rmsnorm(residual, layers[0].input_layernorm, eps=eps)
        for index, (layer, next_norm) in enumerate(zip(layers, next_norms, strict=True)):
            attend = partial(self._attend, index, batch=batch, cache=cache)
            attention = partial(attention_block, layer, attend=attend, stepwise=stepwise)
            residual, normed = decoder_layer(layer, residual, normed, attention, next_norm, eps, stepwise)
        return normed

    def most_probable(self, hidden: Tensor) -> Tensor:
        """The most probable next token of each of the hidden states [B, hidden_size]: [B] int64."""
        return ops.lm_head_argmax(
            hidden, self.weights.lm_head, softcap=self.config.final_logit_softcapping, stepwise=self.stepwise
        )

    def _attend(self, index: int, qkv: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        """[T, num_attention_heads * head_dim]: the attention of layer `index`; qkv holds queries, keys and values."""
        config = self.config
        keys, values = cache.layers[index]
        heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
        options = _AttentionOptions(
            scale=config.softmax_scale,
            softcap=config.attn_logit_softcapping,
            window=config.windows[index],
            stepwise=self.stepwise,
        )
        if batch.longest == 1 and len(batch.tokens) == len(batch.lengths):
            return ops.attention_decode(qkv, keys, values, batch.lengths, heads=heads, cos_sin=self._cos_sin, **options)
        split = [heads, key_value_heads, key_value_heads]
        query, key, value = qkv.view(len(qkv), -1, config.head_dim).split(split, dim=1)
        query = ops.rope_cache(query, key, value, self._cos_sin, batch.positions, batch.sequences, keys, values)
        attended = ops.attention(
            query, keys, values, batch.starts, batch.lengths, max_seqlen_q=batch.longest, **options
        )
        return attended.flatten(1)
