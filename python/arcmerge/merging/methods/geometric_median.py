"""geometric_median: the point with the least sum of distances to the inputs."""

from __future__ import annotations

import numpy as np

from arcmerge.geometry import squared_lengths
from arcmerge.merging.methods.method import Arguments, Method, copy_of
from arcmerge.merging.methods.rule import Array, Coefficients, Mask
from arcmerge.merging.recipe.parameters import Parameter


class GeometricMedian(Method):
    """The point p that minimises sum w_i |p - x_i|, with sum w_i = 1. An input far from all others moves it little.

    An input x_j is the minimiser if the unit vectors from it to the inputs elsewhere, by weight, sum to less than the
    weight w of the inputs at x_j. If none is, the iteration of Weiszfeld starts at the weighted mean and repeats at
    most max_iter times:

        q_i   = w_i / |x_i - p|
        p    := sum q_i x_i / sum q_i         until |sum q_i (x_i - p)| <= tol

    At an input it makes the step of Vardi and Zhang: the sums are those over the inputs elsewhere, and the step is
    shorter by the share w / |sum q_i (x_i - p)|. If there are several minimisers, as between two inputs of equal
    weight, the result is the one that the iteration reaches.

    mergekit does not have this method. "cla-gm", of the model that `reference` names, is this minimum for equal
    weights, computed from another start.
    """

    name = "geometric_median"
    simple = "copy"
    title = "Geometric Median"
    reference = "https://huggingface.co/YOYO-AI/Qwen3-30B-A3B-YOYO-V4"
    parameters = (
        Parameter("weight", scope="input", default=1.0),
        Parameter("max_iter", int, default=1000),
        Parameter("tol", default=1e-9),
    )

    def check(self, arguments: Arguments) -> list[str]:
        if arguments.count == 1:
            return []
        weights = self.weights(arguments)
        if (weights < 0).any():
            return [f"'weight' must be 0 or more in geometric_median, got {weights.min():g}; leave the model out"]
        if not weights.any():
            return ["'weight' must be more than 0 for a model in geometric_median, got 0 for all; change a weight"]
        return []

    def constant(self, arguments: Arguments) -> Coefficients | None:
        if (single := super().constant(arguments)) is not None:
            return single
        (positive,) = np.nonzero(self.weights(arguments))
        return copy_of(int(positive[0]), arguments) if len(positive) == 1 else None

    def formula(self, gram: Array, arguments: Arguments) -> tuple[Array, Mask]:
        weights = self.weights(arguments)
        kept = np.flatnonzero(weights)
        weights = weights[kept] / weights.sum()
        squares = squared_distances(gram[..., kept[:, None], kept])
        are_least = are_medians(squares, weights)
        copied = np.asarray(are_least.any(axis=-1))
        done = copied
        point = np.where(copied[..., None], np.eye(len(kept))[are_least.argmax(axis=-1)], weights)
        for _ in range(arguments.shared["max_iter"]):
            if done.all():
                break
            step, pull = weiszfeld(point, squares, weights)
            point = np.where(done[..., None], point, point + step)
            done = done | (pull <= arguments.shared["tol"])
        values = np.zeros(gram.shape[:-1])
        values[..., kept] = point
        return values, copied


def squared_distances(gram: Array) -> Array:
    """|x_i - x_j|², (..., k, k) -> (..., k, k)."""
    squares = squared_lengths(gram)
    return np.maximum(squares[..., :, None] + squares[..., None, :] - 2 * gram, 0.0)


def are_medians(squares: Array, weights: Array) -> Mask:
    """Whether each input is the only minimiser, (..., k, k) and (k,) -> (..., k)."""
    # Entry [j, i, l] is about x_i - x_j and x_l - x_j. sqrt(s · s) is exactly s, so parallel ones have exactly 1.
    from_j = squares[..., :, :, None], squares[..., :, None, :]
    lengths = np.sqrt(from_j[0] * from_j[1])
    products = (from_j[0] + from_j[1] - squares[..., None, :, :]) / 2
    cosines = np.where(lengths > 0, np.clip(products / lengths, -1, 1), 0.0)
    pulls = np.sqrt(np.maximum((cosines @ weights) @ weights, 0.0))
    held = (squares == 0) @ weights
    return np.asarray(pulls < (1 - 1e-12) * held)


def weiszfeld(point: Array, squares: Array, weights: Array) -> tuple[Array, Array]:
    """The step from sum p_i x_i, as coefficients (..., k) whose sum is 0, and the pull (...) that makes it."""
    # |sum c_i x_i|² is minus half the sum of c_i c_j |x_i - x_j|² where the c_i sum to 0, as those of p - x_i do.
    mean = (squares @ point[..., None])[..., 0]
    away = mean - (point * mean).sum(axis=-1, keepdims=True) / 2
    # Closer than rounding can tell is at the input.
    elsewhere = away > 1e-15 * squares.max(axis=(-2, -1))[..., None]
    pulls = np.where(elsewhere, weights / np.sqrt(away), 0.0)
    total = pulls.sum(axis=-1)
    step = pulls / total[..., None] - point
    length = np.sqrt(np.maximum(-(step[..., None, :] @ squares @ step[..., :, None])[..., 0, 0] / 2, 0.0))
    pull, held = total * length, np.where(elsewhere, 0.0, weights).sum(axis=-1)
    left = np.maximum(pull - held, 0.0)
    return np.where(left > 0, left / pull, 0.0)[..., None] * step, left


METHODS: tuple[Method, ...] = (GeometricMedian(),)
