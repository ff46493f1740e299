"""Methods that select elements by comparing the inputs: sce, ram, ramplus_tl, arcee_fusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from arcmerge.geometry import squared_lengths
from arcmerge.merging.methods.magnitudes import Order
from arcmerge.merging.methods.measure import NO_CUT, Divergences, Gram, Histogram, Measure, Selection, Statistic, Sums
from arcmerge.merging.methods.method import Arguments, Method
from arcmerge.merging.methods.rule import Consensus
from arcmerge.merging.methods.task_vectors import VARIANT
from arcmerge.merging.recipe.parameters import Parameter

# mergekit's SCE takes equal weights below this mean square, and divides by no smaller sum of weights.
_SMALL = 1e-6


class _Selective(Method):
    base = "required"

    def selection(self, arguments: Arguments) -> Selection:
        """All elements of all inputs but the base, their magnitudes in float32."""
        k = len(self.others(arguments))
        return Selection((NO_CUT,) * k, (0,) * k, ((1.0, 1.0),) * k)


class Sce(_Selective):
    """SCE: selects the elements that vary most between the inputs, weighs inputs by their energy, erases the minority.

        s_i   = d_i at the int(select_topk · n) elements of the largest variance over the d_i, else 0; n is the number
                of elements whose variance is not 0
        w_i   = sum s_i² / sum over all inputs of the same;  1/N for N inputs where the mean squares sum to below 1e-6
        S     = sign(sum s_i), +1 for a sum of 0
        out   = c + sum w_i s_i / max(sum w_i, 1e-6)                over those i whose s_i has the sign S

    select_topk = 1 selects every element. Of equal variances at the threshold those of the lowest index are selected.
    In bfloat16 recipes variances are compared in bfloat16, else in float32.

    The weights of mergekit become equal without a word where differences are small: three inputs with differences of
    5e-4 on average are below 1e-6. `variant: paper` is FuseChat's own code. It takes w_i from the selected elements,
    but votes and adds with all of them, and has no 1e-6:

        out   = c + sum w_i d_i / sum w_i           over those i whose d_i has the sign S = sign(sum d_i)
    """

    name = "sce"
    title = "SCE"
    reference = "https://arxiv.org/abs/2408.07990"
    parameters = (
        Parameter("int8_mask", bool, default=False),
        Parameter("select_topk", default=1.0, low=0.0, high=1.0),
        VARIANT,
    )
    centers = True

    def measure(self, found: Sequence[Statistic], arguments: Arguments) -> Measure | None:
        if arguments.shared["select_topk"] == 1:
            return super().measure(found, arguments)
        histograms = _histograms(found)
        if not found:
            return Histogram(self.selection(arguments))
        order = Order(histograms, 0)
        kept = self._kept(order, arguments)
        if len(found) == 1 and not arguments.rounded and 0 < kept < order.count:
            return Histogram(self.selection(arguments), ((order.bin(kept),),) * len(self.others(arguments)))
        if isinstance(found[-1].measure, Histogram):
            return Sums(self._rule(histograms, np.ones(len(self.others(arguments))), arguments))
        return None

    def rule(self, found: Sequence[Statistic], arguments: Arguments) -> Consensus:
        k, histograms = len(self.others(arguments)), _histograms(found)
        total = found[-1].total
        squares = squared_lengths(total) if isinstance(found[-1].measure, Gram) else total[:k]
        paper = arguments.shared["variant"] == "paper"
        small = squares.sum() <= 0 if paper else squares.sum() / arguments.elements < _SMALL
        with np.errstate(invalid="ignore"):  # of infinite differences
            weights = np.full(k, 1 / k) if small else squares / squares.sum()
        return self._rule(() if paper else histograms, weights, arguments)

    def selection(self, arguments: Arguments) -> Selection:
        return replace(super().selection(arguments), joint=True, rounded=arguments.rounded)

    def _kept(self, order: Order, arguments: Arguments) -> int:
        return int(order.nonzero * arguments.shared["select_topk"])

    def _rule(self, histograms: Sequence[Statistic], weights: NDArray[np.float64], arguments: Arguments) -> Consensus:
        selection, before = self.selection(arguments), {}
        k = len(weights)
        if histograms:
            order = Order(histograms, 0)
            lower = order.cut(self._kept(order, arguments))
            selection = replace(selection, cuts=((*NO_CUT[:2], *lower),) * k)
            before = {first: ((0, count),) * k for first, count in order.before(lower[0]).items()}
        return Consensus(
            selection,
            tuple((1.0, weight, weight, weight) for weight in weights.tolist()),
            branch=self.name,
            election="sum",
            floor=_SMALL if arguments.shared["variant"] == "mergekit" else 0.0,
            before=before,
        )


class Ram(_Selective):
    """RAM: adds what only one input has changed, and averages what several have changed.

        out   = c + sum d_i / n,     both over the n inputs with |d_i| > epsilon;  c where there is none

    An epsilon of 1e-5 is less than one step of bfloat16 for weights above 2.6e-3, so it then means "changed at all".
    """

    name = "ram"
    title = "Reinforced Agent Merging"
    reference = "https://arxiv.org/abs/2601.13572"
    parameters: ClassVar[tuple[Parameter, ...]] = (Parameter("epsilon", default=1e-5, low=0.0),)

    def selection(self, arguments: Arguments) -> Selection:
        whole = super().selection(arguments)
        code = _code(min(arguments.shared["epsilon"], float(np.finfo(np.float32).max)))
        return replace(whole, cuts=((*NO_CUT[:2], code, 0),) * len(whole.cuts))

    def measure(self, found: Sequence[Statistic], arguments: Arguments) -> Measure | None:
        return None

    def rule(self, found: Sequence[Statistic], arguments: Arguments) -> Consensus:
        return self._rule([1.0] * len(self.others(arguments)), arguments)

    def _rule(self, alone: Sequence[float], arguments: Arguments) -> Consensus:
        return Consensus(
            self.selection(arguments), tuple((1.0, 1.0, 1.0, factor) for factor in alone), branch=self.name
        )


class RamPlus(Ram):
    """RAM+, tensor-local: RAM that amplifies what only one input has changed, the more the more it shares with others.

    A_i   = the elements with |d_i| > epsilon; u_i of them are in no other A_j, and h_i in some
    f_i   = 1 + r · clip(h_i / max(u_i, epsilon), 0, alpha)
    out   = c + f_i d_i                                          where one input has changed
    out   = c + sum d_i / n                                      where n have
    """

    name = "ramplus_tl"
    title = "Reinforced Agent Merging Plus (Tensor-Local)"
    parameters = (Parameter("r", default=0.1), Parameter("alpha", default=0.2), *Ram.parameters)

    def measure(self, found: Sequence[Statistic], arguments: Arguments) -> Measure | None:
        return None if found else Sums(super().rule(found, arguments))

    def rule(self, found: Sequence[Statistic], arguments: Arguments) -> Consensus:
        k, shared = len(self.others(arguments)), arguments.shared
        unique, overlapping = found[0].total[k : 2 * k], found[0].total[2 * k : 3 * k]
        # The factor of an input without unique elements has no effect.
        overlap = overlapping / np.maximum(unique, max(shared["epsilon"], 1))
        return self._rule((1 + shared["r"] * np.clip(overlap, 0, shared["alpha"])).tolist(), arguments)


class ArceeFusion(_Selective):
    """Arcee Fusion: takes an element of the other input x where its change is important.

        I     = |x - c| · KL(softmax(x) || softmax(c))               the divergence of the rows, a vector is one row
        out   = c + d where I >= median(I) + 1.5 (Q3(I) - Q1(I)),  else c;    d = x - c, rounded to float32

    The quartiles are those elements of the tensor in ascending order whose index, from 0, is int(q (D - 1)). They are
    exact; mergekit draws a million elements of larger tensors at random. The divergence is computed in float64 from
    the differences of the rows; that of mergekit is rounding noise where rows are alike, and may be negative. Where
    more than three quarters of I are 0, the threshold is 0 and all of x is taken, as in mergekit.
    """

    name = "arcee_fusion"
    title = "Arcee Fusion"
    reference = "https://arcee.ai"
    maximum = 1

    def measure(self, found: Sequence[Statistic], arguments: Arguments) -> Measure | None:
        if not found:
            return Divergences()
        if len(found) == 1:
            return Histogram(self._scaled(found, arguments))
        if len(found) == 2:
            order = Order(_histograms(found), 0)
            bins = tuple(order.bin(position + 1) for position in _quartiles(order.count))
            return Histogram(self._scaled(found, arguments), (bins,))
        return None

    def rule(self, found: Sequence[Statistic], arguments: Arguments) -> Consensus:
        order = Order(_histograms(found), 0)
        third, middle, first = (order.value(position) for position in _quartiles(order.count))
        threshold = middle + 1.5 * (third - first)
        code = _code(_float32_from(threshold))
        selection = replace(self._scaled(found, arguments), cuts=((*NO_CUT[:2], code, NO_CUT[3]),))
        return Consensus(selection, ((1.0, 1.0, 0.0, 1.0),), branch=self.name)

    def _scaled(self, found: Sequence[Statistic], arguments: Arguments) -> Selection:
        return replace(self.selection(arguments), row_scales=found[0].total)


def _histograms(found: Sequence[Statistic]) -> list[Statistic]:
    return [one for one in found if isinstance(one.measure, Histogram)]


def _quartiles(count: int) -> list[int]:
    """The positions of the third, second and first quartile in descending order."""
    return [count - 1 - int(q * (count - 1)) for q in (0.75, 0.5, 0.25)]


def _code(magnitude: float | np.float32) -> int:
    return int(np.array([magnitude], np.float32).view(np.uint32)[0])


def _float32_from(value: float) -> np.float32:
    """The smallest float32 that is not less than `value`."""
    rounded = np.float32(value)
    # As a float64: numpy would round `value` to compare it with a float32.
    return rounded if float(rounded) >= value else np.nextafter(rounded, np.float32(np.inf))


METHODS: tuple[Method, ...] = (Sce(), Ram(), RamPlus(), ArceeFusion())
