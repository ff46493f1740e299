"""The decoder layer of Gemma-2, as the network, and the transformers integration, run it.

Source: Gemma 2 (arXiv 2408.00118); Gemma2DecoderLayer of transformers' modeling_gemma2.py.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from arcmerge import ops
from arcmerge.gemma2.weights import LayerWeights


def decoder_layer(
    weights: LayerWeights,
    residual: Tensor,
    normed: Tensor,
    attention: Callable[[Tensor], Tensor],
    next_norm: Tensor,
    eps: float,
    stepwise: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run one layer.

    Args:
        weights: of this layer; its `input_layernorm` is not applied here.
        residual: [T, D], the residual stream.
        normed: [T, D], the residual stream after `input_layernorm`.
        attention: maps `normed` to the output [T, D] of the attention block, usually `attention_block`.
        next_norm: [D], the norm that is applied to the result: the next layer's `input_layernorm` or the final norm.
        eps: of every RMSNorm.
        stepwise: round after every step, as transformers does.

    Returns:
        The residual stream after the layer and its `next_norm`, both [T, D].
    """
    residual, normed = ops.rmsnorm_add_rmsnorm(
        attention(normed), residual, weights.post_attention_layernorm, weights.pre_feedforward_layernorm, eps=eps
    )
    inner = mlp(normed, weights.gate_proj, weights.up_proj, weights.down_proj, stepwise)
    return ops.rmsnorm_add_rmsnorm(inner, residual, weights.post_feedforward_layernorm, next_norm, eps=eps)


def attention_block(
    weights: LayerWeights, normed: Tensor, attend: Callable[[Tensor], Tensor], stepwise: bool = False
) -> Tensor:
    """The attention block of a layer: its projections around `attend`.

    Args:
        weights: of the layer.
        normed: [T, D], the input.
        attend: maps queries, keys and values [T, (H + 2 * Hkv) * Dh] to [T, H * Dh].
        stepwise: as in `decoder_layer`.

    Returns:
        [T, D].
    """
    qkv = ops.linear(normed, [weights.q_proj, weights.k_proj, weights.v_proj], stepwise=stepwise)
    return ops.linear(attend(qkv), [weights.o_proj], stepwise=stepwise)


def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, stepwise: bool = False) -> Tensor:
    """[T, D]: the gated MLP of x [T, D]."""
    return ops.linear(ops.linear_geglu(x, gate, up, stepwise=stepwise), [down], stepwise=stepwise)
