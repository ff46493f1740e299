"""Lengths, cosines and arcs from Gram matrices, which several methods share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from arcmerge.merging.methods.rule import Array


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
