"""The job of an output tensor: its inputs, its method and its dtypes."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

from arcmerge.checkpoint.header import TensorInfo
from arcmerge.checkpoint.layout import OutputTensor
from arcmerge.checkpoint.reader import Checkpoint
from arcmerge.dtypes import DType
from arcmerge.merging.methods.method import Arguments, Method
from arcmerge.merging.methods.rule import Coefficients
from arcmerge.merging.recipe.model_reference import ModelReference


@dataclass(frozen=True)
class Input:
    """A stored tensor that is an input of an output tensor.

    Args:
        model: the model.
        checkpoint: its checkpoint.
        info: name, dtype and shape of the tensor.
        cast: dtype that its values are rounded to before the arithmetic (the recipe's `dtype`); None for the stored.
    """

    model: ModelReference
    checkpoint: Checkpoint = field(repr=False)
    info: TensorInfo
    cast: DType | None

    @property
    def dtype(self) -> DType:
        """The dtype of the values in the arithmetic."""
        return self.cast or self.info.dtype


@dataclass(frozen=True)
class Job:
    """The job of an output tensor.

    Args:
        output: name, dtype and shape of the output tensor.
        inputs: the input tensors.
        method: the merge method.
        values: the arguments of the method.
        result: dtype of the method's result, which is that of the inputs. The file stores `output.dtype`.
        constant: the coefficients, if they do not depend on the weights.
        vocabulary: whether rows are aligned by token.
        setting: whether the tensor is a buffer or a bound rather than a weight, and may be infinite.
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
        """The dim of the vectors that have coefficients each; None if the whole tensor has one set."""
        return self.method.dim(self.values) if self.values.matrix else None

    @property
    def matrix(self) -> tuple[int, int]:
        """(rows, columns) of the tensor in the kernels for vectors."""
        shape = self.output.shape or (1,)
        split = 1 if self.along == 0 else len(shape) - 1
        return prod(shape[:split]), prod(shape[split:])

    @property
    def row(self) -> int:
        """The number of elements of a row: of the last dim of a matrix, all of a vector."""
        return self.output.shape[-1] if len(self.output.shape) > 1 else max(self.count, 1)

    @property
    def copied(self) -> bool:
        """Whether the output has the bytes of the only input, so that there is no arithmetic."""
        if not self.output.dtype.mergeable:
            return True
        if self.constant is None or self.vocabulary or self.constant.values.tolist() != [1.0]:
            return False
        return self.inputs[0].info.dtype == self.inputs[0].dtype == self.output.dtype
