"""nearswap, which follows from no measure."""

from __future__ import annotations

from collections.abc import Sequence

from arcmerge.merging.methods.measure import Measure, Statistic
from arcmerge.merging.methods.method import Arguments, Method, copy_of
from arcmerge.merging.methods.rule import Coefficients, Elementwise
from arcmerge.merging.recipe.parameters import Parameter


class NearSwap(Method):
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

    def measure(self, found: Sequence[Statistic], arguments: Arguments) -> Measure | None:
        return None

    def rule(self, found: Sequence[Statistic], arguments: Arguments) -> Elementwise:
        return Elementwise("nearswap", arguments.shared["t"], self.name)


METHODS: tuple[Method, ...] = (NearSwap(),)
