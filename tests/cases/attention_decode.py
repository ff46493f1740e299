"""Cases of attention_decode: the visible keys and values read once, and the new ones written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arcmerge.kernels.attention_decode import attention_decode, splits
from cases.attention import BF16, F32, NAN, cache_positions, exact_attention
from cases.case import Call, Case, Draw, Expected
from cases.gemma import GEMMA_2
from cases.rope_cache import rotate


def build(
    draw: Draw,
    lengths: Sequence[int],
    heads: tuple[int, int],
    head_dim: int,
    dtypes: tuple[torch.dtype, torch.dtype] = (BF16, F32),
    slots: int = 0,
    window: int = 0,
    softcap: float = 50.0,
    scale: float = 0.0625,
    loud: float = 1.0,
    positive: bool = False,
    skip: int = 0,
    firsts: Sequence[int] | None = None,
) -> Call:
    """A call for one sequence per length. Slots that are not visible are NaN, also the slot of the new token.

    Args:
        dtypes: of the states and of cos_sin.
        loud: the scale of all states.
        firsts: for each sequence, the slot of its first token.

    The other arguments are those of the cases of attention.
    """
    (query_heads, key_value_heads), (dtype, angle_dtype) = heads, dtypes
    group, sequences = query_heads // key_value_heads, len(lengths)
    slots = slots or max(lengths)

    def tensor(*shape: int, loud: float = 1.0) -> Tensor:
        count = torch.Size(shape).numel()
        return draw.normal(count + skip, dtype=dtype, scale=loud)[skip:].view(shape)

    qkv = tensor(sequences, (query_heads + 2 * key_value_heads) * head_dim, loud=loud)
    cos_sin = draw.normal(max(lengths), head_dim, dtype=angle_dtype)
    keys = tensor(sequences, key_value_heads, slots, head_dim)
    values = tensor(sequences, key_value_heads, slots, head_dim)
    if positive:
        qkv.abs_()
        values.abs_()
    seen = [min(length, window or length) for length in lengths]
    placed = [cache_positions(length, slots, count) for length, count in zip(lengths, seen, strict=True)]
    starts = firsts or [0] * sequences
    placed = [
        ((used + start) % slots, (unseen + start) % slots) for (used, unseen), start in zip(placed, starts, strict=True)
    ]
    for index, (used, unseen) in enumerate(placed):
        hidden = torch.cat([unseen, used[-1:]])
        keys[index, :, hidden] = values[index, :, hidden] = NAN
    before = keys.clone(), values.clone()
    counters = draw.exact(torch.zeros(sequences, key_value_heads, dtype=torch.int32))
    seqlens_k = draw.exact(torch.tensor(lengths, dtype=torch.int32))
    first_slots = None if firsts is None else draw.exact(torch.tensor(firsts, dtype=torch.int32))
    number_of_splits = splits(slots, key_value_heads)
    partial = draw.empty(sequences, key_value_heads, number_of_splits, group, head_dim, dtype=F32)
    statistics = draw.empty(sequences, key_value_heads, number_of_splits, group, 2, dtype=F32)
    out = draw.empty(sequences * query_heads * head_dim + skip, dtype=dtype)[skip:].view(sequences, -1)

    def expected() -> dict[str, Expected]:
        true_keys, true_values = before
        states = qkv.unflatten(1, (-1, head_dim))
        angles = cos_sin[(seqlens_k - 1).clamp(min=0)]
        query, key = rotate(states[:, :query_heads], angles), rotate(states[:, query_heads:-key_value_heads], angles)
        truth = torch.zeros(sequences, query_heads, head_dim, dtype=torch.float64)
        tolerance = torch.zeros_like(truth)
        for index, (used, _) in enumerate(placed):
            if not lengths[index]:
                continue
            true_keys[index, :, used[-1]] = key[index]
            true_values[index, :, used[-1]] = states[index, -key_value_heads:]
            truth[index], tolerance[index] = (
                result[0]
                for result in exact_attention(
                    query[index : index + 1],
                    true_keys[index][:, used],
                    true_values[index][:, used],
                    scale,
                    softcap,
                    window,
                    dtype,
                )
            )
        return {
            "out": Expected(truth.flatten(1), tolerance.flatten(1)),
            # Equal bits: every step is rounded as plain torch rounds it.
            "key_cache": Expected(true_keys),
            "value_cache": Expected(true_values),
            "counters": Expected(torch.zeros_like(counters)),
        }

    busy = sum(length > 0 for length in lengths)
    moved = (query_heads + 4 * key_value_heads) * busy + 2 * key_value_heads * sum(count - 1 for count in seen if count)
    row = head_dim * dtype.itemsize
    return Call(
        launch=lambda: attention_decode(
            out,
            partial,
            statistics,
            counters,
            qkv,
            keys,
            values,
            seqlens_k,
            cos_sin,
            first_slots=first_slots,
            heads=query_heads,
            scale=scale,
            softcap=softcap,
            window=window,
        ),
        outputs={"out": out, "key_cache": keys, "value_cache": values, "counters": counters},
        expected=expected,
        minimum_bytes=moved * row
        + out.numel() * dtype.itemsize
        + busy * head_dim * angle_dtype.itemsize
        + 4 * sequences,
        operations=4 * sum(seen) * query_heads * head_dim,
    )


def _case(name: str, *arguments: object, traffic: float | None = None, **named: object) -> Case:

    def build_case(draw: Draw) -> Call:
        return build(draw, *arguments, **named)

    # Matrix instructions add in another order than the interpreter.
    return Case("attention_decode", name, build_case, exact=False, traffic=traffic)


SMALL = [
    # Splits have 128 keys, or 256 with more than 4 key-value heads.
    _case("heads of 256, round splits", (1, 128, 129, 0, 257), (2, 1), 256, slots=300, loud=5.0),
    _case("heads of 256, a window of 100 in a ring", (99, 130, 256, 400), (2, 1), 256, slots=384, window=100, loud=2.0),
    # In addition, 256 sums and 2 statistics in float32 for each of 8 splits and 2 heads, written and read, and the
    # counter: more than 1 % over, which buys enough programs; see the op.
    _case("heads of 256, 8 splits", (1024,), (2, 1), 256, traffic=1 + (8 * 2 * (256 + 2) * 4 * 2 + 4) / 1052676),
    _case("heads of 128, 5 of keys", (255, 257), (10, 5), 128, loud=5.0),
    _case("heads of 128, a window of 300 in a ring", (640,), (10, 5), 128, slots=320, window=300, loud=2.0),
    _case("positive values, bf16 table", (400,), (2, 1), 32, (BF16, BF16), positive=True),
    _case("f32 heads of 64, no softcap", (17, 131), (2, 2), 64, (F32, F32), softcap=0.0, loud=2.0),
    _case(
        "f32 heads of 16, round a window of 8",
        (0, *range(7, 18)),
        (4, 1),
        16,
        (F32, F32),
        slots=13,
        window=8,
        loud=5.0,
    ),
    _case("padded on the left", (300, 1, 0, 170), (2, 1), 32, slots=301, firsts=(1, 300, 7, 131), loud=3.0),
    _case(
        "starts in the middle of a ring, a window of 100",
        (130, 400, 90),
        (2, 1),
        32,
        slots=384,
        window=100,
        firsts=(300, 5, 383),
    ),
    _case("3 heads a group, misaligned", (20, 130), (3, 1), 32, softcap=0.0, scale=0.2, skip=1),
]

MODELS = [
    _case(
        f"{shape.name} {tokens} tokens{f', a window of {window}' if window else ''}",
        (tokens,),
        (shape.heads, shape.key_value_heads),
        shape.head_dim,
        slots=4160 if window else 8192,
        window=window,
        softcap=shape.softcap,
        scale=shape.query_pre_attn_scalar**-0.5,
    )
    for shape in GEMMA_2
    for tokens in (512, 4096, 8192)
    for window in (0, shape.sliding_window)
]
