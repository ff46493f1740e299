"""Methods that trim or mask the differences to the base before they add them: ties, breadcrumbs, dare, della."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from arcmerge.merging.methods.linear import TaskArithmetic
from arcmerge.merging.methods.magnitudes import Order
from arcmerge.merging.methods.masks import mask_key
from arcmerge.merging.methods.measure import NO_CUT, Histogram, Measure, Norms, Selection, Statistic, Sums
from arcmerge.merging.methods.method import Arguments
from arcmerge.merging.methods.rule import Coefficients, Consensus
from arcmerge.merging.recipe.parameters import Parameter

# mergekit divides by no norm below this, and by no sum of weights below the other.
_SMALL_NORM = 1e-7
_SMALL_WEIGHT = 1e-8

VARIANT = Parameter("variant", str, default="mergekit", choices=("mergekit", "paper"), extension=True)


def _parameters(normalize: bool, rescale: bool, *own: Parameter) -> tuple[Parameter, ...]:
    return (
        Parameter("weight", scope="non_base"),
        Parameter("density", scope="non_base", default=1.0, low=0.0, high=1.0),
        Parameter("lambda", default=1.0),
        Parameter("normalize", bool, default=normalize),
        Parameter("rescale", bool, default=rescale),
        Parameter("int8_mask", bool, default=False),
        *own,
    )


class TaskVectors(TaskArithmetic):
    """out = c + lambda · sum w_i s_i / den, where s_i is what the method keeps of d_i. Density 1 keeps all of it.

    Without an election den = sum w_i, or 1 where |sum w_i| < 1e-8. With an election S = sign(sum w_i s_i), +1 for a sum
    of 0, all sums over i have only the elements of w_i s_i whose sign is S; den = the sum of these w_i, or 1 where that
    is exactly 0. Without `normalize` den = 1.

    With `rescale` s_i is multiplied by sum |d_i| / sum |s_i| over the tensor, unless one of the sums is below 1e-7.
    These are sums of finite magnitudes; in bfloat16 recipes they are rounded to bfloat16.
    """

    elects: ClassVar[bool] = False

    def constant(self, arguments: Arguments) -> Coefficients | None:
        sparse = arguments.count > 1 and (self.elects or min(self._densities(arguments)) < 1)
        return None if sparse else super().constant(arguments)

    def selection(self, arguments: Arguments) -> Selection:
        """What selects elements, cuts aside."""
        k = len(self.others(arguments))
        return Selection((NO_CUT,) * k, (0,) * k, ((1.0, 1.0),) * k, rounded=arguments.rounded)

    def advice(self, arguments: Arguments) -> str | None:
        if arguments.count > 1 and min(self._densities(arguments)) == 1:
            return f"'density' is 1 for every tensor, so {self.name} keeps all differences; set density, such as 0.5"
        return None

    def consensus(self, selection: Selection, ratios: Sequence[float], arguments: Arguments) -> Consensus:
        """The rule of a selection whose s_i are multiplied by `ratios`."""
        weights, shared = self.weights(arguments).tolist(), arguments.shared
        shares = weights if shared["normalize"] else [0.0] * len(weights)
        if self.elects:
            factors = [(w * r, shared["lambda"] * w * r, s) for w, r, s in zip(weights, ratios, shares, strict=True)]
        else:
            divisor = sum(shares) if abs(sum(shares)) >= _SMALL_WEIGHT else 1.0
            factors = [(1.0, shared["lambda"] * w * r / divisor, 0.0) for w, r in zip(weights, ratios, strict=True)]
        return Consensus(
            selection,
            tuple((vote, value, share, value) for vote, value, share in factors),
            branch=self.name,
            election="sum" if self.elects else "none",
        )

    def _values(self, name: str, arguments: Arguments) -> list[float]:
        values = arguments.per_input[name]
        return [values[index] for index in self.others(arguments)]

    def _densities(self, arguments: Arguments) -> list[float]:
        return self._values("density", arguments)

    @staticmethod
    def _paper(arguments: Arguments) -> bool:
        return bool(arguments.shared.get("variant") == "paper")


class _Trimmed(TaskVectors):
    """Keeps a range of the elements in the order of their magnitudes: the largest first, equal ones by their index."""

    def kept(self, index: int, count: int, arguments: Arguments) -> tuple[int, int]:
        """The range of positions that input `index` keeps of `count` elements."""
        raise NotImplementedError

    def measure(self, found: Sequence[Statistic], arguments: Arguments) -> Measure | None:
        densities, selection = self._densities(arguments), self.selection(arguments)
        trims = any(0 < density < 1 for density in densities)
        # A threshold is that of the tensors with the same densities.
        together = tuple(densities) if self._paper(arguments) else None
        if trims and not found:
            return Histogram(selection, together=together)
        if trims and len(found) == 1 and not arguments.rounded:
            bins = [
                [order.bin(end) for end in self._range(index, order.count, arguments) if 0 < end < order.count]
                for index, order in enumerate(self._orders(found, arguments))
            ]
            return Histogram(selection, tuple((*found_bins, 0, 0)[:2] for found_bins in bins), together)
        if together is not None and not any(isinstance(one.measure, Sums) for one in found):
            return Sums(self.rule(found, arguments), together)
        return None

    def rule(self, found: Sequence[Statistic], arguments: Arguments) -> Consensus:
        histograms = [one for one in found if isinstance(one.measure, Histogram)]
        densities, keeps_ties = self._densities(arguments), self._paper(arguments)
        cuts = [NO_CUT if density else (*NO_CUT[:2], *NO_CUT[:2]) for density in densities]
        ratios, before = [1.0] * len(densities), []
        for index, order in enumerate(self._orders(histograms, arguments)):
            first, last = self._range(index, order.count, arguments)
            upper, lower = order.cut(first), order.cut(last)
            cuts[index] = (*upper, lower[0], NO_CUT[3] if keeps_ties else lower[1])
            before += [order.before(upper[0]), order.before(lower[0])]
            if arguments.shared["rescale"]:
                ratios[index] = _ratio(order.sum(0, order.count), order.sum(first, last))
        rule = self.consensus(replace(self.selection(arguments), cuts=tuple(cuts)), ratios, arguments)
        firsts = before[0] if before else ()
        pairs = {first: [counts[first] for counts in before] for first in firsts}
        return replace(
            rule,
            zero_is_negative=isinstance(found[-1].measure, Sums) and found[-1].total[-1] < 0 if found else False,
            before={first: tuple(zip(each[::2], each[1::2], strict=True)) for first, each in pairs.items()},
        )

    def _range(self, index: int, count: int, arguments: Arguments) -> tuple[int, int]:
        density = self._densities(arguments)[index]
        return (0, count * (density > 0)) if density in (0, 1) else self.kept(index, count, arguments)

    def _orders(self, histograms: Sequence[Statistic], arguments: Arguments) -> list[Order]:
        return [Order(histograms, index) for index in range(len(self.others(arguments)) if histograms else 0)]


class Ties(_Trimmed):
    """TIES: trims each difference to its largest elements, elects a sign, and averages what agrees with it.

        s_i   = the max(1, int(density_i · D)) elements of d_i with the largest |d_i|, of D elements of the tensor
        S     = sign(sum w_i s_i), +1 for a sum of 0
        out   = c + lambda · sum w_i s_i / sum w_i     over those i whose w_i s_i has the sign S

    Of equal magnitudes at the threshold those of the lowest index stay. In bfloat16 recipes magnitudes are compared in
    bfloat16, else in float32.

    `variant: paper` is the authors' code: the threshold is that of the whole model and all magnitudes equal to it stay;
    the vote is S = sign(sum s_i), not weighted; a vote of 0 has the sign of the majority of all votes of the model:

        s_i   = the elements of d_i with |d_i| >= the int(density_i · D)-th largest, of D elements of the model
        out   = c + lambda · sum w_i s_i / sum w_i     over those i whose s_i has the sign S

    If densities differ between tensors, those with the same densities count as a model. mergekit's `rescale` multiplies
    s_i by sum |d_i| / sum |s_i|.
    """

    name = "ties"
    title = "TIES"
    reference = "https://arxiv.org/abs/2306.01708"
    parameters = (*_parameters(True, False), VARIANT)
    elects = True

    def kept(self, index: int, count: int, arguments: Arguments) -> tuple[int, int]:
        return 0, max(1, int(self._densities(arguments)[index] * count))

    def consensus(self, selection: Selection, ratios: Sequence[float], arguments: Arguments) -> Consensus:
        rule = super().consensus(selection, ratios, arguments)
        if not self._paper(arguments):
            return rule
        factors = [(r, v, s, a) for r, (_, v, s, a) in zip(ratios, rule.factors, strict=True)]
        return replace(rule, factors=tuple(factors))


class Breadcrumbs(_Trimmed):
    """Model Breadcrumbs: removes the largest and the smallest elements of each difference.

        s_i   = d_i without the int(gamma_i · D) elements of the largest |d_i|, of which the int(density_i · D) largest
        out   = c + lambda · sum w_i s_i

    Fewer large elements are removed where the density would not be reached otherwise. Of equal magnitudes those of the
    lowest index count as larger. In the paper, gamma is the share of the *smallest* elements and beta that of the
    largest: recipes are in mergekit's terms.
    """

    name = "breadcrumbs"
    title = "Model Breadcrumbs"
    reference = "https://arxiv.org/abs/2312.06795"
    parameters = _parameters(False, False, Parameter("gamma", scope="non_base", default=0.01, low=0.0, high=1.0))

    def kept(self, index: int, count: int, arguments: Arguments) -> tuple[int, int]:
        size = int(self._densities(arguments)[index] * count)
        first = min(int(self._values("gamma", arguments)[index] * count), count - size)
        return first, first + size


class BreadcrumbsTies(Breadcrumbs):
    """Model Breadcrumbs with the election of TIES: what `breadcrumbs` keeps, as far as it agrees on a sign.

    S     = sign(sum w_i s_i), +1 for a sum of 0
    out   = c + lambda · sum w_i s_i                     over those i whose w_i s_i has the sign S
    """

    name = "breadcrumbs_ties"
    title = "Model Breadcrumbs with TIES"
    elects = True


class _Masked(TaskVectors):
    """Keeps elements at random."""

    random = True

    def probabilities(self, index: int, arguments: Arguments) -> tuple[float, float]:
        """The probability of the smallest and of the largest element of a row. The density is between 0 and 1."""
        raise NotImplementedError

    def selection(self, arguments: Arguments) -> Selection:
        densities = self._densities(arguments)
        return replace(
            super().selection(arguments),
            keys=tuple(mask_key(arguments.seed, arguments.tensor, index) for index in range(len(densities))),
            probabilities=tuple(
                self.probabilities(index, arguments) if 0 < density < 1 else (density, density)
                for index, density in enumerate(densities)
            ),
        )

    def measure(self, found: Sequence[Statistic], arguments: Arguments) -> Measure | None:
        masked = any(0 < density < 1 for density in self._densities(arguments))
        if found or not masked or not arguments.shared["rescale"] or self._paper(arguments):
            return None
        return Norms(self.selection(arguments))

    def rule(self, found: Sequence[Statistic], arguments: Arguments) -> Consensus:
        ratios = [1.0] * len(self.others(arguments))
        for statistic in found:
            ratios = [_ratio(all_, kept) for all_, kept, _ in statistic.total.tolist()]
        rule = self.consensus(self.selection(arguments), ratios, arguments)
        return replace(rule, inverse=self._paper(arguments) and arguments.shared["rescale"])


class DareLinear(_Masked):
    """DARE: keeps each element of a difference with the probability `density`, and adds them up.

        s_i   = m_i d_i · sum |d_i| / sum |m_i d_i|,   m_i = 1 with the probability density_i, else 0
        out   = c + lambda · sum w_i s_i, the sum divided by sum w_i if `normalize`

    `variant: paper` divides by the density instead of restoring the norm: s_i = m_i d_i / density_i.

    The masks follow from the seed, the name of the tensor and the index of the model, and are nested: what is kept at
    one density is kept at any larger one. Probabilities are multiples of 2^-16.
    """

    name = "dare_linear"
    title = "Linear DARE"
    reference = "https://arxiv.org/abs/2311.03099"
    parameters = (*_parameters(False, True), VARIANT)

    def probabilities(self, index: int, arguments: Arguments) -> tuple[float, float]:
        density = self._densities(arguments)[index]
        return density, density


class DareTies(DareLinear):
    """DARE with the election of TIES: what `dare_linear` keeps, as far as it agrees on a sign.

        S     = sign(sum w_i s_i), +1 for a sum of 0
        out   = c + lambda · sum w_i s_i                     over those i whose w_i s_i has the sign S

    `variant: paper` divides s_i by the density, as for `dare_linear`.
    """

    name = "dare_ties"
    title = "DARE TIES"
    elects = True


class DellaLinear(_Masked):
    """DELLA: keeps elements of a difference at random, large ones of a row more often, and adds them up.

        p_i   = density_i - epsilon_i + 2 epsilon_i (r - 1) / (n - 1)
        s_i   = m_i d_i · sum |d_i| / sum |m_i d_i|,   m_i = 1 with the probability p_i, else 0
        out   = c + lambda · sum w_i s_i, the sum divided by sum w_i if `normalize`

    r is the rank of |d_i| in its row of n elements, 1 for the smallest; a vector is one row. Of equal magnitudes the
    one of the lowest index has the lowest rank. `variant: paper` divides each element by its probability instead of
    restoring the norm: s_i = m_i d_i / p_i.

    The masks follow from the seed, the name of the tensor and the index of the model, and are nested as for
    `dare_linear`.
    """

    name = "della_linear"
    title = "Linear DELLA"
    reference = "https://arxiv.org/abs/2406.11617"
    parameters = (*_parameters(False, True, Parameter("epsilon", scope="non_base", default=0.15, low=0.0)), VARIANT)

    def check(self, arguments: Arguments) -> list[str]:
        problems = super().check(arguments)
        if problems or arguments.count == 1:
            return problems
        found = [
            f"'epsilon' must be less than the density and than 1 - density, got {epsilon:g} with a density of "
            f"{density:g}; lower it, or set density to 0.5"
            for density, epsilon in zip(self._densities(arguments), self._values("epsilon", arguments), strict=True)
            if 0 < density < 1 and not epsilon < min(density, 1 - density)
        ]
        return list(dict.fromkeys(found))

    def probabilities(self, index: int, arguments: Arguments) -> tuple[float, float]:
        density, epsilon = self._densities(arguments)[index], self._values("epsilon", arguments)[index]
        return density - epsilon, density + epsilon


class Della(DellaLinear):
    """DELLA with the election of TIES: what `della_linear` keeps, as far as it agrees on a sign.

        S     = sign(sum w_i s_i), +1 for a sum of 0
        out   = c + lambda · sum w_i s_i / sum w_i           over those i whose w_i s_i has the sign S

    `variant: paper` divides s_i by its probability, as for `della_linear`.
    """

    name = "della"
    title = "DELLA"
    elects = True
    parameters = (*_parameters(True, True, Parameter("epsilon", scope="non_base", default=0.15, low=0.0)), VARIANT)


def _ratio(all_: float, kept: float) -> float:
    """The factor that restores a sum of magnitudes."""
    return 1.0 if all_ < _SMALL_NORM or kept < _SMALL_NORM else all_ / kept


METHODS: tuple[TaskVectors, ...] = (
    Ties(),
    DareLinear(),
    DareTies(),
    Breadcrumbs(),
    BreadcrumbsTies(),
    Della(),
    DellaLinear(),
)
