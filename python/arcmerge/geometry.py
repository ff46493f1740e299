"""Lengths, cosines and arcs from Gram matrices, which merge methods and the op `slerp` share. All is float64."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

# Slerp interpolates on the straight line where |cos θ| is larger.
NEARLY_PARALLEL = 0.9995
# Slerp takes a length of at most so much for zero.
NEARLY_ZERO = 1e-8


def squared_lengths(gram: Array) -> Array:
    """The diagonal (..., k). Values that rounding made negative count as zero."""
    return np.maximum(np.diagonal(gram, axis1=-2, axis2=-1), 0.0)


def cosines_of(gram: Array, squares: Array) -> Array:
    """Cosines (..., k, k) in [-1, 1], with `squares` (..., k) as the squared lengths.

    The root is of the product: sqrt(s · s) is exactly s, so parallel vectors give exactly 1 or -1. The product of the
    squared lengths of float32 tensors lies between 1e-180 and 1e180.
    """
    return np.clip(gram / np.sqrt(squares[..., :, None] * squares[..., None, :]), -1, 1)


def length_of_sum(weights: Array, gram: Array) -> Array:
    """|sum w_i x_i|, (..., k) and (..., k, k) -> (...). Squares that rounding made negative count as zero."""
    squares = weights[..., None, :] @ gram @ weights[..., :, None]
    return np.sqrt(np.maximum(squares[..., 0, 0], 0.0))


def slerp_weights(cosine: Array, t: float, linear: NDArray[np.bool_]) -> Array:
    """Weights (..., 2) of the point at t on the arc between two vectors, on the straight line where `linear`."""
    angle = np.arccos(np.where(linear, 0.0, cosine))
    arc = np.stack([np.sin((1 - t) * angle), np.sin(t * angle)], axis=-1) / np.sin(angle)[..., None]
    return np.where(linear[..., None], [1 - t, t], arc)


def slerp_coefficients(gram: Array, t: float, normalize: bool) -> tuple[Array, NDArray[np.bool_]]:
    """The coefficients of a and b in the merge method `slerp`, whose docstring has the formula.

    Args:
        gram: (..., 2, 2), of a and b.
        t: position between a (0) and b (1).
        normalize: whether the lengths are interpolated linearly.

    Returns:
        The coefficients (..., 2), and where (...) the interpolation is on the straight line.
    """
    squares = squared_lengths(gram)
    lengths = np.sqrt(squares)
    cosines = cosines_of(gram, np.where(lengths > NEARLY_ZERO, squares, 1.0))
    cosine = cosines[..., 0, 1]
    linear = np.abs(cosine) > NEARLY_PARALLEL
    # A mixture of two bf16 values with a decimal t often lies halfway between two bf16 values. With mergekit's weights
    # to the bit, 1 - t of the float32 t, both programs round it the same way.
    straight = [float(np.float32(1) - np.float32(t)), float(np.float32(t))]
    weights = np.where(linear[..., None], straight, slerp_weights(cosine, t, linear))
    if normalize:
        length = (1 - t) * lengths[..., 0] + t * lengths[..., 1]
        weights = (length / length_of_sum(weights, cosines))[..., None] * weights / lengths
        linear = (cosine < -NEARLY_PARALLEL) | (lengths <= NEARLY_ZERO).any(axis=-1)
        weights = np.where(linear[..., None], straight, weights)
    return weights, linear
