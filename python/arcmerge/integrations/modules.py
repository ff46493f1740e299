"""The modules of transformers' Gemma-2 with forwards by arcmerge's ops.

Each is a kind of the module that it takes the place of, so that what looks for that one finds it, and copies and
pickles are whole. Where gradients are recorded, or where a part is not that of a plain Gemma-2, as an adapter or one
with a hook that an op would pass over, the forward is that of transformers.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma2 import modeling_gemma2 as gemma2

from arcmerge import ops
from arcmerge.integrations.attention import NAME
from arcmerge.integrations.decoding import DecodingStep


class Norm(gemma2.Gemma2RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        if _recorded(self, x):
            return super().forward(x)
        return ops.rmsnorm(x, self.weight, self.eps).to(x.dtype)


class Linear(nn.Linear):
    """One that has no bias."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if _recorded(self, x) else _linear(x, self.weight)


class MLP(gemma2.Gemma2MLP):
    def is_plain(self) -> bool:
        is_known = self.config.hidden_activation == "gelu_pytorch_tanh"
        return is_known and _are_linear(self.gate_proj, self.up_proj, self.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        if _recorded(self, x) or not self.is_plain():
            return super().forward(x)
        inner = ops.linear_geglu(x.flatten(0, -2), self.gate_proj.weight, self.up_proj.weight)
        return _linear(inner, self.down_proj.weight).view(x.shape)


class Attention(gemma2.Gemma2Attention):
    def is_plain(self) -> bool:
        return _are_linear(self.q_proj, self.k_proj, self.v_proj, self.o_proj)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        **named: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cache = named.pop("past_key_values", cache)  # as it was called before transformers 5.20
        if _recorded(self, hidden_states) or not self.is_plain():
            return super().forward(hidden_states, position_embeddings, attention_mask, cache, **named)
        batch, tokens = hidden_states.shape[:-1]
        projections = [self.q_proj.weight, self.k_proj.weight, self.v_proj.weight]
        heads = [len(weight) // self.head_dim for weight in projections]
        qkv = ops.linear(hidden_states.flatten(0, -2), projections)
        query, key, value = qkv.view(len(qkv), -1, self.head_dim).split(heads, dim=1)
        # Into tensors of their own, as a cache takes them: by one op for fourteen of torch.
        states = key.new_empty(2, batch, heads[1], tokens, self.head_dim)
        query = ops.rope_cache(query, key, value, *_rotation(*position_embeddings, batch), *states)
        query, (key, value) = query.view(batch, tokens, -1, self.head_dim).transpose(1, 2), states
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, gemma2.eager_attention_forward)
        attended, weights = attend(
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
        return _linear(attended.flatten(2), self.o_proj.weight), weights


class DecoderLayer(gemma2.Gemma2DecoderLayer):
    """step: what serves it when there is one token."""

    step: DecodingStep

    def is_plain(self) -> bool:
        """Whether nothing would be missed if none of the modules inside were called."""
        parts: list[tuple[Any, type]] = [(self.self_attn, Attention), (self.mlp, MLP)]
        return self._norms_are_plain() and all(_is_untouched(part, kind) and part.is_plain() for part, kind in parts)

    def _norms_are_plain(self) -> bool:
        return all(_is_untouched(norm, Norm) for norm in self._norms())

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
        if _recorded(self, hidden_states) or not self._norms_are_plain():
            return super().forward(hidden_states, position_embeddings, attention_mask, position_ids, cache, **named)
        by_us = attention_mask is None and self.config._attn_implementation == NAME
        if by_us and self.step.serves(hidden_states, cache) and self.is_plain():
            return self.step(hidden_states, position_embeddings, cache)
        first, second, third, last = self._norms()
        branch, _ = self.self_attn(
            hidden_states=ops.rmsnorm(hidden_states, first.weight, first.eps),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            **named,
        )
        residual, normed = ops.rmsnorm_add_rmsnorm(branch, hidden_states, second.weight, third.weight, third.eps)
        return residual + ops.rmsnorm(self.mlp(normed), last.weight, last.eps)


# What takes the place of what. The head is the only linear layer that is not part of another module.
OURS: dict[type[nn.Module], type[nn.Module]] = {
    gemma2.Gemma2RMSNorm: Norm,
    gemma2.Gemma2MLP: MLP,
    gemma2.Gemma2Attention: Attention,
    gemma2.Gemma2DecoderLayer: DecoderLayer,
}


def _recorded(module: nn.Module, x: Tensor) -> bool:
    """Whether gradients are wanted of the input or of a weight."""
    return torch.is_grad_enabled() and (x.requires_grad or any(weight.requires_grad for weight in module.parameters()))


def _is_untouched(part: nn.Module, kind: type) -> bool:
    """Whether a part is of that kind, and would do nothing but its forward if it were called."""
    return type(part) is kind and not (part._forward_hooks or part._forward_pre_hooks or "forward" in vars(part))


def _are_linear(*parts: Any) -> bool:
    return all(_is_untouched(part, nn.Linear) and part.bias is None for part in parts)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return ops.linear(x.flatten(0, -2), [weight]).view(*x.shape[:-1], -1)


@lru_cache(maxsize=1)  # Every layer of a step asks for the same.
def _rotation(cosine: Tensor, sine: Tensor, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Table, positions and sequences for ops.rope_cache, of cos and sin [1 or B, T, Dh] whose halves are the same."""
    half = cosine.shape[2] // 2
    table = torch.cat([cosine[..., :half], sine[..., :half]], dim=2).expand(batch, -1, -1).flatten(0, 1).contiguous()
    rows = torch.arange(len(table), device=table.device)
    return table, rows, rows // cosine.shape[1]
