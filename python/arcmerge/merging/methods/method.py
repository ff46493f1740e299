"""The contract of a merge method: what it declares to the planner, what it measures, and the rule that follows.

No method ever sees a tensor. It names what is to be measured (`measure`), and from that gives the rule by which the
tensor is computed (`rule`). Many methods are a linear combination of their inputs, out = sum_i c_i x_i, whose
coefficients depend on lengths and angles only, that is on the Gram matrix G_ij = <x_i, x_j>. Such a method is a small
class: its contract, its parameters and `formula`, the arithmetic from G to c in float64. Other methods override
`measure` and `rule`.

In the formulas of this room x_i are the inputs, c the base, d_i = x_i - c, w_i the weights, and |x| is the length of a
tensor flattened to one vector. The semantics are those of mergekit 0.1.5; steps that mergekit computes in the dtype of
the weights are exact here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from arcmerge.errors import counted
from arcmerge.merging.methods.measure import Gram, Measure, Statistic
from arcmerge.merging.methods.rule import Array, Coefficients, Mask, Rule
from arcmerge.merging.recipe.parameters import Parameter
from arcmerge.merging.recipe.seed import DEFAULT_SEED


@dataclass(frozen=True)
class Arguments:
    """The arguments of a method for one output tensor, known before any weight is read.

    Args:
        count: number of inputs.
        base: index of the base among the inputs, None if it is not one of them.
        shared: value of each shared parameter by name, defaults filled in.
        per_input: values of each other parameter by name, one for each input; None at the base if the scope is
            non_base.
        models: names of the inputs for error messages.
        tensor: the name of the output tensor, on which random numbers depend.
        seed: the seed of random numbers.
        rounded: whether the arithmetic is that of bfloat16 inputs, whose magnitudes are compared in bfloat16.
        matrix: whether the tensor has rows, and not a single one.
        elements: the number of elements of the tensor.
    """

    count: int
    base: int | None
    shared: Mapping[str, Any] = field(default_factory=dict)
    per_input: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    models: tuple[str, ...] = field(default=(), compare=False)
    tensor: str = ""
    seed: int = DEFAULT_SEED
    rounded: bool = False
    matrix: bool = True
    elements: int = 1


def copy_of(index: int, arguments: Arguments) -> Coefficients:
    """The coefficients that copy one input."""
    return Coefficients(np.eye(arguments.count)[index], "copy")


def combination(values: Array) -> Coefficients:
    """Coefficients (k,) that do not depend on the weights."""
    copied = np.count_nonzero(values) == 1 and values.sum() == 1
    return Coefficients(values, "copy" if copied else "linear")


def zero_sum(weights: Array, switch: str) -> list[str]:
    """An error message if `weights` sum to zero, up to rounding, and the parameter `switch` divides by the sum."""
    if abs(weights.sum()) > 1e-12 * np.abs(weights).sum():
        return []
    return [
        f"'weight' must not sum to 0 where '{switch}' divides by the sum, got a sum of 0; "
        f"change a weight or set {switch}: false"
    ]


class Method:
    """A merge method. A subclass declares its contract and overrides `formula`, `constant`, or `measure` and `rule`.

    Attributes:
        name: name in recipes.
        title: name in model cards.
        reference: URL of the description.
        parameters: parameters that recipes can set.
        base: whether one input is the base: "required", "optional", or "ignored" if it is an input like any other.
        minimum: minimum number of inputs other than the base. Every method takes a single input.
        maximum: maximum number of inputs other than the base, None for any number.
        centers: whether its Gram matrix is that of the differences to the base, if there is a base.
        idempotent: whether equal inputs give that input, whatever the parameters.
        random: whether its result depends on the seed.
        simple: the branch of the coefficients that `formula` calls simple.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    reference: ClassVar[str | None] = None
    parameters: ClassVar[tuple[Parameter, ...]] = ()
    base: ClassVar[Literal["required", "optional", "ignored"]] = "ignored"
    minimum: ClassVar[int] = 1
    maximum: ClassVar[int | None] = None
    centers: ClassVar[bool] = False
    idempotent: ClassVar[bool] = True
    random: ClassVar[bool] = False
    simple: ClassVar[Literal["copy", "linear"]] = "linear"

    @property
    def follows_gram(self) -> bool:
        """Whether the rule is coefficients that `formula` computes from a Gram matrix."""
        return type(self).rule is Method.rule

    def check(self, arguments: Arguments) -> list[str]:
        """Return the error messages for these arguments. The other methods of the class need arguments without any."""
        if arguments.count == 1:
            return []
        if self.base == "required" and arguments.base is None:
            models = f"{arguments.count} models{self._named(range(arguments.count), arguments)}"
            return [f"'{self.name}' must have one of its {models} as the base, got none; set base_model to it"]
        others = self.others(arguments)
        count, maximum = len(others), self.maximum or arguments.count
        if self.minimum <= count <= maximum:
            return []
        limit = self.minimum if count < self.minimum else maximum
        bound = "exactly" if self.minimum == self.maximum else "at least" if count < self.minimum else "at most"
        base = ""
        if self.base != "ignored" and arguments.base is not None:
            base = f" besides its base{f' {arguments.models[arguments.base]}' if arguments.models else ''}"
        change = f"add {limit - count}" if count < limit else f"remove {count - limit}"
        return [
            f"'{self.name}' must have {bound} {counted(limit, 'model')}{base}, "
            f"got {count}{self._named(others, arguments)}; {change}"
        ]

    def _named(self, indices: Iterable[int], arguments: Arguments) -> str:
        """The models at these indices in parentheses, with a note at the base model."""
        if not arguments.models:
            return ""
        names = [
            f"{arguments.models[index]}, the base_model" if index == arguments.base else arguments.models[index]
            for index in indices
        ]
        return f" ({', '.join(names)})"

    def others(self, arguments: Arguments) -> list[int]:
        """Indices of the inputs other than the base."""
        base = None if self.base == "ignored" else arguments.base
        return [index for index in range(arguments.count) if index != base]

    def centered(self, arguments: Arguments) -> bool:
        """Whether the Gram matrix is that of the `others` minus the base, in this order; else it is of all inputs."""
        return self.centers and arguments.base is not None

    def dim(self, arguments: Arguments) -> Literal[0, 1] | None:
        """None: one Gram matrix for the tensor. 1: one for each row of a matrix. 0: one for each column."""
        return None

    def advice(self, arguments: Arguments) -> str | None:
        """A warning that applies if it applies to every tensor: a default that defeats the purpose."""
        return None

    def measure(self, found: Sequence[Statistic], arguments: Arguments) -> Measure | None:
        """The measure to take after those that found `found`; None if the rule follows from them.

        Args:
            found: what the measures before it found, in order.
            arguments: arguments without error messages, for which `constant` is None.
        """
        return None if found else Gram(self.centered(arguments), self.dim(arguments) if arguments.matrix else None)

    def rule(self, found: Sequence[Statistic], arguments: Arguments) -> Rule:
        """The rule that follows from what all measures found.

        Raises:
            ArcmergeError: if the method has no result for these inputs.
        """
        return self.coefficients(found[0].total, arguments)

    def constant(self, arguments: Arguments) -> Coefficients | None:
        """The coefficients (k,) if they do not depend on the weights, else None. A single input is copied."""
        return copy_of(0, arguments) if arguments.count == 1 else None

    def coefficients(self, gram: Array, arguments: Arguments) -> Coefficients:
        """Compute the coefficients from the Gram matrix. Never warns.

        Args:
            gram: float64 (..., k, k), as `centered` and `dim` say.
            arguments: arguments without error messages.

        Returns:
            float64 (..., k), or (k,) if they are constant; NaN for matrices that are not finite.

        Raises:
            ArcmergeError: if the method has no result for these inputs.
        """
        return self.all_coefficients(gram[None], arguments)[0]

    def all_coefficients(self, grams: Array, arguments: Arguments) -> list[Coefficients]:
        """Compute the coefficients of several tensors with the same parameters, as `coefficients` does for one.

        Args:
            grams: float64 (tensors, ..., k, k).
            arguments: those of any of the tensors.
        """
        if (constant := self.constant(arguments)) is not None:
            return [constant] * len(grams)
        with np.errstate(all="ignore"):
            values, simple = self.formula(grams, arguments)
            finite = np.isfinite(grams.sum(axis=(-2, -1)))[..., None]
        values = np.where(finite, values, np.nan)
        return [
            Coefficients(one, self.simple if are_simple.all() else self.name)
            for one, are_simple in zip(values, simple, strict=True)
        ]

    def formula(self, gram: Array, arguments: Arguments) -> tuple[Array, Mask]:
        """The arithmetic of the method: float64 (..., k, k) -> (..., k), and where (...) the result is simple."""
        raise NotImplementedError(f"{self.name} does not follow from a Gram matrix")

    def weights(self, arguments: Arguments) -> Array:
        """The parameter `weight` of the `others`, (n,)."""
        values = arguments.per_input["weight"]
        return np.array([values[index] for index in self.others(arguments)], np.float64)

    def with_base(self, weights: Array, arguments: Arguments, lengths: Array | None = None) -> Array:
        """Coefficients (..., k) of all inputs from weights (..., n) of the `others` or their differences to the base.

        c + sum w_i d_i = (1 - sum w_i) c + sum w_i x_i, so the base gets the rest to 1 if differences are weighted.

        Args:
            weights: float64 (..., n).
            arguments: arguments of the method.
            lengths: lengths (..., n) of the weighted vectors, or their squares. The weight of a zero vector has no
                effect and is set to zero, so that a tensor that equals the base in all inputs is copied bit for bit.
        """
        if lengths is not None:
            weights = np.where(lengths > 0, weights, 0.0)
        values = np.zeros((*weights.shape[:-1], arguments.count))
        values[..., self.others(arguments)] = weights
        if self.centered(arguments):
            values[..., arguments.base] = 1.0 - weights.sum(axis=-1)
        return values
