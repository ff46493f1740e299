"""attention_decode of one token in a Gemma-2 2.6B: rotation, append, attention; against the three in transformers."""

from __future__ import annotations

import torch
from _gemma2_ops import (
    HEAD_DIM,
    HEADS,
    KEY_VALUE_HEADS,
    SCALE,
    SOFTCAP,
    THETA,
    Case,
    cold,
    eager_attention,
    nbytes,
    normal,
    record,
)
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import apply_rotary_pos_emb

from arcmerge import ops
from arcmerge.ops.rope_cache import rope_table


def case(context: int, sequences: int) -> Case:
    """context: tokens of each sequence with the new one."""
    qkv = normal(sequences, (HEADS + 2 * KEY_VALUE_HEADS) * HEAD_DIM)
    operands = cold(lambda: (qkv, *(normal(sequences, KEY_VALUE_HEADS, context, HEAD_DIM) for _ in range(2))))
    table = rope_table(context, HEAD_DIM, THETA, torch.float32, "cpu")
    cosine, sine = (half[-1:].repeat(1, 2)[None].bfloat16() for half in table.chunk(2, dim=1))
    lengths = torch.full((sequences,), context, dtype=torch.int32)

    def ours(qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return ops.attention_decode(
            qkv, keys, values, lengths, heads=HEADS, cos_sin=table, scale=SCALE, softcap=SOFTCAP
        )

    def theirs(qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        states = qkv.view(sequences, 1, -1, HEAD_DIM).transpose(1, 2)
        query, key, value = states.split([HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS], dim=1)
        query, key = apply_rotary_pos_emb(query, key, cosine, sine)
        keys[:, :, -1:], values[:, :, -1:] = key, value  # as a StaticCache does it; a DynamicCache copies all
        return eager_attention(query, keys, values, None)

    return Case(
        f"{sequences} x {context} tokens",
        ours,
        theirs,
        operands,
        moved=nbytes(*operands[0], table[-1:]) + 2 * sequences * HEADS * HEAD_DIM,
        operations=4 * sequences * HEADS * HEAD_DIM * context,
    )


if __name__ == "__main__":
    record("attention_decode", case(512, 1), case(4096, 1), case(512, 8))
