"""The modules of transformers' Gemma-2, whose forwards call arcmerge's ops.

Each subclasses the module that it replaces, so that isinstance, copies and pickles work. Where `conditions` do not
hold, or where a submodule is not that of a plain Gemma-2 (an adapter, or a module with a hook, which an op would skip),
transformers' own forward runs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.gemma2 import modeling_gemma2 as gemma2

from arcmerge import ops
from arcmerge.dispatch.checks import HEAD_DIMS
from arcmerge.gemma2.runtime.decoder_layer import decoder_layer, mlp
from arcmerge.gemma2.weights import LayerWeights
from arcmerge.integrations.transformers.attention import NAME, attention_forward, eager_attention
from arcmerge.integrations.transformers.conditions import is_unmodified, ops_apply
from arcmerge.integrations.transformers.decode import DecodeStep

_GELU = type(ACT2FN["gelu_pytorch_tanh"])
# Attention implementations that take eager attention's masks.
_ATTENTION = {"eager": eager_attention, NAME: attention_forward}


class Norm(gemma2.Gemma2RMSNorm):
    """RMSNorm by one op."""

    def forward(self, x: Tensor) -> Tensor:
        if not ops_apply(self, x, [self.weight]):
            return super().forward(x)
        return ops.rmsnorm(x, self.weight, eps=self.eps)


class Linear(nn.Linear):
    """A linear layer without bias."""

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight) if ops_apply(self, x, [self.weight]) else super().forward(x)


class MLP(gemma2.Gemma2MLP):
    """The gated MLP by two ops."""

    def is_plain(self) -> bool:
        """True if activation and projections are those of a plain Gemma-2."""
        return is_unmodified(self.act_fn, _GELU) and _are_linear(self.gate_proj, self.up_proj, self.down_proj)

    def weights(self) -> list[Tensor]:
        return [self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight]

    def forward(self, x: Tensor) -> Tensor:
        if not (self.is_plain() and ops_apply(self, x, self.weights())):
            return super().forward(x)
        gate, up, down = self.weights()
        return mlp(x.flatten(0, -2), gate, up, down).view(x.shape)


class Attention(gemma2.Gemma2Attention):
    """Projections, RoPE and attention by ops, with the caches and masks of transformers."""

    def is_plain(self) -> bool:
        """True if the implementation of attention, the head size and the projections are supported."""
        is_known = self.config._attn_implementation in _ATTENTION and self.head_dim in HEAD_DIMS
        return is_known and _are_linear(self.q_proj, self.k_proj, self.v_proj, self.o_proj)

    def weights(self) -> list[Tensor]:
        return [self.q_proj.weight, self.k_proj.weight, self.v_proj.weight, self.o_proj.weight]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **named: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cache = named.pop("past_key_values", cache)  # its name before transformers 5.20
        others = *position_embeddings, attention_mask, *_cached_states(cache, self.layer_idx)
        replaced = self.is_plain() and ops_apply(self, hidden_states, self.weights(), *others)
        if not (replaced and _is_rotation_of(hidden_states, *position_embeddings)):
            return super().forward(hidden_states, position_embeddings, attention_mask, cache, **named)
        batch, tokens = hidden_states.shape[:-1]
        *projections, output = self.weights()
        heads = [len(weight) // self.head_dim for weight in projections]
        qkv = ops.linear(hidden_states.flatten(0, -2), projections)
        query, key, value = qkv.view(len(qkv), -1, self.head_dim).split(heads, dim=1)
        # One op, in place of fourteen of torch, writes keys and values to new tensors in the layout of a cache.
        states = key.new_empty(2, batch, heads[1], tokens, self.head_dim)
        query = ops.rope_cache(query, key, value, *_rotation(*position_embeddings, batch, tokens), *states)
        query, (key, value) = query.view(batch, tokens, -1, self.head_dim).transpose(1, 2), states
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attended, weights = _ATTENTION[self.config._attn_implementation](
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            softcap=self.attn_logit_softcapping,
            **named,
        )
        return _linear(attended.flatten(2), output), weights


class DecoderLayer(gemma2.Gemma2DecoderLayer):
    """A decoder layer that runs as a few ops if none of its submodules was changed.

    Attributes:
        step: runs the layer for one token of one sequence.
    """

    step: DecodeStep
    self_attn: Attention
    mlp: MLP

    def is_plain(self) -> bool:
        """True if the layer can run without calls of its submodules."""
        attention, mlp, norms = self.self_attn, self.mlp, self._norms()
        return (
            all(is_unmodified(norm, Norm) and norm.eps == norms[0].eps for norm in norms)
            and (is_unmodified(attention, Attention) and attention.is_plain())
            and (is_unmodified(mlp, MLP) and mlp.is_plain())
        )

    def weights(self) -> list[Tensor]:
        """In the order of the fields of LayerWeights."""
        first, second, third, last = (norm.weight for norm in self._norms())
        return [first, *self.self_attn.weights(), second, third, *self.mlp.weights(), last]

    def _norms(self) -> list[Any]:
        names = "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
        return [getattr(self, name) for name in names]

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        **named: Any,
    ) -> Tensor:
        cache = named.pop("past_key_values", cache)
        others = *position_embeddings, attention_mask, *_cached_states(cache, self.self_attn.layer_idx)
        replaced = self.is_plain() and ops_apply(self, hidden_states, self.weights(), *others)
        if not (replaced and _is_rotation_of(hidden_states, *position_embeddings)):
            return super().forward(hidden_states, position_embeddings, attention_mask, position_ids, cache, **named)
        if self.step.supports(hidden_states, attention_mask, cache):
            return self.step(hidden_states, position_embeddings, cache)

        def attention(normed: Tensor) -> Tensor:
            attended, _ = self.self_attn(
                hidden_states=normed.view(hidden_states.shape),
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                position_ids=position_ids,
                cache=cache,
                **named,
            )
            return attended.flatten(0, 1)

        weights, eps = LayerWeights(*self.weights()), self.input_layernorm.eps
        residual = hidden_states.flatten(0, 1)
        normed = ops.rmsnorm(residual, weights.input_layernorm, eps=eps)
        unused = weights.post_feedforward_layernorm  # the next layer applies its own norm
        residual, _ = decoder_layer(weights, residual, normed, attention, unused, eps)
        return residual.view(hidden_states.shape)


# Modules and their replacements. The lm_head is the only linear layer that is not part of another module.
REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {
    gemma2.Gemma2RMSNorm: Norm,
    gemma2.Gemma2MLP: MLP,
    gemma2.Gemma2Attention: Attention,
    gemma2.Gemma2DecoderLayer: DecoderLayer,
}


def _are_linear(*parts: Any) -> bool:
    return all(is_unmodified(part, nn.Linear) and part.bias is None for part in parts)


def _cached_states(cache: Any, layer: int) -> tuple[Any, ...]:
    """Keys and values in a cache, which need gradients where they are a learned prefix."""
    layers = getattr(cache, "layers", ()) if torch.is_grad_enabled() else ()
    return (layers[layer].keys, layers[layer].values) if layer < len(layers) else ()


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return ops.linear(x.flatten(0, -2), [weight]).view(*x.shape[:-1], -1)


def _is_rotation_of(x: Tensor, cosine: Tensor, sine: Tensor) -> bool:
    """Whether cos and sin [1 or B, 1 or T, Dh] broadcast to x [B, T, D], and x not to them."""
    is_pair = cosine.shape == sine.shape and cosine.dtype == sine.dtype == x.dtype
    return (
        is_pair and x.dim() == 3 and all(size in (1, of) for size, of in zip(cosine.shape[:2], x.shape, strict=False))
    )


@lru_cache(maxsize=1)  # all layers of a step share one
def _rotation(cosine: Tensor, sine: Tensor, batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Table, positions and sequences for ops.rope_cache, from cos and sin whose two halves are equal."""
    half = cosine.shape[2] // 2
    table = (
        torch.cat([cosine[..., :half], sine[..., :half]], dim=2).expand(batch, tokens, -1).flatten(0, 1).contiguous()
    )
    rows = torch.arange(len(table), device=table.device)
    return table, rows, rows // tokens
