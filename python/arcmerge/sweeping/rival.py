"""The test of a race: whether a candidate is worse than another one beyond doubt, by a part of the items.

All candidates are scored on the same N items (windows of text, or questions) in the same random order. D_i is the loss
of a candidate on item i minus that of its rival. The candidate is worse if the total of all D_i is above 0. After n
items the total is predicted as in surveys of a finite population (Royall 1970, "On finite population sampling theory
under certain linear regression models"):

    D_i = b'x_i + e_i,  e_i normal                x_i = (1, controls of item i), p numbers
    T   = sum of D_i for i <= n  +  b'x           b by least squares, x = sum of x_i for i > n
    V   = N - n + x'(X'X)^-1 x                    the variance of T in units of that of e_i
    t   = T / (s sqrt(V)),  v = n - p             s^2 = the sum of the squared residuals / v
    E   = (1 + m g)^(-1/2) ((1 + t^2/v) / (1 + t^2/(v (1 + m g))))^((v + 1)/2),  m = N^2/V,  g = 10

Without controls this is the paired t-test with the correction for a finite population. The controls are known for all
items: the leading principal components of the differences between candidates that have been scored on all items. What
makes an item easier for one candidate mostly makes it easier for its neighbours, so the controls explain most of the
variance. There are none before two candidates are complete.

E is the Bayes factor of a mean difference ~ N(0, g s^2) against 0, with the right Haar prior for b and the variance.
For normal e_i and a total of 0 it is a test martingale whatever their variance (Perez-Ortiz et al. 2024, "E-statistics,
group invariance and anytime-valid testing"): that it reaches K / (2 * 0.05) at any look has a probability of at most
2 * 0.05 / K (Ville's inequality), and T is above 0 in half of these cases, or in fewer if the total is below 0. There,
a candidate is stopped. Rival and controls change only when a further candidate is complete. So of K candidates the best
one meets at most K pairs of them, and is kept with a probability of at least 0.95 (the union bound).

The bound takes these pairs as given beforehand, but they follow from the losses so far. Heavy tails on both sides
hardly change it, because large differences also enlarge s. It does not hold if a candidate is better in a few items
only, by far more than it is worse in all others: so no candidate is stopped before a tenth of the items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

ERROR = 0.05
# g. Between candidates that the controls explain, the mean difference is some standard deviations of the rest.
PRIOR = 10.0
MAX_CONTROLS = 2
MIN_LOOK = 6  # items
MIN_SHARE = 0.1


@dataclass(frozen=True)
class Rival:
    """A candidate, as others are compared with it. All losses are in the order of the race.

    Args:
        losses: its losses on the items that it has been scored on, the first ones of N.
        controls: (N, p - 1).
        threshold: the logarithm of E from which on there is no doubt.
        limit: the number of items after which it does not stop a candidate.
    """

    losses: Array
    controls: Array
    threshold: float
    limit: int

    def compare(self, losses: Array) -> tuple[float, float]:
        """Compare a candidate by the items that both have been scored on.

        Args:
            losses: the losses of the candidate on the first items.

        Returns:
            T, the predicted difference of the sums of all losses, above 0 if the candidate is worse, and infinity if a
            loss is no number; and log E, minus infinity if it is too early to say.
        """
        total, count = len(self.controls), min(len(losses), len(self.losses))
        design = np.column_stack([np.ones(total), self.controls])
        seen, rest = design[:count], design[count:]
        differences = losses[:count] - self.losses[:count]
        freedom = count - design.shape[1]
        if not np.isfinite(differences).all():
            return np.inf, -np.inf
        slopes = np.linalg.lstsq(seen, differences, rcond=None)[0]
        unseen = rest.sum(axis=0)
        predicted = float(differences.sum() + unseen @ slopes)
        if count < first_look(total) or count == total or freedom < 1:
            return predicted, -np.inf
        variance = len(rest) + unseen @ np.linalg.pinv(seen.T @ seen) @ unseen
        noise = variance * np.square(differences - seen @ slopes).sum()  # v s^2 V, so that t^2/v = T^2 / noise
        if not noise + predicted**2 > 0:
            return predicted, -np.inf
        growth = 1 + PRIOR * total**2 / variance
        ratio = np.log(noise + predicted**2) - np.log(noise + predicted**2 / growth)
        return predicted, float((freedom + 1) / 2 * ratio - np.log(growth) / 2)

    def stops(self, losses: Array) -> bool:
        """Whether a candidate with these losses is worse beyond doubt."""
        difference, evidence = self.compare(losses)
        return evidence >= self.threshold and difference > 0


def first_look(total: int) -> int:
    """The number of items, of all, before which no candidate is stopped."""
    return max(MIN_LOOK, math.ceil(MIN_SHARE * total))


def threshold_of(candidates: int) -> float:
    """The logarithm of E from which on there is no doubt, for so many candidates."""
    return math.log(candidates / (2 * ERROR))


def controls_of(losses: Array, others: Sequence[Array]) -> Array:
    """The controls of a rival, (N, p - 1).

    Args:
        losses: the losses of the rival, (N,).
        others: those of the other candidates that have been scored on all items.
    """
    if not others:
        return np.zeros((len(losses), 0))
    differences = np.array(others) - losses
    _, sizes, components = np.linalg.svd(differences - differences.mean(axis=1, keepdims=True), full_matrices=False)
    used = components[: min(MAX_CONTROLS, int((sizes > 1e-9 * (sizes[0] or 1)).sum()))]
    controls: Array = used.T * np.sqrt(len(losses))
    return controls
