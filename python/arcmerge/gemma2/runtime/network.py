"""The network in reading order: embedding, layers, final norm. It calls ops and nothing else.

Source: Gemma 2 (arXiv 2408.00118), and transformers' modeling_gemma2.py for every rounding and constant.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from arcmerge import ops
from arcmerge.gemma2.config import Config
from arcmerge.gemma2.runtime.kv_cache import Batch, KVCache
from arcmerge.gemma2.runtime.shared import Shared
from arcmerge.gemma2.weights import Weights
from arcmerge.ops.rope_cache import rope_table


class _Attention(TypedDict):
    scale: float
    softcap: float
    window: int
    stepwise: bool


class Network(Shared):
    """From tokens to the normed hidden states that the head takes.

    stepwise: round after every step as transformers does in eager mode. Otherwise the residual stream, RoPE and
    everything inside an op stay in float32, which is closer to what the weights mean.
    Whoever runs it or changes its weights holds its turn.
    """

    def __init__(self, config: Config, weights: Weights, stepwise: bool) -> None:
        super().__init__()
        self.config = config
        self.weights = weights
        self.stepwise = stepwise
        dtype, device = weights.norm.dtype, weights.norm.device
        self._residual_dtype = dtype if stepwise else torch.float32
        # Training rounded the root to the dtype of the weights, so 59.75 for 9B, not 59.87.
        self._embedding_scale = torch.tensor(config.hidden_size**0.5, dtype=dtype, device=device)
        self._cos_sin = rope_table(
            config.max_position_embeddings, config.head_dim, config.rope_theta, self._residual_dtype, device
        )

    def __call__(self, batch: Batch, cache: KVCache) -> Tensor:
        """Hidden states [T, hidden_size] after the final norm; writes the batch's keys and values to the cache."""
        self.stand_still_at_end()
        return self.layers(self.embed(batch.tokens), batch, cache)

    def embed(self, tokens: Tensor) -> Tensor:
        """The residual stream [T, hidden_size] with which the layers begin."""
        embedded = torch.nn.functional.embedding(tokens, self.weights.embed_tokens)
        return embedded.to(self._residual_dtype) * self._embedding_scale

    def layers(self, residual: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        """Hidden states after all layers and the final norm, by ops alone."""
        config, weights = self.config, self.weights
        following = [*(layer.input_layernorm for layer in weights.layers[1:]), weights.norm]

        normed = ops.rmsnorm(residual, weights.layers[0].input_layernorm, eps=config.rms_norm_eps)
        for number, layer in enumerate(weights.layers):
            qkv = ops.linear(normed, [layer.q_proj, layer.k_proj, layer.v_proj], stepwise=self.stepwise)
            attended = self._attend(number, qkv, batch, cache)
            branch = ops.linear(attended, [layer.o_proj], stepwise=self.stepwise)
            residual, normed = ops.rmsnorm_add_rmsnorm(
                branch,
                residual,
                layer.post_attention_layernorm,
                layer.pre_feedforward_layernorm,
                eps=config.rms_norm_eps,
            )
            inner = ops.linear_geglu(normed, layer.gate_proj, layer.up_proj, stepwise=self.stepwise)
            branch = ops.linear(inner, [layer.down_proj], stepwise=self.stepwise)
            residual, normed = ops.rmsnorm_add_rmsnorm(
                branch, residual, layer.post_feedforward_layernorm, following[number], eps=config.rms_norm_eps
            )
        return normed

    def _attend(self, number: int, qkv: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        """[T, num_attention_heads * head_dim] of a layer, from its queries, keys and values side by side."""
        config = self.config
        keys, values = cache.layers[number]
        heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        how = _Attention(
            scale=config.softmax_scale,
            softcap=config.attn_logit_softcapping,
            window=config.windows[number],
            stepwise=self.stepwise,
        )
        if batch.longest == 1 and len(batch.tokens) == len(batch.lengths):
            return ops.attention_decode(qkv, keys, values, batch.lengths, heads=heads, cos_sin=self._cos_sin, **how)
        query, key, value = qkv.view(len(qkv), -1, config.head_dim).split([heads, key_heads, key_heads], dim=1)
        query = ops.rope_cache(query, key, value, self._cos_sin, batch.positions, batch.sequences, keys, values)
        attended = ops.attention(query, keys, values, batch.starts, batch.lengths, max_seqlen_q=batch.longest, **how)
        return attended.flatten(1)
