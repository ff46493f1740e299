"""Methods that need no statistics: nearswap, magmax, median."""

from __future__ import annotations

from collections.abc import Sequence

from arcmerge.merging.methods.measure import Measure, Statistic
from arcmerge.merging.methods.method import Arguments, Method, copy_of
from arcmerge.merging.methods.rule import Coefficients, Elementwise
from arcmerge.merging.recipe.parameters import Parameter


class _Elementwise(Method):
    """Computes every element from those of the inputs alone."""

    def measure(self, found: Sequence[Statistic], arguments: Arguments) -> Measure | None:
        return None


class NearSwap(_Elementwise):
    """Moves elements of the base a toward the other input b where the two are near.

        out = g b + (1 - g) a,  g = clamp(t / |b - a|, 0, 1)

    |b - a| is elementwise and counts as at least 1e-6.
    """

    name = "nearswap"
    title = "NearSwap"
    reference = "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001"
    parameters = (Parameter("t"),)
    base = "required"
    maximum = 1

    def constant(self, arguments: Arguments) -> Coefficients | None:
        if (single := super().constant(arguments)) is not None:
            return single
        return copy_of(arguments.base or 0, arguments) if arguments.shared["t"] <= 0 else None

    def rule(self, found: Sequence[Statistic], arguments: Arguments) -> Elementwise:
        return Elementwise("nearswap", arguments.shared["t"], self.name)


class MagMax(_Elementwise):
    """Takes each element from the input that is farthest from the base.

        out = c + lambda · d_i,  i = argmax |d_i|, the first of equal ones

    mergekit does not have this method.
    """

    name = "magmax"
    title = "MagMax"
    reference = "https://arxiv.org/abs/2407.06322"
    parameters = (Parameter("lambda", default=1.0),)
    base = "required"

    def rule(self, found: Sequence[Statistic], arguments: Arguments) -> Elementwise:
        return Elementwise("magmax", arguments.shared["lambda"], self.name)


class Median(_Elementwise):
    """The median of each element over all inputs; of an even number of inputs the mean of the two in the middle.

    mergekit does not have this method.
    """

    name = "median"
    title = "Median"
    reference = "https://en.wikipedia.org/wiki/Median"

    def rule(self, found: Sequence[Statistic], arguments: Arguments) -> Elementwise:
        return Elementwise("median", 0.0, self.name)


METHODS: tuple[Method, ...] = (NearSwap(), MagMax(), Median())
