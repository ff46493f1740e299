"""Methods that interpolate on the sphere: slerp, nuslerp, multislerp, karcher."""

from __future__ import annotations

from typing import Literal

import numpy as np

from arcmerge.errors import ArcmergeError
from arcmerge.geometry import cosines_of, length_of_sum, slerp_coefficients, slerp_weights, squared_lengths
from arcmerge.merging.methods.method import Arguments, Method, copy_of, zero_sum
from arcmerge.merging.methods.rule import Array, Coefficients, Mask
from arcmerge.merging.recipe.parameters import Parameter


class Slerp(Method):
    """Spherical linear interpolation of whole tensors, from the base a (t = 0) to the other input b (t = 1).

        cos θ = <a, b> / (|a| |b|)
        out   = sin((1 - t) θ) / sin θ · a + sin(t θ) / sin θ · b
        out   = (1 - t) a + t b                                 where |cos θ| > 0.9995

    t is not clamped: values outside [0, 1] extrapolate. A length of at most 1e-8 counts as 1 in cos θ.

    That is mergekit's definition. The sines weigh a and b themselves, so the length of the result does not change
    linearly from |a| to |b|. The parameter `slerp_normalize`, which mergekit does not have, interpolates the directions
    on the arc and the lengths linearly:

        u     = sin((1 - t) θ) a / |a| + sin(t θ) b / |b|       (1 - t) a / |a| + t b / |b|  where cos θ > 0.9995
        out   = ((1 - t) |a| + t |b|) · u / |u|
        out   = (1 - t) a + t b                                 where cos θ < -0.9995 or a length is at most 1e-8:
                                                                the arc is not unique, or a direction is missing
    """

    name = "slerp"
    title = "SLERP"
    reference = "https://en.wikipedia.org/wiki/Slerp"
    parameters = (Parameter("t"), Parameter("slerp_normalize", bool, default=False, extension=True))
    base = "required"
    maximum = 1

    def constant(self, arguments: Arguments) -> Coefficients | None:
        return super().constant(arguments) or _end(arguments.shared["t"], self._ends(arguments), arguments)

    def formula(self, gram: Array, arguments: Arguments) -> tuple[Array, Mask]:
        ends, shared = self._ends(arguments), arguments.shared
        weights, linear = slerp_coefficients(gram[..., ends][..., ends, :], shared["t"], shared["slerp_normalize"])
        # The permutation of two indices is its own inverse.
        return weights[..., ends], linear

    def _ends(self, arguments: Arguments) -> list[int]:
        base = arguments.base or 0
        return [base, 1 - base]


class NuSlerp(Method):
    """Slerp of two inputs by weights, of whole tensors or of each vector, optionally relative to a base.

        t     = w_1 / (w_0 + w_1)                                        1/2 where |w_0 + w_1| < 1e-6
        out   = slerp(t; x_0, x_1),  with a base c + slerp(t; d_0, d_1)

    Lengths below 1e-7 count as 1e-7 in cos θ. The interpolation is linear only where 1 - cos² θ <= 1e-16. With
    `nuslerp_flatten: false` every row of a matrix is a vector; with `nuslerp_row_wise: true` in addition, every column
    is (the name is mergekit's).
    """

    name = "nuslerp"
    title = "NuSLERP"
    reference = "https://en.wikipedia.org/wiki/Slerp"
    parameters = (
        Parameter("weight", scope="non_base"),
        Parameter("nuslerp_flatten", bool, default=True),
        Parameter("nuslerp_row_wise", bool, default=False),
    )
    base = "optional"
    minimum = maximum = 2
    centers = True

    def dim(self, arguments: Arguments) -> Literal[0, 1] | None:
        if arguments.count == 1 or arguments.shared["nuslerp_flatten"]:
            return None
        return 0 if arguments.shared["nuslerp_row_wise"] else 1

    def constant(self, arguments: Arguments) -> Coefficients | None:
        return super().constant(arguments) or _end(self._t(arguments), self.others(arguments), arguments)

    def formula(self, gram: Array, arguments: Arguments) -> tuple[Array, Mask]:
        squares = squared_lengths(gram)
        cosine = cosines_of(gram, np.maximum(squares, 1e-14))[..., 0, 1]
        linear = 1 - cosine**2 <= 1e-16
        weights = slerp_weights(cosine, self._t(arguments), linear)
        return self.with_base(weights, arguments, squares), linear

    def _t(self, arguments: Arguments) -> float:
        first, second = self.weights(arguments).tolist()
        return float(second / (first + second)) if abs(first + second) >= 1e-6 else 0.5


