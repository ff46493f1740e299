"""The merge methods: from the Gram matrix of the inputs and the parameters to one coefficient per input.

Every method here (but nearswap) is a linear combination of its inputs, out = sum_i c_i x_i, whose coefficients depend
on nothing but lengths and angles: the Gram matrix G_ij = <x_i, x_j>. A method is therefore a small class: its contract,
its parameters, and `formula`, the arithmetic from G to c in float64. It never sees a tensor.

In the formulas x_i are the inputs, c the base, d_i = x_i - c, w_i the weights, |x| the length of a tensor flattened to
one vector. The semantics are those of mergekit 0.1.5; what it computes in the type of the weights is exact here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from arcmerge.errors import ArcmergeError
from arcmerge.merging.methods.method import Array, Coefficients, Inputs, Method, combination, copy_of
from arcmerge.merging.recipe.parameters import Parameter
from arcmerge.merging.recipe.yaml_document import did_you_mean

__all__ = ["METHODS", "Coefficients", "Inputs", "Method", "get"]


class Slerp(Method):
    """Spherical linear interpolation of whole tensors, from the base a (t = 0) to the other input b (t = 1).

        cos θ = <a, b> / (|a| |b|)
        out   = sin((1 - t) θ) / sin θ · a + sin(t θ) / sin θ · b
        out   = (1 - t) a + t b                                 where |cos θ| > 0.9995

    t is not clamped: beyond 0 to 1 it extrapolates. A length of at most 1e-8 counts as 1 in cos θ.

    That is mergekit's definition. The sines weigh a and b themselves, so the length of the result does not go evenly
    from |a| to |b|. With `slerp_normalize`, which is ours alone, directions go along the arc and lengths along a line:

        u     = sin((1 - t) θ) a / |a| + sin(t θ) b / |b|       (1 - t) a / |a| + t b / |b|  where cos θ > 0.9995
        out   = ((1 - t) |a| + t |b|) · u / |u|
        out   = (1 - t) a + t b                                 where cos θ < -0.9995 or a length is at most 1e-8:
                                                                there is no one arc, or no direction
    """

    name = "slerp"
    title = "SLERP"
    reference = "https://en.wikipedia.org/wiki/Slerp"
    parameters = (Parameter("t"), Parameter("slerp_normalize", bool, default=False, extension=True))
    base = "required"
    maximum = 1

    THRESHOLD: ClassVar[float] = 0.9995
    ZERO: ClassVar[float] = 1e-8

    def constant(self, inputs: Inputs) -> Coefficients | None:
        return super().constant(inputs) or _end(inputs.shared["t"], self._ends(inputs), inputs)

    def formula(self, gram: Array, inputs: Inputs) -> Coefficients:
        t, ends = inputs.shared["t"], self._ends(inputs)
        gram = gram[..., ends][..., ends, :]
        lengths = np.sqrt(_squares(gram))
        cosines = _cosines(gram, np.where(lengths > self.ZERO, _squares(gram), 1.0))
        cosine = cosines[..., 0, 1]
        linear = np.abs(cosine) > self.THRESHOLD
        # Decimal mixtures of two bf16 values often lie half way between two others: the weights of mergekit to the bit,
        # which is 1 - t of the float32 t, send them the same way.
        straight = [float(np.float32(1) - np.float32(t)), float(np.float32(t))]
        weights = np.where(linear[..., None], straight, _between(cosine, t, linear))
        if inputs.shared["slerp_normalize"]:
            length = (1 - t) * lengths[..., 0] + t * lengths[..., 1]
            weights = (length / _length(weights, cosines))[..., None] * weights / lengths
            linear = (cosine < -self.THRESHOLD) | (lengths <= self.ZERO).any(axis=-1)
            weights = np.where(linear[..., None], straight, weights)
        # An order of two positions is its own inverse.
        return Coefficients(weights[..., ends], _branch(linear, self.name))

    def _ends(self, inputs: Inputs) -> list[int]:
        base = inputs.base or 0
        return [base, 1 - base]


class NuSlerp(Method):
    """Slerp of two inputs by weights, of whole tensors or vector by vector, and about a base if there is one.

        t     = w_1 / (w_0 + w_1)                                        1/2 where |w_0 + w_1| < 1e-6
        out   = slerp(t; x_0, x_1),  with a base c + slerp(t; d_0, d_1)

    Lengths below 1e-7 count as 1e-7 in cos θ; straight only where 1 - cos² θ <= 1e-16. With `nuslerp_flatten: false`
    every row of a matrix is a vector, with `nuslerp_row_wise: true` besides every column (the name is mergekit's).
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

    def along(self, inputs: Inputs) -> Literal[0, 1] | None:
        if inputs.count == 1 or inputs.shared["nuslerp_flatten"]:
            return None
        return 0 if inputs.shared["nuslerp_row_wise"] else 1

    def constant(self, inputs: Inputs) -> Coefficients | None:
        return super().constant(inputs) or _end(self._t(inputs), self.others(inputs), inputs)

    def formula(self, gram: Array, inputs: Inputs) -> Coefficients:
        squares = _squares(gram)
        cosine = _cosines(gram, np.maximum(squares, 1e-14))[..., 0, 1]
        linear = 1 - cosine**2 <= 1e-16
        weights = _between(cosine, self._t(inputs), linear)
        return Coefficients(self.place(weights, inputs, squares), _branch(linear, self.name))

    def _t(self, inputs: Inputs) -> float:
        first, second = self.weights(inputs).tolist()
        return float(second / (first + second)) if abs(first + second) >= 1e-6 else 0.5


class MultiSlerp(Method):
    """Interpolation of any number of inputs on the sphere; with a base, of the differences to it.

        u_i   = x_i / (|x_i| + eps);   m = sum w_i u_i;   out = cos(eps) · sum w_i |x_i| · m / |m|

    with w_i / sum w for w_i where `normalize_weights`. mergekit and its reference go on from m: project the u_i on the
    tangent space at m / |m|, sum them by weight, and follow the exponential map. That sum is the projection of m, hence
    zero; only the eps that is added to its length is left of it. Rounding apart, both are the same point.

    Where |m| < eps the result is sum w_i x_i for two inputs and where no |x_i| exceeds eps; for others there is none.
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
    between_inputs = False

    def check(self, inputs: Inputs) -> list[str]:
        divides = len(self.others(inputs)) > 1 and inputs.shared["normalize_weights"]
        return super().check(inputs) + (_cannot_divide(self.weights(inputs), "normalize_weights") if divides else [])

    def constant(self, inputs: Inputs) -> Coefficients | None:
        others = self.others(inputs)
        return super().constant(inputs) or (copy_of(others[0], inputs) if len(others) == 1 else None)

    def formula(self, gram: Array, inputs: Inputs) -> Coefficients:
        weights, eps = self.weights(inputs), inputs.shared["eps"]
        if inputs.shared["normalize_weights"]:
            weights = weights / weights.sum()
        lengths = np.sqrt(_squares(gram))
        directions = weights / (lengths + eps)
        size = _length(directions, gram)
        linear = size < eps
        if weights.size > 2 and (linear & (lengths > eps).any(axis=-1)).any():
            raise ArcmergeError(
                "multislerp has no result where the directions of the inputs, by their weights, add up to zero; "
                "use other weights"
            )
        scale = np.cos(eps) * (weights * lengths).sum(axis=-1) / size
        values = np.where(linear[..., None], weights, directions * scale[..., None])
        return Coefficients(self.place(values, inputs, lengths), _branch(linear, self.name))


class Karcher(Method):
    """The Karcher (Riemannian) mean of the directions of the inputs, at their mean length.

    From p = the mean of the u_i = x_i / |x_i|, scaled to the sphere, at most max_iter times:

        v     = mean of θ_i / sin θ_i · (u_i - cos θ_i · p),   cos θ_i = <u_i, p>
        p    := cos |v| · p + sin |v| · v / |v|                          until |v| <= tol

    All vectors are sums of the inputs, so the iteration runs on their coefficients. Inputs no longer than tol have no
    direction and count in the mean length alone; one opposite to p draws it to no side. Where the directions add up to
    zero, p starts at the first.
    """

    name = "karcher"
    title = "Karcher Mean"
    reference = "https://arxiv.org/abs/2603.04972"
    parameters = (Parameter("max_iter", int, default=10), Parameter("tol", default=1e-5))

    def formula(self, gram: Array, inputs: Inputs) -> Coefficients:
        # Lengths are roots of sums that cancel to 1e-16 at best: below its root, they are noise.
        tol = max(inputs.shared["tol"], 1e-7)
        lengths = np.sqrt(_squares(gram))
        present = lengths > tol
        cosines = _cosines(gram, np.where(present, _squares(gram), 1.0))
        share = present / np.maximum(present.sum(axis=-1, keepdims=True), 1)
        size = _length(share, cosines)[..., None]
        point = np.where(size > tol, share / size, np.eye(inputs.count)[np.argmax(present, axis=-1)])
        for _ in range(inputs.shared["max_iter"]):
            toward = np.clip((cosines @ point[..., None])[..., 0], -1, 1)
            angles = np.arccos(toward)
            pull = np.where((angles > tol) & (angles < np.pi - tol), share * angles / np.sin(angles), 0.0)
            tangent = pull - (pull * toward).sum(axis=-1, keepdims=True) * point
            step = _length(tangent, cosines)[..., None]
            if not (step > tol).any():
                break
            moved = np.cos(step) * point + np.sin(step) * tangent / step
            point = np.where(step > tol, moved / _length(moved, cosines)[..., None], point)
        scale = lengths.mean(axis=-1, keepdims=True)
        return Coefficients(np.where(present, scale * point / lengths, 0.0), self.name)


class ModelStock(Method):
    """The point between the base and the mean of n fine-tunes that the angle between their differences suggests.

        cos θ = mean over pairs of <d_i, d_j> / max(|d_i| |d_j|, 1e-6)
        t     = n cos θ / (1 + (n - 1) cos θ)                            0 where |denominator| < 1e-6
        out   = t · mean x_i + (1 - t) c

    With `filter_wise` every row of a matrix has a t of its own.
    """

    name = "model_stock"
    title = "Model Stock"
    reference = "https://arxiv.org/abs/2403.19522"
    parameters = (Parameter("filter_wise", bool, default=False),)
    base = "required"
    minimum = 2
    centers = True

    def along(self, inputs: Inputs) -> Literal[0, 1] | None:
        return 1 if inputs.count > 1 and inputs.shared["filter_wise"] else None

    def formula(self, gram: Array, inputs: Inputs) -> Coefficients:
        squares = _squares(gram)
        first, second = np.triu_indices(gram.shape[-1], 1)
        products = np.sqrt(squares[..., first] * squares[..., second])
        cosine = np.clip(gram[..., first, second] / np.maximum(products, 1e-6), -1, 1).mean(axis=-1)
        count = len(self.others(inputs))
        denominator = 1 + (count - 1) * cosine
        t = np.where(np.abs(denominator) < 1e-6, 0.0, count * cosine / denominator)
        weights = np.repeat(t[..., None] / count, count, axis=-1)
        return Coefficients(self.place(weights, inputs, squares), self.name)


class Linear(Method):
    """out = sum w_i x_i, divided by sum w_i where `normalize`."""

    name = "linear"
    title = "Linear"
    reference = "https://arxiv.org/abs/2203.05482"
    parameters = (Parameter("weight", scope="input"), Parameter("normalize", bool, default=True))
    between_inputs = False

    def check(self, inputs: Inputs) -> list[str]:
        return _cannot_divide(self.weights(inputs), "normalize") if inputs.shared["normalize"] else []

    def constant(self, inputs: Inputs) -> Coefficients:
        weights = self.weights(inputs)
        return combination(weights / (weights.sum() or 1.0) if inputs.shared["normalize"] else weights)


class TaskArithmetic(Method):
    """out = c + lambda · sum w_i d_i, divided by sum w_i where `normalize` and |sum w_i| >= 1e-8."""

    name = "task_arithmetic"
    title = "Task Arithmetic"
    reference = "https://arxiv.org/abs/2212.04089"
    parameters = (
        Parameter("weight", scope="non_base"),
        Parameter("lambda", default=1.0),
        Parameter("normalize", bool, default=False),
    )
    base = "required"
    centers = True

    def constant(self, inputs: Inputs) -> Coefficients:
        if (single := super().constant(inputs)) is not None:
            return single
        weights = self.weights(inputs)
        divides = inputs.shared["normalize"] and abs(weights.sum()) >= 1e-8
        divisor = weights.sum() if divides else 1.0
        return combination(self.place(inputs.shared["lambda"] * weights / divisor, inputs))


class Passthrough(Method):
    """out = scale · x, of one input."""

    name = "passthrough"
    title = "Passthrough"
    parameters = (Parameter("scale", scope="input", default=1.0),)
    maximum = 1
    between_inputs = False

    def constant(self, inputs: Inputs) -> Coefficients:
        return combination(np.array(inputs.per_input["scale"], np.float64))


class NearSwap(Method):
    """Values of the other input b where it is near the base a: out = g b + (1 - g) a, g = clamp(t / |b - a|, 0, 1).

    |b - a| is taken element by element and is at least 1e-6.
    """

    name = "nearswap"
    title = "NearSwap"
    reference = "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001"
    parameters = (Parameter("t"),)
    base = "required"
    maximum = 1
    elementwise = True

    def constant(self, inputs: Inputs) -> Coefficients | None:
        if (single := super().constant(inputs)) is not None:
            return single
        return copy_of(inputs.base or 0, inputs) if inputs.shared["t"] <= 0 else None


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Slerp(),
        NuSlerp(),
        MultiSlerp(),
        Karcher(),
        ModelStock(),
        Linear(),
        TaskArithmetic(),
        Passthrough(),
        NearSwap(),
    )
}

# mergekit's methods that elect signs, sort, sample or compare element by element.
_NOT_SUPPORTED = (
    *("ties", "dare_ties", "dare_linear", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties"),
    *("sce", "ram", "ramplus_tl", "arcee_fusion"),
)


def get(name: str) -> Method:
    """The method that a recipe calls `name`. Raises ArcmergeError if there is none."""
    if name in METHODS:
        return METHODS[name]
    reason, hint = (
        ("is not supported", "") if name in _NOT_SUPPORTED else ("is unknown", did_you_mean(name.lower(), METHODS))
    )
    raise ArcmergeError(f"merge_method '{name}' {reason}; choose one of {', '.join(METHODS)}{hint}")


def _squares(gram: Array) -> Array:
    """Squared lengths (..., k). One that rounding made negative counts as zero."""
    return np.maximum(np.diagonal(gram, axis1=-2, axis2=-1), 0.0)


def _cosines(gram: Array, squares: Array) -> Array:
    """Cosines (..., k, k) in [-1, 1]; squares: what to take for the squared lengths (..., k).

    The root is of the product: sqrt(s · s) is exactly s, so that parallel vectors give exactly 1 or -1. The product
    of squared lengths of float32 tensors lies between 1e-180 and 1e180.
    """
    return np.clip(gram / np.sqrt(squares[..., :, None] * squares[..., None, :]), -1, 1)


def _length(weights: Array, gram: Array) -> Array:
    """|sum w_i x_i|, (..., k) and (..., k, k) -> (...). A square that rounding made negative counts as zero."""
    squares = weights[..., None, :] @ gram @ weights[..., :, None]
    return np.sqrt(np.maximum(squares[..., 0, 0], 0.0))


def _between(cosine: Array, t: float, linear: NDArray[np.bool_]) -> Array:
    """Weights (..., 2) of two ends at t along the arc between them, along the straight line where `linear`."""
    angle = np.arccos(np.where(linear, 0.0, cosine))
    arc = np.stack([np.sin((1 - t) * angle), np.sin(t * angle)], axis=-1) / np.sin(angle)[..., None]
    return np.where(linear[..., None], [1 - t, t], arc)


def _branch(linear: NDArray[np.bool_], name: str) -> str:
    return "linear" if linear.all() else name


def _end(t: float, ends: list[int], inputs: Inputs) -> Coefficients | None:
    """The end of an interpolation that t lies on, exactly, None if on neither."""
    return copy_of(ends[int(t)], inputs) if t in (0, 1) else None


def _cannot_divide(weights: Array, parameter: str) -> list[str]:
    if abs(weights.sum()) > 1e-12 * np.abs(weights).sum():
        return []
    sentence = "weights must not add up to 0 where {0} divides by their sum; change one or set {0}: false"
    return [sentence.format(parameter)]
