"""rope_cache of a Gemma-2 2.6B: rotation, and keys and values into the cache; against the two in transformers."""

from __future__ import annotations

import torch
from _gemma2_ops import HEAD_DIM, HEADS, KEY_VALUE_HEADS, THETA, Case, counted, nbytes, normal, record
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import apply_rotary_pos_emb

from arcmerge import ops
from arcmerge.ops.rope_cache import rope_table


def case(tokens: int) -> Case:
    query, key, value = (normal(tokens, heads, HEAD_DIM) for heads in (HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS))
    caches = [torch.zeros(1, KEY_VALUE_HEADS, 2 * tokens, HEAD_DIM, dtype=torch.bfloat16) for _ in range(2)]
    table = rope_table(tokens, HEAD_DIM, THETA, torch.float32, "cpu")
    cosine, sine = (half.repeat(1, 2)[None].bfloat16() for half in table.chunk(2, dim=1))
    positions, sequences = torch.arange(tokens), torch.zeros(tokens, dtype=torch.int64)

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return ops.rope_cache(query, key, value, table, positions, sequences, *caches)

    def theirs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        states = (tensor.transpose(0, 1)[None] for tensor in (query, key))
        rotated, key = apply_rotary_pos_emb(*states, cosine, sine)
        for cache, new in zip(caches, (key, value.transpose(0, 1)[None]), strict=True):
            cache.index_copy_(2, positions, new)  # as a StaticCache does it
        return rotated[0].transpose(0, 1)

    moved = 2 * nbytes(query, key, value) + nbytes(table)
    return Case(counted(tokens), ours, theirs, [(query, key, value)], moved)


if __name__ == "__main__":
    record("rope_cache", case(1), case(512))