class MultiSlerp(Method):
    """Interpolation of any number of inputs on the sphere, or of their differences to a base.

        u_i   = x_i / (|x_i| + eps);   m = sum w_i u_i;   out = cos(eps) · sum w_i |x_i| · m / |m|

    with w_i / sum w for w_i if `normalize_weights`. mergekit and its reference continue from m: they project the u_i on
    the tangent space at m / |m|, sum the projections by weight and apply the exponential map. That sum is the
    projection of m, hence zero; only the eps that is added to its length remains. Both are the same point up to
    rounding.

    Where |m| < eps, the result is sum w_i x_i if there are two inputs or if no |x_i| exceeds eps; otherwise there is no
    result and ArcmergeError is raised.
    """

    name = "multislerp"
    title = "Multi-SLERP"
    reference = "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea"
    parameters = (
        Parameter("weight", scope="non_base"),
        Parameter("normalize_weights", bool, default=True),
        Parameter("eps", default=1e-8),
    )
    base = "optional"
    centers = True
    idempotent = False

    def check(self, arguments: Arguments) -> list[str]:
        divides = len(self.others(arguments)) > 1 and arguments.shared["normalize_weights"]
        return super().check(arguments) + (zero_sum(self.weights(arguments), "normalize_weights") if divides else [])

    def constant(self, arguments: Arguments) -> Coefficients | None:
        others = self.others(arguments)
        return super().constant(arguments) or (copy_of(others[0], arguments) if len(others) == 1 else None)

    def formula(self, gram: Array, arguments: Arguments) -> tuple[Array, Mask]:
        weights, eps = self.weights(arguments), arguments.shared["eps"]
        if arguments.shared["normalize_weights"]:
            weights = weights / weights.sum()
        lengths = np.sqrt(squared_lengths(gram))
        directions = weights / (lengths + eps)
        size = length_of_sum(directions, gram)
        linear = size < eps
        if weights.size > 2 and (linear & (lengths > eps).any(axis=-1)).any():
            raise ArcmergeError(
                "'weight' must not make the weighted sum of the inputs' directions zero in multislerp, "
                f"got a sum shorter than eps = {eps:g}; use other weights"
            )
        scale = np.cos(eps) * (weights * lengths).sum(axis=-1) / size
        values = np.where(linear[..., None], weights, directions * scale[..., None])
        return self.with_base(values, arguments, lengths), linear


class Karcher(Method):
    """The Karcher (Riemannian) mean of the directions of the inputs, at their mean length.

    The iteration starts at p = the mean of the u_i = x_i / |x_i|, scaled to the sphere, and repeats at most max_iter
    times:

        v     = mean of θ_i / sin θ_i · (u_i - cos θ_i · p),   cos θ_i = <u_i, p>
        p    := cos |v| · p + sin |v| · v / |v|                          until |v| <= tol

    All vectors are sums of the inputs, so the iteration runs on their coefficients. Inputs no longer than tol have no
    direction and count in the mean length only; inputs opposite to p contribute nothing. If the directions sum to zero,
    p starts at the first.
    """

    name = "karcher"
    title = "Karcher Mean"
    reference = "https://arxiv.org/abs/2603.04972"
    parameters = (Parameter("max_iter", int, default=10), Parameter("tol", default=1e-5))

    def formula(self, gram: Array, arguments: Arguments) -> tuple[Array, Mask]:
        # Lengths are square roots of sums with errors of 1e-16 at best, so lengths below 1e-8 are noise.
        tol = max(arguments.shared["tol"], 1e-7)
        lengths = np.sqrt(squared_lengths(gram))
        present = lengths > tol
        cosines = cosines_of(gram, np.where(present, squared_lengths(gram), 1.0))
        share = present / np.maximum(present.sum(axis=-1, keepdims=True), 1)
        size = length_of_sum(share, cosines)[..., None]
        point = np.where(size > tol, share / size, np.eye(arguments.count)[np.argmax(present, axis=-1)])
        for _ in range(arguments.shared["max_iter"]):
            toward = np.clip((cosines @ point[..., None])[..., 0], -1, 1)
            angles = np.arccos(toward)
            pull = np.where((angles > tol) & (angles < np.pi - tol), share * angles / np.sin(angles), 0.0)
            tangent = pull - (pull * toward).sum(axis=-1, keepdims=True) * point
            step = length_of_sum(tangent, cosines)[..., None]
            if not (step > tol).any():
                break
            moved = np.cos(step) * point + np.sin(step) * tangent / step
            point = np.where(step > tol, moved / length_of_sum(moved, cosines)[..., None], point)
        scale = lengths.mean(axis=-1, keepdims=True)
        return np.where(present, scale * point / lengths, 0.0), np.zeros(gram.shape[:-2], bool)


def _end(t: float, ends: list[int], arguments: Arguments) -> Coefficients | None:
    """The copy of an end if t is exactly 0 or 1, else None."""
    return copy_of(ends[int(t)], arguments) if t in (0, 1) else None


METHODS: tuple[Method, ...] = (Slerp(), NuSlerp(), MultiSlerp(), Karcher())
