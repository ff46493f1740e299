"""Readers and comparisons of tensors: by bits, by rank among the floats of their dtype, by rounding error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from golden import cases

Tensors = dict[str, Tensor]


def load(folder: Path) -> Tensors:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_bits(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name, tensor in expected.items() if cases.raw(found[name]) != cases.raw(tensor)]


def magnitude(inputs: Sequence[Tensor]) -> Tensor:
    """The elementwise sum of the magnitudes of the inputs."""
    return torch.stack([x.double().abs() for x in inputs]).sum(0)


def is_rounded_from(actual: Tensor, exact: Tensor, size: Tensor, result: torch.dtype) -> bool:
    """Whether `actual` is the exact value up to f32 arithmetic on terms of `size`, rounded to `result` and stored.

    Coefficients, products and sums are rounded in f32, by 2^-24 each. Rounding is monotone: so the values must lie
    between those that the two ends of the error's range are rounded to.
    """
    error = 2.0**-22 * size
    low, high = ((exact + e).to(result).to(actual.dtype).double() for e in (-error, error))
    return bool(((low <= actual.double()) & (actual.double() <= high)).all())


def rank(tensor: Tensor) -> Tensor:
    """The rank of each 16-bit float among all of them: neighbours differ by 1, and -0 equals 0."""
    bits = tensor.contiguous().view(torch.int16).long()
    return torch.where(bits < 0, -32768 - bits, bits)
