"""magnitude_histogram: how many elements of a difference have each magnitude, from which methods take their cuts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from arcmerge import _C
from arcmerge.dispatch.checks import require_alike, require_dtype, shapes
from arcmerge.dispatch.native import native_selection, operand
from arcmerge.dispatch.registry import op
from arcmerge.ops.selection import codes, differences, drawn, row_probabilities


@op()
def magnitude_histogram(
    tensors: Sequence[Tensor],
    base: Tensor,
    keys: Tensor,
    probabilities: Tensor,
    prefixes: Tensor | None,
    row_scales: Tensor | None,
    *,
    joint: bool = False,
    rounded: bool = False,
) -> Tensor:
    """Count the elements of x_i - base by the code of their magnitude (see arcmerge.ops.selection).

    Without `prefixes` the bins are the upper 15 bits of the codes. Elements that a random number drops are counted
    apart from those that it keeps, and if the magnitudes are not rounded, the lower 16 bits of all codes of a bin are
    summed, from which the sum of its magnitudes follows exactly. With `prefixes`, the elements whose upper 15 bits are
    a prefix are counted by their lower 16 bits. Counts are exact in any order. Reads each tensor once.

    Args:
        tensors: k = 1 or more tensors of one shape [*] and device, each bfloat16, float16 or float32.
        base: a tensor of that shape, device and kind.
        keys: int64 [k], the key of the random numbers of each input.
        probabilities: float64 [k, 2], for each input the probability to keep the smallest and the largest element of
            each row (the last dimension). Equal ones are that of all elements; 1 keeps all.
        prefixes: int64 [k, P], for each input the bins to count by their lower bits; None for all bins.
        row_scales: float32 [*] without the last dimension; None for magnitudes of all rows as they are.
        joint: whether magnitudes are the variance over the inputs. All rows of the result are then equal.
        rounded: whether magnitudes are rounded to bfloat16.

    Returns:
        int64 [k, 2, 32768] with `rounded`: the counts of dropped and of kept elements; else [k, 4, 32768], followed by
        the sums of the lower bits of dropped and of kept elements. With `prefixes` int64 [k, P, 65536]: the counts of
        all elements, dropped or kept.

    Raises:
        ArcmergeError: for tensors of different shapes or devices, and other dtypes.
    """
    found = codes(differences(tensors, base), row_scales, joint=joint, rounded=rounded)
    if prefixes is not None:
        rows = [
            torch.bincount(code[code >> 16 == prefix] & 0xFFFF, minlength=65536)
            for code, wanted in zip(found, prefixes, strict=True)
            for prefix in wanted
        ]
        return torch.stack(rows).reshape(*prefixes.shape, 65536) if rows else prefixes.new_empty(len(found), 0, 65536)
    planes = []
    for code, key, (first, last) in zip(found, keys.tolist(), probabilities.tolist(), strict=True):
        kept = drawn(row_probabilities(code, first, last), key)
        parts = [code[~kept], code[kept]]
        planes += [torch.bincount(part >> 16, minlength=32768) for part in parts]
        if not rounded:
            sums = [torch.zeros(32768, dtype=torch.int64, device=code.device) for _ in parts]
            planes += [total.index_add_(0, part >> 16, part & 0xFFFF) for total, part in zip(sums, parts, strict=True)]
    return torch.stack(planes).reshape(len(found), -1, 32768)


@magnitude_histogram.check
def _check(
    tensors: Sequence[Tensor],
    base: Tensor,
    keys: Tensor,
    probabilities: Tensor,
    prefixes: Tensor | None,
    row_scales: Tensor | None,
    *,
    joint: bool,
    rounded: bool,
) -> None:
    require_alike(tensors, base)
    check_draws(len(tensors), keys, probabilities)
    if prefixes is not None:
        require_dtype((torch.int64,), prefixes=prefixes)
        shapes("k P", prefixes=prefixes, k=len(tensors))
    check_row_scales(tensors[0], row_scales)


def check_draws(k: int, keys: Tensor, probabilities: Tensor) -> None:
    """Check the arguments of the random numbers of k inputs."""
    require_dtype((torch.int64,), keys=keys)
    require_dtype((torch.float64,), probabilities=probabilities)
    shapes("k", keys=keys, k=k)
    shapes("k two", probabilities=probabilities, k=k, two=2)


def check_row_scales(tensor: Tensor, row_scales: Tensor | None) -> None:
    """Check that there is one number for each row of a tensor."""
    if row_scales is not None:
        require_dtype((torch.float32,), row_scales=row_scales)
        shapes("... C, ...", tensor=tensor, row_scales=row_scales)


@magnitude_histogram.fake
def _fake(
    tensors: Sequence[Tensor],
    base: Tensor,
    keys: Tensor,
    probabilities: Tensor,
    prefixes: Tensor | None,
    row_scales: Tensor | None,
    *,
    joint: bool,
    rounded: bool,
) -> Tensor:
    if prefixes is not None:
        return tensors[0].new_empty([*prefixes.shape, 65536], dtype=torch.int64)
    return tensors[0].new_empty([len(tensors), 2 if rounded else 4, 32768], dtype=torch.int64)


@magnitude_histogram.native
def _native(
    tensors: Sequence[Tensor],
    base: Tensor,
    keys: Tensor,
    probabilities: Tensor,
    prefixes: Tensor | None,
    row_scales: Tensor | None,
    *,
    joint: bool,
    rounded: bool,
) -> Tensor:
    inputs = [tensor.contiguous() for tensor in [*tensors, base]]
    scales = None if row_scales is None else row_scales.contiguous()
    *operands, base_operand = map(operand, inputs)
    selection = native_selection(base, None, keys, probabilities, scales, joint=joint, rounded=rounded)
    out = _fake(tensors, base, keys, probabilities, prefixes, row_scales, joint=joint, rounded=rounded).zero_()
    if prefixes is None:
        _C.magnitude_histogram(out.data_ptr(), operands, base_operand, selection, 0, base.numel())
    else:
        wanted = prefixes.tolist()
        _C.magnitude_histogram_within(out.data_ptr(), operands, base_operand, selection, wanted, 0, base.numel())
    return out


@magnitude_histogram.triton
def _triton(
    tensors: Sequence[Tensor],
    base: Tensor,
    keys: Tensor,
    probabilities: Tensor,
    prefixes: Tensor | None,
    row_scales: Tensor | None,
    *,
    joint: bool,
    rounded: bool,
) -> Tensor:
    from arcmerge.kernels.magnitude_histogram import magnitude_histogram as launch
    from arcmerge.kernels.selection import Choice, limits, rows

    k = len(tensors)
    by_rank = prefixes is None and bool((probabilities[:, 0] != probabilities[:, 1]).any())
    if by_rank or (joint and k > 8):
        arguments = (tensors, base, keys, probabilities, prefixes, row_scales)
        result: Tensor = magnitude_histogram.implementations["reference"](*arguments, joint=joint, rounded=rounded)
        return result
    inputs = [tensor.contiguous() for tensor in tensors]
    out = _fake(tensors, base, keys, probabilities, prefixes, row_scales, joint=joint, rounded=rounded).zero_()
    if base.numel():
        scales = None if row_scales is None else row_scales.contiguous()
        choice = Choice(
            keys=keys.contiguous(),
            limits=limits(probabilities[:, 0]),
            starts=torch.zeros(k, dtype=torch.int64, device=base.device),
            rows=None if scales is None else rows([scales] * k, [base.shape[-1]] * k),
            joint=joint,
            rounded=rounded,
        )
        groups = [inputs] * k if joint else [[tensor] for tensor in inputs]
        launch(out, groups, [base.contiguous()] * k, choice, prefixes=prefixes)
    return out
