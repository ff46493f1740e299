"""What a merge method is: a contract for the planner, and a pure function from a Gram matrix to coefficients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from arcmerge.merging.recipe.parameters import Parameter

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Inputs:
    """What a method knows about the inputs of one output tensor before any weight is read.

    base: position of the base among the inputs, None if it is not one of them.
    shared: every shared parameter of the method by name, defaults filled in.
    per_input: every other parameter, one value an input; None at the base where the scope is non_base.
    models: what the inputs are called, for sentences.
    """

    count: int
    base: int | None
    shared: Mapping[str, Any] = field(default_factory=dict)
    per_input: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    models: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True, eq=False)
class Coefficients:
    """One coefficient per input, in the order of the inputs.

    values: float64 (k,), or (vectors, k) where every vector has its own.
    branch: "copy" if one input is the result, "linear" if all is mixed along straight lines, else the method's name.
    """

    values: Array
    branch: str


def copy_of(position: int, inputs: Inputs) -> Coefficients:
    return Coefficients(np.eye(inputs.count)[position], "copy")


def combination(values: Array) -> Coefficients:
    """Coefficients (k,) that no weight had to be read for."""
    copied = np.count_nonzero(values) == 1 and values.sum() == 1
    return Coefficients(values, "copy" if copied else "linear")


class Method:
    """A merge method. A subclass states its contract and has a `formula` or a `constant` of its own.

    title, reference: its name in prose, and where it is described.
    base: whether one of the inputs must or may be told apart as the base; `ignored`, it is an input like any other.
    minimum, maximum: how many inputs it takes beside the base. A single input is taken by every method.
    centers: its Gram matrix is that of the differences to the base, where there is one.
    between_inputs: inputs that are all equal give that input, whatever the parameters.
    elementwise: not a Gram method; where `constant` is None, an op of its own computes it.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str | None] = None
    parameters: ClassVar[tuple[Parameter, ...]] = ()
    base: ClassVar[Literal["required", "optional", "ignored"]] = "ignored"
    minimum: ClassVar[int] = 1
    maximum: ClassVar[int | None] = None
    centers: ClassVar[bool] = False
    between_inputs: ClassVar[bool] = True
    elementwise: ClassVar[bool] = False

    def check(self, inputs: Inputs) -> list[str]:
        """What is wrong with the inputs, a sentence each. All that follows is for inputs with nothing wrong."""
        if inputs.count == 1:
            return []
        if self.base == "required" and inputs.base is None:
            models = f"{inputs.count} models{self._named(range(inputs.count), inputs)}"
            return [f"{self.name} needs one of its {models} as the base, got none; set base_model to it"]
        others = self.others(inputs)
        count, most = len(others), self.maximum or inputs.count
        if self.minimum <= count <= most:
            return []
        limit = self.minimum if count < self.minimum else most
        bound = "exactly" if self.minimum == self.maximum else "at least" if count < self.minimum else "at most"
        models = "model" if limit == 1 else "models"
        beside = ""
        if self.base != "ignored" and inputs.base is not None:
            beside = f" beside its base{f' {inputs.models[inputs.base]}' if inputs.models else ''}"
        change = f"add {limit - count}" if count < limit else f"remove {count - limit}"
        return [
            f"{self.name} takes {bound} {limit} {models}{beside}, got {count}{self._named(others, inputs)}; {change}"
        ]

    def _named(self, positions: Iterable[int], inputs: Inputs) -> str:
        """The models at these positions, in brackets, the one that base_model added or chose told from the others."""
        if not inputs.models:
            return ""
        names = [
            f"{inputs.models[place]}, the base_model" if place == inputs.base else inputs.models[place]
            for place in positions
        ]
        return f" ({', '.join(names)})"

    def others(self, inputs: Inputs) -> list[int]:
        """Positions of the inputs beside the base."""
        base = None if self.base == "ignored" else inputs.base
        return [position for position in range(inputs.count) if position != base]

    def centered(self, inputs: Inputs) -> bool:
        """Whether the Gram matrix is that of the `others` minus the base, in this order; else it is of all inputs."""
        return self.centers and inputs.base is not None

    def along(self, inputs: Inputs) -> Literal[0, 1] | None:
        """None: one Gram matrix for the tensor. 1: one for each row of a matrix. 0: one for each column."""
        return None

    def constant(self, inputs: Inputs) -> Coefficients | None:
        """The coefficients (k,) where no weight need be read to know them, else None. A single input is copied."""
        return copy_of(0, inputs) if inputs.count == 1 else None

    def coefficients(self, gram: Array, inputs: Inputs) -> Coefficients:
        """The coefficients from the Gram matrix: float64 (..., k, k) -> (..., k); (k,) where they are constant.

        gram: of what `centered` and `along` say. Where it is not finite, all coefficients are NaN. Never warns.

        Raises ArcmergeError if the method has no result for these inputs.
        """
        if (constant := self.constant(inputs)) is not None:
            return constant
        with np.errstate(all="ignore"):
            result = self.formula(gram, inputs)
            finite = np.isfinite(gram.sum(axis=(-2, -1)))[..., None]
        return Coefficients(np.where(finite, result.values, np.nan), result.branch)

    def formula(self, gram: Array, inputs: Inputs) -> Coefficients:
        """The method itself: float64 (..., k, k) -> (..., k)."""
        raise NotImplementedError(f"{self.name} does not follow from a Gram matrix")

    def weights(self, inputs: Inputs) -> Array:
        """The parameter `weight` of the `others`, (n,)."""
        values = inputs.per_input["weight"]
        return np.array([values[position] for position in self.others(inputs)], np.float64)

    def place(self, weights: Array, inputs: Inputs, lengths: Array | None = None) -> Array:
        """Weights (..., n) of the `others` or of their differences to the base -> coefficients (..., k).

        c + sum w_i d_i = (1 - sum w_i) c + sum w_i x_i: a base that differences were taken to gets what is left of 1.

        lengths: of the weighted vectors (..., n), or their squares. The weight of a zero vector is immaterial and made
        zero, so that a tensor that equals the base in all inputs comes out bit for bit.
        """
        if lengths is not None:
            weights = np.where(lengths > 0, weights, 0.0)
        values = np.zeros((*weights.shape[:-1], inputs.count))
        values[..., self.others(inputs)] = weights
        if self.centered(inputs):
            values[..., inputs.base] = 1.0 - weights.sum(axis=-1)
        return values
