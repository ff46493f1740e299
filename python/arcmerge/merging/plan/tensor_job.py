"""A job: one output tensor, what it is made of, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from arcmerge.checkpoint.layout import OutputTensor
from arcmerge.checkpoint.reader import Checkpoint, TensorInfo
from arcmerge.dtypes import DType
from arcmerge.merging.methods.method import Arguments, Coefficients, Method
from arcmerge.merging.recipe.model_reference import ModelReference


@dataclass(frozen=True)
class Input:
    """One stored tensor that goes into an output tensor.

    cast: the type its values are rounded to before any arithmetic (the recipe's `dtype`), None for as stored.
    """

    model: ModelReference
    checkpoint: Checkpoint = field(repr=False)
    info: TensorInfo
    cast: DType | None

    @property
    def dtype(self) -> DType:
        """The type of the values that enter the arithmetic."""
        return self.cast or self.info.dtype


@dataclass(frozen=True)
class Job:
    """One output tensor: its inputs, what the method needs to know of them, and where it is rounded.

    result: the type the method's result has, which is that of the inputs; the file stores `output.dtype`.
    constant: the coefficients, where they do not depend on the weights. vocabulary: whether rows are matched by token.
    setting: whether it is a buffer or bound that is no weight and may be infinite.
    """

    output: OutputTensor
    inputs: tuple[Input, ...]
    method: Method
    values: Arguments
    result: DType
    constant: Coefficients | None
    vocabulary: bool = False
    setting: bool = False

    @property
    def count(self) -> int:
        return prod(self.output.shape)

    @property
    def base(self) -> int | None:
        return self.values.base

    @property
    def along(self) -> int | None:
        """The axis of the vectors that get coefficients of their own, None for one set for the whole tensor."""
        return self.method.dim(self.values) if len(self.output.shape) > 1 else None

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the tensor as the per-vector kernels see it."""
        shape = self.output.shape or (1,)
        split = 1 if self.along == 0 else len(shape) - 1
        return prod(shape[:split]), prod(shape[split:])

    @property
    def copied(self) -> bool:
        """Whether the bytes of the only input are the output: there is no arithmetic to do."""
        if not self.output.dtype.mergeable:
            return True
        if self.constant is None or self.vocabulary or self.constant.values.tolist() != [1.0]:
            return False
        return self.inputs[0].info.dtype == self.inputs[0].dtype == self.output.dtype
