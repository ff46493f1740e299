"""geglu of the two halves of a Gemma-2 2.6B's MLP, against the activation and product of transformers."""

from __future__ import annotations

from _gemma2_ops import SIZES, Case, counted, nbytes, normal, record
from torch.nn.functional import gelu

from arcmerge import ops


def case(tokens: int) -> Case:
    gate, up = normal(tokens, SIZES.intermediate_size), normal(tokens, SIZES.intermediate_size)
    return Case(
        counted(tokens),
        ours=ops.geglu,
        theirs=lambda gate, up: gelu(gate, approximate="tanh") * up,
        operands=[(gate, up)],
        moved=nbytes(gate, up, gate),
    )


if __name__ == "__main__":
    record("geglu", case(1), case(512))
