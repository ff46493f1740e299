"""Cases of attention: queries and outputs moved once, and every visible key and value."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from arcmerge.kernels.attention import attention
from cases.case import Call, Case, Draw, Expected
from cases.gemma import GEMMA_2

BF16, F32 = torch.bfloat16, torch.float32
NAN = float("nan")


def exact_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, window: int, reading: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The truth [n, H, Dh] in float64, and the tolerance of a kernel that rounds weights to `reading`.

    The tolerance is that of these roundings: the output and the weights, to `reading`; the scores, which are float32
    sums of Dh products and have the error of float32 at the softcap; the sums of L weights, in float32.

    Args:
        query: [n, H, Dh], the last of L tokens.
        key, value: [Hkv, L, Dh].
    """
    count, heads, head_dim = query.shape
    tokens = key.shape[1]
    shared = heads // key.shape[0]
    diagonal = torch.ones(count, tokens, dtype=torch.bool).tril(tokens - count)
    if window:
        diagonal = diagonal.triu(tokens - count - window + 1)
    truths, tolerances = [], []
    for head in range(heads):
        keys, values = key[head // shared].double(), value[head // shared].double()
        queries = query[:, head].double()
        scores = scale * torch.einsum("id,jd->ij", queries, keys)
        rounded = torch.einsum("id,jd->ij", queries.abs(), keys.abs()) * scale * head_dim * 2.0**-24
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        rounded = rounded + 2.0**-22 * max(softcap, float(scores.abs().max()))
        weights = torch.where(diagonal, torch.exp(scores - torch.where(diagonal, scores, -1e9).amax(1, True)), 0.0)
        weights = weights / weights.sum(1, keepdim=True)
        relative = (2 * (rounded * diagonal).amax(1, keepdim=True)).expm1() + tokens * 2.0**-24
        truth, size = weights @ values, weights @ values.abs()
        tolerance = 2.0**-23 * truth.abs() + relative * size
        if reading == BF16:
            # Roundings of weights are independent: the deviation of their sum is 0.58 of this root; `size` bounds it.
            spread = 4 * (weights.square() @ values.square()).sqrt()
            tolerance += 2.0**-8 * torch.minimum(spread, size)
            # Half of a unit in the last of 8 places; a number near a power of two may be rounded beyond it.
            tolerance += torch.exp2(torch.frexp(truth.abs() + tolerance).exponent - 9.0)
        truths.append(truth)
        tolerances.append(tolerance)
    return torch.stack(truths, 1), torch.stack(tolerances, 1)


def cache_positions(length: int, slots: int, seen: int) -> tuple[Tensor, Tensor]:
    """The slots of the last `seen` tokens, in the order of their positions, and the slots that hold none of them."""
    used = torch.arange(length - seen, length) % slots
    others = torch.ones(slots, dtype=torch.bool)
    others[used] = False
    return used, others.nonzero()[:, 0]


def build(
    draw: Draw,
    sequences: Sequence[tuple[int, int]],
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype = BF16,
    slots: int = 0,
    window: int = 0,
    softcap: float = 50.0,
    scale: float = 0.0625,
    loud: float = 1.0,
    positive: bool = False,
    skip: int = 0,
) -> Call:
    """A call for one sequence per pair (new tokens, length). Slots that no query sees are NaN.

    Args:
        heads: of queries and of keys.
        slots: of the cache; by default as many as the longest sequence needs.
        loud: the scale of the queries.
        positive: make all values positive.
        skip: elements by which every tensor starts past an aligned address.
    """
    (query_heads, key_value_heads), longest = heads, max(new for new, _ in sequences)
    slots = slots or max(length for _, length in sequences)

    def tensor(*shape: int, loud: float = 1.0) -> Tensor:
        count = torch.Size(shape).numel()
        return draw.normal(count + skip, dtype=dtype, scale=loud)[skip:].view(shape)

    starts = [0, *accumulate(new for new, _ in sequences)]
    query = tensor(starts[-1], query_heads, head_dim, loud=loud)
    keys = tensor(len(sequences), key_value_heads, slots, head_dim)
    values = tensor(len(sequences), key_value_heads, slots, head_dim)
    if positive:
        values.abs_()
    seen = [min(length, window + new - 1) if window else length for new, length in sequences]
    placed = [cache_positions(length, slots, count) for (_, length), count in zip(sequences, seen, strict=True)]
    for index, (_, unseen) in enumerate(placed):
        keys[index, :, unseen] = values[index, :, unseen] = NAN
    cu_seqlens_q = draw.exact(torch.tensor(starts, dtype=torch.int32))
    seqlens_k = draw.exact(torch.tensor([length for _, length in sequences], dtype=torch.int32))
    out = draw.empty(starts[-1] * query_heads * head_dim + skip, dtype=dtype)[skip:].view(query.shape)

    def expected() -> dict[str, Expected]:
        results = [
            exact_attention(
                query[starts[index] : starts[index + 1]],
                keys[index][:, used],
                values[index][:, used],
                scale,
                softcap,
                window,
                dtype,
            )
            for index, (used, _) in enumerate(placed)
            if starts[index] < starts[index + 1]
        ]
        return {"out": Expected(*(torch.cat(parts) for parts in zip(*results, strict=True)))}

    pairs = sum(
        min(position + 1, window or position + 1) for new, end in sequences for position in range(end - new, end)
    )
    cached = sum(count for (new, _), count in zip(sequences, seen, strict=True) if new)
    moved = 2 * starts[-1] * query_heads + 2 * cached * key_value_heads
    return Call(
        launch=lambda: attention(
            out,
            query,
            keys,
            values,
            cu_seqlens_q,
            seqlens_k,
            max_seqlen_q=longest,
            scale=scale,
            softcap=softcap,
            window=window,
        ),
        outputs={"out": out},
        expected=expected,
        minimum_bytes=moved * head_dim * dtype.itemsize + 8 * len(sequences) + 4,
        operations=4 * pairs * query_heads * head_dim,
    )


def _case(name: str, *arguments: object, **named: object) -> Case:

    def build_case(draw: Draw) -> Call:
        return build(draw, *arguments, **named)

    # Matrix instructions add in another order than the interpreter.
    return Case("attention", name, build_case, exact=False, traffic=1.0)


ROUND_TILES = {"window": 70, "positive": True, "loud": 0.2}

SMALL = [
    # In bfloat16, a tile has 32 tokens, and 32 keys for heads of 256, 64 for others.
    _case("heads of 256", ((33, 33), (0, 5), (1, 40), (31, 65)), (2, 1), 256, loud=30.0),
    _case("heads of 256, a window of 8 in a ring", ((17, 17), (9, 73)), (2, 1), 256, slots=64, window=8, loud=5.0),
    _case("heads of 256, a window of 70", ((32, 161),), (2, 1), 256, window=70),
    _case("heads of 128, 2 of keys", ((32, 64), (34, 97), (1, 1)), (4, 2), 128, loud=300.0),
    _case("heads of 128, a window of 33 in a ring", ((33, 300), (1, 128)), (2, 1), 128, slots=128, window=33, loud=5.0),
    # The first key that the last token does not see any more begins a tile, of 32 or 64 keys, and the first that the
    # first token does not see yet ends one.
    _case("heads of 256, a window of 70, round tiles", ((1, 135), (3, 199), (5, 131)), (2, 1), 256, **ROUND_TILES),
    _case("heads of 128, a window of 70, round tiles", ((1, 135), (3, 199), (5, 131)), (4, 2), 128, **ROUND_TILES),
    # Three tiles of 64 keys, but not a whole count of any larger ones.
    _case("heads of 256, a ring of 192", ((40, 600), (3, 200)), (2, 1), 256, slots=192, window=100, loud=2.0),
    _case("heads of 128, a ring of 192", ((40, 600), (3, 200)), (2, 1), 128, slots=192, window=100, loud=2.0),
    # More rows than a tile has, and each stage of a ring of tiles twice or more.
    _case("heads of 256, each with its keys", ((130, 400),), (1, 1), 256),
    _case("heads of 128, 3 a group, no softcap", ((50, 640),), (3, 1), 128, softcap=0.0, loud=2.0),
    _case("positive values", ((3, 500),), (2, 1), 64, positive=True),
    _case("f32 heads of 64, no softcap", ((17, 18), (3, 33)), (2, 2), 64, F32, softcap=0.0, loud=5.0),
    _case(
        "f32 heads of 16, round a window of 8",
        ((1, 7), (1, 8), (1, 9), (8, 17), (17, 17), (1, 17)),
        (4, 1),
        16,
        F32,
        slots=64,
        window=8,
        loud=30.0,
    ),
    _case("3 heads a group, misaligned", ((11, 20), (45, 50)), (3, 1), 32, softcap=0.0, scale=0.2, skip=1),
]

MODELS = [
    _case(
        f"{shape.name} {tokens} tokens{f', a window of {window}' if window else ''}",
        ((tokens, tokens),),
        (shape.heads, shape.key_value_heads),
        shape.head_dim,
        window=window,
        softcap=shape.softcap,
        scale=shape.query_pre_attn_scalar**-0.5,
    )
    for shape in GEMMA_2
    for tokens in (2048, 8192)
    for window in (0, shape.sliding_window)
]
