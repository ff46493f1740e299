"""Racing: a candidate that is worse than the best one beyond doubt is stopped early.

All candidates are scored on the same N items (windows of text, or questions) in the same random order. D_i is the loss
of a candidate on item i minus that of the best candidate that has been scored on all items. The candidate is worse if
the total of all D_i is above 0. After n items the total is predicted as in surveys of a finite population (Royall 1970,
"On finite population sampling theory under certain linear regression models"):

    D_i = b'x_i + e_i,  e_i normal                x_i = (1, controls of item i), p numbers
    T   = sum of D_i for i <= n  +  b'x           b by least squares, x = sum of x_i for i > n
    V   = N - n + x'(X'X)^-1 x                    the variance of T in units of that of e_i
    t   = T / (s sqrt(V)),  v = n - p             s^2 = the sum of the squared residuals / v
    E   = (1 + m g)^(-1/2) ((1 + t^2/v) / (1 + t^2/(v (1 + m g))))^((v + 1)/2),  m = N^2/V,  g = 10

Without controls this is the paired t-test with the correction for a finite population. The controls are known for all
items: the leading principal components of the differences between candidates that have been scored on all items. What
makes an item easier for one candidate mostly makes it easier for its neighbours, so the controls explain most of the
variance.

E is the Bayes factor of a mean difference ~ N(0, g s^2) against 0, with the right Haar prior for b and the variance.
For normal e_i and a total of 0 it is a test martingale whatever their variance (Perez-Ortiz et al. 2024, "E-statistics,
group invariance and anytime-valid testing"): that it reaches K / (2 * 0.05) at any look has a probability of at most
2 * 0.05 / K (Ville's inequality), and T is above 0 in half of these cases, or in fewer if the total is below 0. There,
a candidate is stopped. With K candidates, the best one is therefore kept with a probability of at least 0.95.

Heavy tails on both sides hardly change that, because large differences also enlarge s. It does not hold if a candidate
is better in a few items only, by far more than it is worse in all others: so no candidate is stopped before a tenth of
the items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arcmerge.errors import ArcmergeError
from arcmerge.sweeping.candidates import Candidate
from arcmerge.sweeping.journal import Scored
from arcmerge.sweeping.results import best_of

Array = NDArray[np.float64]

ERROR = 0.05
# g. Between candidates that the controls explain, the mean difference is some standard deviations of the rest.
PRIOR = 10.0
MAX_CONTROLS = 2
MIN_LOOK = 6  # items
MIN_SHARE = 0.1
MIN_ITEMS = 12


@dataclass(frozen=True)
class Rival:
    """The best candidate that has been scored on all items, as others are compared with it.

    Args:
        losses: its losses, (N,).
        controls: (N, p - 1).
        threshold: the logarithm of E from which on there is no doubt.
    """

    losses: Array
    controls: Array
    threshold: float

    def compare(self, losses: Array, scored: Sequence[int]) -> tuple[float, float]:
        """Compare a candidate that has been scored on some items.

        Args:
            losses: the losses of the candidate on these items, (n,).
            scored: the indices of the items, n of them.

        Returns:
            T, the predicted difference of the sums of all losses, above 0 if the candidate is worse; and log E, minus
            infinity if it is too early to say.
        """
        total, count = len(self.losses), len(scored)
        design = np.column_stack([np.ones(total), self.controls])
        seen, rest = design[scored], np.delete(design, scored, axis=0)
        differences = losses - self.losses[scored]
        freedom = count - design.shape[1]
        if not np.isfinite(differences).all() or freedom < 1:
            return 0.0, -np.inf
        slopes = np.linalg.lstsq(seen, differences, rcond=None)[0]
        unseen = rest.sum(axis=0)
        predicted = float(differences.sum() + unseen @ slopes)
        if count < first_look(total) or count == total:
            return predicted, -np.inf
        variance = len(rest) + unseen @ np.linalg.pinv(seen.T @ seen) @ unseen
        noise = variance * np.square(differences - seen @ slopes).sum()  # v s^2 V, so that t^2/v = T^2 / noise
        if not noise + predicted**2 > 0:
            return predicted, -np.inf
        growth = 1 + PRIOR * total**2 / variance
        ratio = np.log(noise + predicted**2) - np.log(noise + predicted**2 / growth)
        return predicted, float((freedom + 1) / 2 * ratio - np.log(growth) / 2)


def first_look(total: int) -> int:
    """The number of items, of all, before which no candidate is stopped."""
    return max(MIN_LOOK, math.ceil(MIN_SHARE * total))


def rival_of(scored: Sequence[Scored], minimize: bool, candidates: int) -> Rival | None:
    """The rival of the next candidate; None until two candidates, the best and a control, are scored on all items.

    Args:
        scored: the candidates so far.
        minimize: whether a lower score is better.
        candidates: the number of all candidates, K.
    """
    complete = [one for one in scored if one.losses and np.isfinite(one.losses).all()]
    best = best_of(complete, minimize)
    if best is None or len(complete) < 2:
        return None
    losses = np.array(best.losses)
    differences = np.array([one.losses for one in complete if one is not best]) - losses
    _, sizes, components = np.linalg.svd(differences - differences.mean(axis=1, keepdims=True), full_matrices=False)
    used = components[: min(MAX_CONTROLS, int((sizes > 1e-9 * (sizes[0] or 1)).sum()))]
    return Rival(losses, used.T * np.sqrt(len(losses)), float(np.log(candidates / (2 * ERROR))))


def order_of(count: int, seed: int) -> list[int]:
    """The order in which items are scored.

    Raises:
        ArcmergeError: if there are so few items that no candidate can be stopped.
    """
    if count < MIN_ITEMS:
        raise ArcmergeError(
            f"'race' must have {MIN_ITEMS} windows or questions at least, got {count}; give more, or a smaller window"
        )
    return [int(index) for index in np.random.default_rng(seed).permutation(count)]


def from_the_middle(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates in the order of a race: those in the middle of what is varied first, as they stop the others."""
    names = {name for one in candidates for name in one.varied}
    values = {name: [one.varied[name] for one in candidates if name in one.varied] for name in names}
    middles = {name: (min(found) + max(found)) / 2 for name, found in values.items()}
    spans = {name: max(found) - min(found) or 1.0 for name, found in values.items()}

    def distance(one: Candidate) -> float:
        squares = [((value - middles[name]) / spans[name]) ** 2 for name, value in one.varied.items()]
        return sum(squares) / (len(squares) or 1)

    return sorted(candidates, key=lambda one: round(distance(one), 9))
