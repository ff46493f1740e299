"""rmsnorm_add_rmsnorm between two linear layers of a Gemma-2 2.6B, against the three steps of transformers."""

from __future__ import annotations

from _gemma2_ops import EPSILON, SIZES, Case, counted, nbytes, norm, normal, record
from torch import Tensor

from arcmerge import ops


def case(tokens: int) -> Case:
    branch, residual = normal(tokens, SIZES.hidden_size), normal(tokens, SIZES.hidden_size)
    weights = normal(SIZES.hidden_size, scale=0.3), normal(SIZES.hidden_size, scale=0.3)
    post, pre = map(norm, weights)

    def theirs(branch: Tensor, residual: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + post(branch)
        return total, pre(total)

    return Case(
        counted(tokens),
        ours=lambda *operands: ops.rmsnorm_add_rmsnorm(*operands, eps=EPSILON),
        theirs=theirs,
        operands=[(branch, residual, *weights)],
        moved=nbytes(branch, residual, branch, residual, *weights),
    )


if __name__ == "__main__":
    record("rmsnorm_add_rmsnorm", case(1), case(512))
