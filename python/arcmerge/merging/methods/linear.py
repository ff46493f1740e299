"""Methods that mix along straight lines: model_stock, linear, task_arithmetic, passthrough."""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from arcmerge.geometry import squared_lengths
from arcmerge.merging.methods.method import Arguments, Method, combination, zero_sum
from arcmerge.merging.methods.rule import Array, Coefficients, Mask
from arcmerge.merging.recipe.parameters import Parameter


class ModelStock(Method):
    """A point between the base and the mean of n fine-tunes, at a t that depends on the angle between the fine-tunes.

        cos θ = mean over pairs of <d_i, d_j> / max(|d_i| |d_j|, 1e-6)
        t     = n cos θ / (1 + (n - 1) cos θ)                            0 where |denominator| < 1e-6
        out   = t · mean x_i + (1 - t) c

    With `filter_wise` every row of a matrix has its own t.
    """

    name = "model_stock"
    title = "Model Stock"
    reference = "https://arxiv.org/abs/2403.19522"
    parameters = (Parameter("filter_wise", bool, default=False),)
    base = "required"
    minimum = 2
    centers = True

    def dim(self, arguments: Arguments) -> Literal[0, 1] | None:
        return 1 if arguments.count > 1 and arguments.shared["filter_wise"] else None

    def formula(self, gram: Array, arguments: Arguments) -> tuple[Array, Mask]:
        squares = squared_lengths(gram)
        first, second = np.triu_indices(gram.shape[-1], 1)
        products = np.sqrt(squares[..., first] * squares[..., second])
        cosine = np.clip(gram[..., first, second] / np.maximum(products, 1e-6), -1, 1).mean(axis=-1)
        count = len(self.others(arguments))
        denominator = 1 + (count - 1) * cosine
        t = np.where(np.abs(denominator) < 1e-6, 0.0, count * cosine / denominator)
        weights = np.repeat(t[..., None] / count, count, axis=-1)
        return self.with_base(weights, arguments, squares), np.zeros(t.shape, bool)


class Linear(Method):
    """out = sum w_i x_i, divided by sum w_i if `normalize`."""

    name = "linear"
    title = "Linear"
    reference = "https://arxiv.org/abs/2203.05482"
    parameters = (Parameter("weight", scope="input"), Parameter("normalize", bool, default=True))
    idempotent = False

    def check(self, arguments: Arguments) -> list[str]:
        return zero_sum(self.weights(arguments), "normalize") if arguments.shared["normalize"] else []

    def constant(self, arguments: Arguments) -> Coefficients:
        weights = self.weights(arguments)
        return combination(weights / (weights.sum() or 1.0) if arguments.shared["normalize"] else weights)


class TaskArithmetic(Method):
    """out = c + lambda · sum w_i d_i, the sum divided by sum w_i if `normalize` and |sum w_i| >= 1e-8."""

    name = "task_arithmetic"
    title = "Task Arithmetic"
    reference = "https://arxiv.org/abs/2212.04089"
    parameters: ClassVar[tuple[Parameter, ...]] = (
        Parameter("weight", scope="non_base"),
        Parameter("lambda", default=1.0),
        Parameter("normalize", bool, default=False),
    )
    base = "required"
    centers = True

    def constant(self, arguments: Arguments) -> Coefficients | None:
        if (single := super().constant(arguments)) is not None:
            return single
        weights = self.weights(arguments)
        divides = arguments.shared["normalize"] and abs(weights.sum()) >= 1e-8
        divisor = weights.sum() if divides else 1.0
        return combination(self.with_base(arguments.shared["lambda"] * weights / divisor, arguments))


class Passthrough(Method):
    """out = scale · x, of one input."""

    name = "passthrough"
    title = "Passthrough"
    parameters = (Parameter("scale", scope="input", default=1.0),)
    maximum = 1
    idempotent = False

    def constant(self, arguments: Arguments) -> Coefficients:
        return combination(np.array(arguments.per_input["scale"], np.float64))


METHODS: tuple[Method, ...] = (ModelStock(), Linear(), TaskArithmetic(), Passthrough())
