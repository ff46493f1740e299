"""rmsnorm of the hidden states of a Gemma-2 2.6B, against Gemma2RMSNorm of transformers."""

from __future__ import annotations

from _gemma2_ops import EPSILON, SIZES, Case, counted, nbytes, norm, normal, record

from arcmerge import ops


def case(tokens: int) -> Case:
    x, weight = normal(tokens, SIZES.hidden_size), normal(SIZES.hidden_size, scale=0.3)
    module = norm(weight)
    return Case(
        counted(tokens),
        ours=lambda x, weight: ops.rmsnorm(x, weight, eps=EPSILON),
        theirs=lambda x, _: module(x),
        operands=[(x, weight)],
        moved=nbytes(x, x, weight),
    )


if __name__ == "__main__":
    record("rmsnorm", case(1), case(512))
