"""consensus_combine: adds to a base the differences that are kept and that agree on a sign."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.checks import WEIGHTS, require, require_alike, require_dtype, shapes
from arcmerge.dispatch.native import native_dtype, native_selection, operand
from arcmerge.dispatch.registry import op
from arcmerge.ops.magnitude_histogram import check_draws, check_row_scales
from arcmerge.ops.selection import between, codes, differences, drawn, row_probabilities

ELECTIONS = ("none", "sum", "count")


@op()
def consensus_combine(
    tensors: Sequence[Tensor],
    base: Tensor,
    factors: Tensor,
    cuts: Tensor,
    keys: Tensor,
    probabilities: Tensor,
    row_scales: Tensor | None,
    *,
    out_dtype: torch.dtype,
    election: str = "none",
    zero_is_negative: bool = False,
    floor: float = 0.0,
    inverse: bool = False,
    joint: bool = False,
    rounded: bool = False,
) -> Tensor:
    """out = base + sum_i v_i d_i / sum_i s_i over the inputs i whose element is kept and agrees, rounded once.

        d_i   = x_i - base where it lies between the cuts and a random number keeps it, else 0
        sign  = that of sum_i e_i d_i, or of sum_i sign(e_i d_i) if the election is "count"
        i agrees if e_i d_i has this sign and is not 0; if the election is "none", if d_i is not 0

    e_i, v_i and s_i are the vote, the value and the share of an input. If a single input is kept and agrees, its v_i is
    `alone`. Every operation is rounded to float32, sums from left to right, without FMA; the result is rounded to
    out_dtype, to nearest even. Where a difference is NaN or infinite, the result is NaN. Moves the bytes of the inputs,
    the base and the output once.

    Args:
        tensors: k = 1 or more tensors of one shape [*] and device, each bfloat16, float16 or float32.
        base: a tensor of that shape, device and kind.
        factors: float32 [k, 4], the vote, value, share and alone of each input.
        cuts: int64 [k, 4], see arcmerge.ops.selection.between.
        keys: int64 [k], the key of the random numbers of each input.
        probabilities: float64 [k, 2], for each input the probability to keep the smallest and the largest element of
            each row (the last dimension). Equal ones are that of all elements; 1 keeps all.
        row_scales: float32 [*] without the last dimension; None for magnitudes of all rows as they are.
        out_dtype: bfloat16, float16 or float32.
        election: "none", "sum" or "count".
        zero_is_negative: whether a sum of votes that is 0 elects the negative sign.
        floor: the smallest sum of shares; 0 for any, where a sum of exactly 0 counts as 1.
        inverse: whether d_i is divided by its probability.
        joint: whether magnitudes are the variance over the inputs.
        rounded: whether magnitudes are rounded to bfloat16.

    Returns:
        A new contiguous tensor of the shape and on the device of the tensors.

    Raises:
        ArcmergeError: for tensors of different shapes or devices, other dtypes, and another `election`.
    """
    kept = differences(tensors, base)
    finite = kept.isfinite().all(0)
    found = codes(kept, row_scales, joint=joint, rounded=rounded)
    for index, (key, (first, last)) in enumerate(zip(keys.tolist(), probabilities.tolist(), strict=True)):
        chances = row_probabilities(found[index], first, last)
        chosen = between(found[index], cuts[index].tolist()) & drawn(chances, key)
        difference = kept[index] * chances.reciprocal().float() if inverse else kept[index]
        kept[index] = torch.where(chosen, difference, 0.0)
    vote, value, share, alone = factors.reshape(len(tensors), 4, *[1] * base.ndim).unbind(1)
    if election == "none":
        agrees = kept != 0
    else:
        votes = vote * kept
        total = _sum(votes.sign() if election == "count" else votes)
        negative = total <= 0 if zero_is_negative else total < 0
        agrees = torch.where(negative, votes < 0, votes > 0)
    value = torch.where(agrees.sum(0) == 1, alone, value)
    numerator = _sum(torch.where(agrees, value * kept, 0.0))
    denominator = _sum(torch.where(agrees, share, 0.0))
    denominator = denominator.clamp(min=floor) if floor else torch.where(denominator == 0, 1.0, denominator)
    out = base.float() + numerator / denominator
    return torch.where(finite, out, float("nan")).to(out_dtype).contiguous()


def _sum(terms: Tensor) -> Tensor:
    """The sum over the first dimension, from left to right."""
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


@consensus_combine.check
def _check(
    tensors: Sequence[Tensor],
    base: Tensor,
    factors: Tensor,
    cuts: Tensor,
    keys: Tensor,
    probabilities: Tensor,
    row_scales: Tensor | None,
    *,
    out_dtype: torch.dtype,
    election: str,
    **_: object,
) -> None:
    require_alike(tensors, base)
    require_dtype((torch.float32,), factors=factors)
    require_dtype((torch.int64,), cuts=cuts)
    require_dtype(WEIGHTS, out_dtype=out_dtype)
    shapes("k four, k four", factors=factors, cuts=cuts, k=len(tensors), four=4)
    check_draws(len(tensors), keys, probabilities)
    check_row_scales(tensors[0], row_scales)
    require(election in ELECTIONS, "election", f"be one of {', '.join(ELECTIONS)}", repr(election))


@consensus_combine.fake
def _fake(tensors: Sequence[Tensor], *_: object, out_dtype: torch.dtype, **__: object) -> Tensor:
    return tensors[0].new_empty(tensors[0].shape, dtype=out_dtype)


@consensus_combine.native
def _native(
    tensors: Sequence[Tensor],
    base: Tensor,
    factors: Tensor,
    cuts: Tensor,
    keys: Tensor,
    probabilities: Tensor,
    row_scales: Tensor | None,
    *,
    out_dtype: torch.dtype,
    election: str,
    zero_is_negative: bool,
    floor: float,
    inverse: bool,
    joint: bool,
    rounded: bool,
) -> Tensor:
    inputs = [tensor.contiguous() for tensor in [*tensors, base]]
    scales = None if row_scales is None else row_scales.contiguous()
    *operands, base_operand = map(operand, inputs)
    out = _fake(tensors, out_dtype=out_dtype)
    _C.consensus_combine(
        out.data_ptr(),
        native_dtype(out_dtype),
        operands,
        base_operand,
        native_selection(base, cuts, keys, probabilities, scales, joint=joint, rounded=rounded),
        _C.Consensus(factors.tolist(), ELECTIONS.index(election), zero_is_negative, floor, inverse),
        [(0, 0)] * len(operands),
        0,
        out.numel(),
    )
    return out


@consensus_combine.triton
def _triton(
    tensors: Sequence[Tensor],
    base: Tensor,
    factors: Tensor,
    cuts: Tensor,
    keys: Tensor,
    probabilities: Tensor,
    row_scales: Tensor | None,
    *,
    out_dtype: torch.dtype,
    election: str,
    zero_is_negative: bool,
    floor: float,
    inverse: bool,
    joint: bool,
    rounded: bool,
) -> Tensor:
    from arcmerge.kernels.consensus_combine import consensus_combine as launch
    from arcmerge.kernels.selection import Choice, limits, rows

    chance = probabilities[:, 0]
    if len(tensors) > 8 or bool((chance != probabilities[:, 1]).any()):
        result: Tensor = consensus_combine.implementations["reference"](
            tensors,
            base,
            factors,
            cuts,
            keys,
            probabilities,
            row_scales,
            out_dtype=out_dtype,
            election=election,
            zero_is_negative=zero_is_negative,
            floor=floor,
            inverse=inverse,
            joint=joint,
            rounded=rounded,
        )
        return result
    out = _fake(tensors, out_dtype=out_dtype)
    if base.numel():
        row_numbers = None if row_scales is None else row_scales.contiguous()
        choice = Choice(
            keys=keys[None].contiguous(),
            limits=limits(chance)[None],
            starts=torch.zeros(1, dtype=torch.int64, device=base.device),
            rows=None if row_numbers is None else rows([row_numbers], [base.shape[-1]]),
            joint=joint,
            rounded=rounded,
        )
        ranks = cuts[:, 1::2]
        launch(
            [out],
            [[tensor.contiguous() for tensor in tensors]],
            [base.contiguous()],
            factors[None].contiguous(),
            cuts[None].contiguous(),
            choice,
            torch.zeros(1, dtype=torch.int64, device=base.device),
            scales=chance.reciprocal().float()[None] if inverse else None,
            election=election,
            zero_is_negative=zero_is_negative,
            floor=floor,
            ranked=bool(((ranks > 0) & (ranks < base.numel())).any()),
        )
    return out
