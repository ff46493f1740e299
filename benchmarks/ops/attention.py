"""attention of a prompt in a Gemma-2 2.6B, against transformers' eager attention with its mask."""

from __future__ import annotations

import torch
from _gemma2_ops import HEAD_DIM, HEADS, KEY_VALUE_HEADS, SCALE, SOFTCAP, Case, eager_attention, nbytes, normal, record
from torch import Tensor

from arcmerge import ops


def case(tokens: int, window: int) -> Case:
    """window: 0 for a global layer."""
    query = normal(tokens, HEADS, HEAD_DIM)
    keys, values = (normal(1, KEY_VALUE_HEADS, tokens, HEAD_DIM) for _ in range(2))
    starts, lengths = torch.tensor([0, tokens], dtype=torch.int32), torch.tensor([tokens], dtype=torch.int32)
    ages = torch.arange(tokens)[:, None] - torch.arange(tokens)
    visible = (ages >= 0) & (ages < (window or tokens))
    mask = torch.zeros(tokens, tokens).masked_fill(~visible, float("-inf")).bfloat16()[None, None]

    def ours(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        limits = {"scale": SCALE, "softcap": SOFTCAP, "window": window}
        return ops.attention(query, keys, values, starts, lengths, max_seqlen_q=tokens, **limits)

    def theirs(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        states = query.transpose(0, 1)[None]
        return eager_attention(states, keys, values, mask)

    return Case(
        f"{tokens} tokens" + (f", window {window}" if window else ""),
        ours,
        theirs,
        operands=[(query, keys, values)],
        moved=nbytes(query, keys, values, query),
        operations=4 * HEADS * HEAD_DIM * int(visible.sum()),
    )


if __name__ == "__main__":
    record("attention", case(512, 0), case(2048, 512))
