"""linear_geglu, the first half of a Gemma-2 2.6B's MLP, against two linear layers and the activation of torch."""

from __future__ import annotations

from _gemma2_ops import SIZES, Case, cold, counted, nbytes, normal, record
from torch.nn.functional import gelu, linear

from arcmerge import ops


def case(tokens: int) -> Case:
    columns, rows = SIZES.hidden_size, SIZES.intermediate_size
    x = normal(tokens, columns)
    operands = cold(lambda: (x, *(normal(rows, columns, scale=columns**-0.5) for _ in range(2))))
    return Case(
        counted(tokens),
        ours=ops.linear_geglu,
        theirs=lambda x, gate, up: gelu(linear(x, gate), approximate="tanh") * linear(x, up),
        operands=operands,
        moved=nbytes(*operands[0]) + 2 * tokens * rows,
        operations=4 * tokens * rows * columns,
        theirs_name="torch",
    )


if __name__ == "__main__":
    record("linear_geglu", *map(case, (1, 8, 16, 512)))
