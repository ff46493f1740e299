"""A case: one call of a kernel's launcher, which is interpreted, emulated, compiled, predicted, or run on a GPU.

Each other file of this folder lists the cases of an op, in two groups:

    SMALL    short, awkward shapes: run in the interpreter, as emulated PTX, and on a GPU; compared with the truth
    MODELS   every launch that a Gemma-2 of 2.6B, 9B or 27B parameters makes: compiled, predicted, and timed on a GPU

Together they reach every configuration that the launcher can choose; both groups are compiled. corners.py has the last
blocks of launches that are too large to run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Draw(Protocol):
    """The source of the tensors of a case."""

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        """An input: normally distributed values."""
        ...

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """An output, filled with NaN (integers: -1) where that is cheap, so that elements that are not written show."""
        ...

    def exact(self, values: Tensor) -> Tensor:
        """An input whose values control the kernel: positions, lengths, tables of addresses."""
        ...


class Expected(NamedTuple):
    """The true values of an output, and the tolerance of each element.

    Attributes:
        value: computed in float64, or the exact bits that are expected.
        tolerance: absolute, a number or a tensor that broadcasts; 0 means equal bits (a NaN equals any other).
    """

    value: Tensor
    tolerance: Tensor | float = 0.0


@dataclass(frozen=True)
class Call:
    """One call of a launcher.

    Attributes:
        launch: calls the launcher.
        outputs: the tensors that it fills, or changes in place, by name.
        expected: returns the expected values of these.
        minimum_bytes: the bytes that must move by the contract of the op.
        operations: floating-point operations of matrix products.
        reachable: tensors that kernels reach by addresses from a table.
    """

    launch: Callable[[], object]
    outputs: Mapping[str, Tensor]
    expected: Callable[[], Mapping[str, Expected]]
    minimum_bytes: int
    operations: int = 0
    reachable: Sequence[Tensor] = ()


@dataclass(frozen=True)
class Case:
    """A case of an op.

    Attributes:
        op: as in torch.ops.arcmerge.
        name: tells what is special about the case; unique for the op.
        build: draws the tensors and returns the call.
        exact: emulated PTX must have the bits of the interpreter, because the order of operations is the same.
        traffic: bytes over the minimum, the exact ratio that the interpreter counts (None: not memory-bound, or not
            stated for the case).
        access_bytes: bytes that a lane moves to or from global memory at a time, where a model's launch moves most.
    """

    op: str
    name: str
    build: Callable[[Draw], Call] = field(repr=False)
    exact: bool = True
    traffic: float | None = None
    access_bytes: int = 16

    def __str__(self) -> str:
        return f"{self.op}: {self.name}"


class Random:
    """Draws random values on the CPU, so that every device gets the same values for a seed."""

    def __init__(self, seed: int = 0, device: str = "cpu") -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._device = device

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self._generator) * scale).to(dtype).to(self._device)

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.full(shape, float("nan") if dtype.is_floating_point else -1, dtype=dtype, device=self._device)

    def exact(self, values: Tensor) -> Tensor:
        return values.clone().to(self._device)


class Blank:
    """Draws uninitialised memory, for launches that are compiled or sampled, at any size."""

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def empty(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def exact(self, values: Tensor) -> Tensor:
        return values.clone()


def disagreement(actual: Tensor, expected: Expected) -> float:
    """The maximum error as a share of the tolerance; at most 1 is agreement. If the tolerance is 0, it is 0 or inf."""
    actual, value = actual.detach().cpu(), expected.value.cpu()
    if isinstance(expected.tolerance, float) and expected.tolerance == 0.0:
        same = (actual == value) | (actual.isnan() & value.isnan()) if actual.is_floating_point() else actual == value
        return 0.0 if bool(same.all()) else float("inf")
    error = (actual.double() - value.double()).abs()
    # An expected infinity or NaN has no error; a NaN on one side has an infinite one.
    same = (actual.double() == value.double()) | (actual.isnan() & value.isnan())
    error = torch.where(same, 0.0, error).nan_to_num(nan=float("inf"))
    tolerance = torch.as_tensor(expected.tolerance, dtype=torch.float64)
    return float((error / tolerance).nan_to_num(nan=0.0).max()) if error.numel() else 0.0
