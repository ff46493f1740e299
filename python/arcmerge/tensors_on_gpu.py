"""Gram matrices and weighted sums of many tensors on GPUs: launches and waits that do not grow with their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from arcmerge.dispatch.checks import WEIGHTS
from arcmerge.merging.execution.gpu.resident import MOST_INPUTS, ResidentSums, WeightedSum
from arcmerge.merging.execution.memory import offsets_of
from arcmerge.merging.methods.rule import Array


def by_gpu(tensors: Mapping[str, Sequence[Tensor]]) -> dict[torch.device, list[str]]:
    """The names whose tensors the kernels take, by their GPU."""
    found: dict[torch.device, list[str]] = {}
    for name, inputs in tensors.items():
        if on_gpu(inputs[0]) and all(tensor.dtype in WEIGHTS for tensor in inputs):
            found.setdefault(inputs[0].device, []).append(name)
    return found


def on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def grams(groups: Mapping[str, tuple[Sequence[Tensor], int, bool]]) -> dict[str, Array]:
    """The Gram matrices (k, k) of groups of tensors on one device.

    Two launches for each number of inputs and combination of dtypes, and one wait.

    Args:
        groups: for each its tensors, the index of the base among them, and whether it is subtracted from the others, of
            which the matrix is then.
    """
    from arcmerge.kernels.gram import gram

    alike: dict[tuple[int, bool], list[str]] = {}
    for name, (tensors, _, centered) in groups.items():
        alike.setdefault((len(tensors) - centered, centered), []).append(name)
    if not groups:
        return {}
    device = next(iter(groups.values()))[0][0].device
    sizes = [k * k * len(names) for (k, _), names in alike.items()]
    out = torch.empty(sum(sizes), dtype=torch.float64, device=device)
    for ((k, centered), names), part in zip(alike.items(), out.split(sizes), strict=True):
        inputs = [[tensor.contiguous() for tensor in groups[name][0]] for name in names]
        bases = [each.pop(groups[name][1]) for each, name in zip(inputs, names, strict=True) if centered]
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            gram(inputs, part.view(-1, k, k), bases=bases or None)
    return {
        name: matrix.numpy()
        for ((k, _), names), part in zip(alike.items(), out.cpu().split(sizes), strict=True)
        for name, matrix in zip(names, part.view(-1, k, k), strict=True)
    }


def weighted_sums(parts: Mapping[str, tuple[Sequence[Tensor], Array, torch.dtype]]) -> dict[str, Tensor]:
    """The sums of coefficients times inputs, each of at most MOST_INPUTS on one device, in an allocation of their own.

    Two launches for each number of inputs and combination of dtypes, and no wait.

    Args:
        parts: for each sum its inputs, coefficients, and the dtype of the result.
    """
    if not parts:
        return {}
    sizes = {name: inputs[0].numel() * dtype.itemsize for name, (inputs, _, dtype) in parts.items()}
    offsets, end = offsets_of(sizes)
    memory = torch.empty(end, dtype=torch.uint8, device=next(iter(parts.values()))[0][0].device)
    outs = {
        name: memory[offsets[name] : offsets[name] + sizes[name]].view(dtype).view(inputs[0].shape)
        for name, (inputs, _, dtype) in parts.items()
    }
    sums = [
        WeightedSum([tensor.contiguous() for tensor in inputs], values, outs[name])
        for name, (inputs, values, _) in parts.items()
    ]
    ResidentSums(memory).launch(sorted(sums, key=lambda each: len(each.inputs)))
    return outs


def can_sum(values: Array) -> bool:
    """Whether the coefficients are those of a sum that one launch computes."""
    return values.ndim == 1 and len(values) <= MOST_INPUTS
