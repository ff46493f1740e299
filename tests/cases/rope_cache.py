"""Cases of rope_cache: query, key and value read and written once, and the rows of cos_sin read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arcmerge.kernels.rope_cache import rope_cache
from cases.case import Call, Case, Draw, Expected
from cases.gemma import GEMMA_2

BF16, F32 = torch.bfloat16, torch.float32


def rotate(states: Tensor, cos_sin: Tensor) -> Tensor:
    """The rotation of transformers, in the dtype of cos_sin, rounded to that of the states."""
    half = states.shape[-1] // 2
    converted, cosine, sine = states.to(cos_sin.dtype), cos_sin[:, None, :half], cos_sin[:, None, half:]
    turned = torch.cat([-converted[..., half:], converted[..., :half]], dim=-1)
    return (converted * cosine.repeat(1, 1, 2) + turned * sine.repeat(1, 1, 2)).to(states.dtype)


def build(
    draw: Draw,
    positions: Sequence[int],
    heads: Sequence[int],
    head_dim: int,
    dtypes: Sequence[torch.dtype],
    slots: int,
    sequences: Sequence[int] | None = None,
    skip: int = 0,
) -> Call:
    """A call for one token per position. Padding rows are NaN.

    Args:
        heads: of query and of key.
        dtypes: of the states and of cos_sin.
        skip: 0 if query, key and value are views of one tensor. Otherwise they are three tensors whose rows begin that
            many elements late, twice and three times as many.
    """
    tokens, (query_heads, key_value_heads) = len(positions), heads
    dtype, angle_dtype = dtypes
    of_sequence = list(sequences or [0] * tokens)
    all_heads = query_heads + 2 * key_value_heads
    of_each = [query_heads, key_value_heads, key_value_heads]
    if skip:
        separate = [
            draw.normal(tokens, index * skip + count * head_dim, dtype=dtype)[:, index * skip :]
            for index, count in enumerate(of_each, 1)
        ]
    else:
        separate = list(
            draw.normal(tokens, all_heads * head_dim, dtype=dtype).split([n * head_dim for n in of_each], 1)
        )
    for states in separate:
        states[[token for token in range(tokens) if positions[token] < 0]] = float("nan")
    query, key, value = (states.unflatten(1, (-1, head_dim)) for states in separate)
    cos_sin = draw.normal(max(positions) + 1, head_dim, dtype=angle_dtype)
    position_of, sequence_of = draw.exact(torch.tensor(positions)), draw.exact(torch.tensor(of_sequence))
    caches = [draw.empty(max(of_sequence) + 1, key_value_heads, slots, head_dim, dtype=dtype) for _ in range(2)]
    out = draw.empty(tokens, query_heads, head_dim, dtype=dtype)
    cached = [token for token in range(tokens) if positions[token] >= 0]

    def expected() -> dict[str, Expected]:
        # Equal bits: every step is rounded as plain torch rounds it.
        used = cos_sin[position_of.clamp(min=0)]
        rotated_query, rotated_key = rotate(query, used), rotate(key, used)
        rotated_query[position_of < 0] = 0
        filled = [torch.full_like(cache, float("nan")) for cache in caches]
        for token in cached:
            for cache, states in zip(filled, (rotated_key, value), strict=True):
                cache[of_sequence[token], :, positions[token] % slots] = states[token]
        names = ("out", "key_cache", "value_cache")
        return {name: Expected(tensor) for name, tensor in zip(names, (rotated_query, *filled), strict=True)}

    # A padding row is also read.
    used_rows = len({positions[token] for token in cached})
    moved = tokens * (all_heads + query_heads) + len(cached) * 2 * key_value_heads
    return Call(
        launch=lambda: rope_cache(out, query, key, value, cos_sin, position_of, sequence_of, *caches),
        outputs={"out": out, "key_cache": caches[0], "value_cache": caches[1]},
        expected=expected,
        minimum_bytes=head_dim * (moved * dtype.itemsize + used_rows * angle_dtype.itemsize) + 16 * tokens,
    )


def _case(name: str, *arguments: object, traffic: float | None = 1.0) -> Case:
    return Case("rope_cache", name, lambda draw: build(draw, *arguments), traffic=traffic)


SMALL = [
    _case("bf16, 2.6B", (3, 9), (8, 4), 256, (BF16, F32), 16),
    _case("bf16, 9B, bf16 table", (11,), (16, 8), 256, (BF16, BF16), 16),
    _case("bf16, 2.6B, bf16 table", (11,), (8, 4), 256, (BF16, BF16), 12),
    _case("bf16, 27B", (6,), (32, 16), 128, (BF16, F32), 8),
    _case("round the ring, of 3 sequences", (7, 8, 9, 15, 16), (2, 1), 16, (BF16, F32), 8, (2, 2, 2, 0, 0)),
    _case("padding", (-1, 4, -1, 5), (3, 3), 32, (BF16, BF16), 8, (0, 1, 1, 0)),
    _case("misaligned", (5, 2), (2, 2), 64, (BF16, F32), 7, (0, 1), 3),
    _case("f32, heads of 2", (1, 0, 3), (4, 1), 2, (F32, F32), 5, (1, 0, 1)),
]

# These have thousands of programs; their traffic is that of the few above.
MODELS = [
    _case(
        f"{shape.name} 2048 tokens, {str(table)[6:]} table",
        range(2048),
        (shape.heads, shape.key_value_heads),
        shape.head_dim,
        (BF16, table),
        shape.sliding_window,
        traffic=None,
    )
    for shape in GEMMA_2
    for table in (F32, BF16)
]
