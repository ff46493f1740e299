"""The memory that a running model needs beside its weights, from its sizes."""

from __future__ import annotations

import torch

from arcmerge.gemma2.config import Gemma2Config
from arcmerge.gemma2.runtime.kept_graphs import PASS_TOKENS
from arcmerge.gemma2.runtime.kv_cache import KVCache

# What cuBLAS takes for matrix products (32 MiB on Hopper), the captured steps, and what the allocator cannot use.
_LIBRARIES = 128 << 20
# Bytes of a row and a tile of the vocabulary in a log-probability, and the ids of the smallest tile.
_PARTIALS, _TILE = 12, 32


def workspace_bytes(config: Gemma2Config, dtype: torch.dtype) -> int:
    """Bytes for one sequence of max_position_embeddings tokens: its cache, and the activations of a pass.

    More or longer sequences at a time need more. So does `Gemma2.logits`, whose result is 1 MB a token.

    Args:
        config: of the model.
        dtype: of the weights and of the cache.
    """
    length = config.max_position_embeddings
    cache = KVCache(config, 1, length, PASS_TOKENS, dtype, torch.device("meta")).nbytes
    heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
    # Elements of a token: the input and the result of a product, or of the op after it, are in memory together.
    attention = (2 * heads + heads + 2 * key_value_heads) * config.head_dim  # q, k and v; rotated queries; the result
    mlp = 3 * config.intermediate_size  # gate and up; their product
    branch = 2 * config.hidden_size  # the normed input and the output of either
    residual = 2 * 4 * config.hidden_size  # before and after the sum, float32
    activations = PASS_TOKENS * ((max(attention, mlp) + branch) * dtype.itemsize + residual)
    # The partial results of the head, when every token of a pass is scored.
    head = PASS_TOKENS * (-(-config.vocab_size // _TILE) * _PARTIALS + branch * dtype.itemsize)
    rope = length * config.head_dim * 4
    return cache + max(activations, head) + rope + _LIBRARIES
