"""nearswap, the one elementwise method."""

from __future__ import annotations

from arcmerge.merging.methods.method import Arguments, Coefficients, Method, copy_of
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
    elementwise = True

    def constant(self, arguments: Arguments) -> Coefficients | None:
        if (single := super().constant(arguments)) is not None:
            return single
        return copy_of(arguments.base or 0, arguments) if arguments.shared["t"] <= 0 else None


METHODS: tuple[Method, ...] = (NearSwap(),)
