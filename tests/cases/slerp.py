"""Cases of slerp: both inputs read twice, the output written once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arcmerge.dispatch.registry import OPS
from arcmerge.geometry import NEARLY_PARALLEL, NEARLY_ZERO
from arcmerge.kernels.slerp import slerp
from cases.case import Call, Case, Draw, Expected
from cases.gemma import GEMMA_2

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def whole(draw: Draw, count: int, dtype: torch.dtype) -> Tensor:
    """Whole numbers, of which any order of sums gives the same Gram matrix. So coefficients have the same bits."""
    return draw.normal(count, dtype=dtype, scale=8.0).round()


def build(
    draw: Draw,
    counts: Sequence[int],
    dtypes: Sequence[tuple[torch.dtype, torch.dtype]],
    t: Sequence[float],
    normalize: bool = False,
    skip: int = 0,
    special: bool = False,
) -> Call:
    """A call for one pair per count; every input starts `skip` elements past an aligned address.

    With `special`, one pair is equal, one opposite, one nearly parallel, one has a zero tensor, and others have values
    that are not finite.
    """
    pairs = [
        tuple(whole(draw, count + skip, dtype)[skip:] for dtype in pair)
        for count, pair in zip(counts, dtypes, strict=True)
    ]
    if special:
        (_, equal), (_, opposite), (_, near), (_, zero) = pairs[:4]
        equal.copy_(pairs[0][0])
        opposite.copy_(-pairs[1][0])
        near.copy_(pairs[2][0])
        near[0] += 1
        zero.zero_()
        for a, b in pairs[4:]:
            a[0], b[1], b[2] = -0.0, float("inf"), float("nan")
    outs = [draw.empty(count, dtype=torch.promote_types(*pair)) for count, pair in zip(counts, dtypes, strict=True)]
    positions = draw.exact(torch.tensor(t, dtype=torch.float64))
    nonfinite = draw.exact(torch.zeros(len(counts), dtype=torch.int64))

    def expected() -> dict[str, Expected]:
        reference = OPS["slerp"].implementations["reference"]
        *values, counts = reference([a for a, _ in pairs], [b for _, b in pairs], positions, normalize=normalize)
        return {
            **{f"out {index}": Expected(value) for index, value in enumerate(values)},
            "nonfinite": Expected(counts),
        }

    def launch() -> None:
        limits = {"nearly_parallel": NEARLY_PARALLEL, "nearly_zero": NEARLY_ZERO}
        slerp(outs, pairs, positions, nonfinite, normalize=normalize, **limits)

    return Call(
        launch=launch,
        outputs={**{f"out {index}": tensor for index, tensor in enumerate(outs)}, "nonfinite": nonfinite},
        expected=expected,
        minimum_bytes=sum(
            count * (2 * sum(dtype.itemsize for dtype in pair) + torch.promote_types(*pair).itemsize)
            for count, pair in zip(counts, dtypes, strict=True)
        ),
        reachable=[*outs, *(tensor for pair in pairs for tensor in pair)],
    )


def _case(name: str, *arguments: object, traffic: float | None = None) -> Case:
    return Case("slerp", name, lambda draw: build(draw, *arguments), traffic=traffic)


PAIR = (BF16, BF16)
SPECIAL = (9, 2061, 2061, 5, 2061, 17, 17)

SMALL = [
    _case("bf16, of many lengths", (16384 + 2061, 1, 7, 0, 2048), (PAIR,) * 5, (0.3,)),
    _case("normalized", (16384 + 2061, 1, 7, 0, 2048), (PAIR,) * 5, (0.3, 0.5, -0.4, 0.1, 1.7), True),
    _case("misaligned", (2061, 9), (PAIR,) * 2, (0.6, 0.25), False, 1),
    _case("several dtypes", (2057, 33, 40, 5), (PAIR, (F32, BF16), (F16, BF16), PAIR), (0.3, 0.2, 0.7, 0.9), True),
    _case("no angle, and ends", SPECIAL, (PAIR,) * 7, (0.3, 0.3, 0.3, 0.3, 0.0, 1.0, 0.5), False, 0, True),
    _case("no angle, and ends, normalized", SPECIAL, (PAIR,) * 7, (0.3, 0.3, 0.3, 0.3, 0.0, 1.0, 0.5), True, 0, True),
    # In addition, for each of three segments, 48 bytes of the table written, 40 of them read twice, 4 partial sums
    # written and read; for each of two pairs, 48 bytes to make the table, 24 to sum, two float32 coefficients written
    # and read; and t.
    _case(
        "whole segments",
        (32768, 16384),
        (PAIR,) * 2,
        (0.3,),
        traffic=1 + (3 * (48 + 2 * 40 + 2 * 32) + 2 * (48 + 24 + 2 * 8) + 8) / (10 * 49152),
    ),
]

# A layer has a matrix of this size twice, and norms. More segments would need more blocks for the table than a
# prediction samples, and the rows of the others would be missing.
MODELS = [
    _case(
        f"{shape.name} q_proj and a norm",
        (shape.heads * shape.head_dim * shape.hidden_size, shape.hidden_size),
        (PAIR,) * 2,
        (0.3,),
    )
    for shape in GEMMA_2
]
