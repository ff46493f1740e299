"""DeLERP: linear interpolation of the direction, at the larger length."""

from __future__ import annotations

import numpy as np

from arcmerge.geometry import length_of_sum, squared_lengths
from arcmerge.merging.methods.method import Arguments, Method
from arcmerge.merging.methods.rule import Array, Mask
from arcmerge.merging.recipe.parameters import Parameter


class DeLerp(Method):
    """Decomposed linear interpolation from the base a (t = 0) to the other input b (t = 1): the direction of their
    linear interpolation, at the larger of their lengths.

        m     = (1 - t) a + t b
        out   = max(|a|, |b|) · m / |m|
        out   = m                             where |m| <= 1e-7 max(|a|, |b|): the direction is missing

    So t = 0 gives the direction of a, and a itself only if it is not the shorter one. t is not clamped.

    mergekit does not have this method. The two implementations for it that are public interpolate the inputs as they
    are, not their directions, as the formula does.
    """

    name = "delerp"
    title = "DeLERP"
    reference = "https://huggingface.co/blog/grimjim/delerp-merge-method"
    parameters = (Parameter("t"),)
    base = "required"
    maximum = 1

    def formula(self, gram: Array, arguments: Arguments) -> tuple[Array, Mask]:
        t = arguments.shared["t"]
        weights = np.where(np.arange(2) == arguments.base, 1 - t, t)
        size = length_of_sum(weights, gram)
        length = np.sqrt(squared_lengths(gram).max(axis=-1))
        linear = size <= 1e-7 * length
        scale = np.where(linear, 1.0, length / size)
        return scale[..., None] * weights, linear


METHODS: tuple[Method, ...] = (DeLerp(),)
