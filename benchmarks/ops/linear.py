"""linear of query, key and value, and of down_proj, of a Gemma-2 2.6B, against torch's linear layers."""

from __future__ import annotations

from _gemma2_ops import HEAD_DIM, HEADS, KEY_VALUE_HEADS, SIZES, Case, cold, counted, nbytes, normal, record
from torch.nn.functional import linear

from arcmerge import ops

QKV = (HEADS * HEAD_DIM, KEY_VALUE_HEADS * HEAD_DIM, KEY_VALUE_HEADS * HEAD_DIM)
DOWN = (SIZES.hidden_size,)


def case(name: str, rows: tuple[int, ...], columns: int, tokens: int) -> Case:
    x = normal(tokens, columns)
    operands = cold(lambda: (x, *(normal(count, columns, scale=columns**-0.5) for count in rows)))
    return Case(
        f"{name}, {counted(tokens)}",
        ours=lambda x, *weights: ops.linear(x, weights).split(rows, dim=1),
        theirs=lambda x, *weights: [linear(x, weight) for weight in weights],
        operands=operands,
        moved=nbytes(*operands[0]) + 2 * tokens * sum(rows),
        operations=2 * tokens * sum(rows) * columns,
        theirs_name="torch",
    )


if __name__ == "__main__":
    qkv = [case("q, k, v", QKV, SIZES.hidden_size, tokens) for tokens in (1, 8, 16, 512)]
    record("linear", *qkv, *(case("down", DOWN, SIZES.intermediate_size, tokens) for tokens in (1, 8, 16, 512)))
