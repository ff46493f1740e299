"""A second implementation of the methods that trim or mask differences: on whole tensors, by sorting, in float64.

Of equal magnitudes those of the lowest index come first, as in arcmerge; mergekit leaves that open. Random masks are
those of arcmerge, which record.py gives to mergekit too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arcmerge.merging.methods.masks import mask_key
from arcmerge.ops.philox import uniform16

Kind = Literal["magnitude", "outliers", "random", "magprune"]
# How elements are chosen, and whether a sign is elected.
METHODS: dict[str, tuple[Kind, bool]] = {
    "ties": ("magnitude", True),
    "breadcrumbs": ("outliers", False),
    "breadcrumbs_ties": ("outliers", True),
    "dare_linear": ("random", False),
    "dare_ties": ("random", True),
    "della_linear": ("magprune", False),
    "della": ("magprune", True),
}


@dataclass(frozen=True)
class Merged:
    """The result of a method for a tensor.

    Args:
        exact: the result, float64.
        size: the sum of the magnitudes of its terms, to which rounding errors are relative.
        margin: |sum of the votes| / sum of |votes|; 1 where nothing is elected. Rounding turns votes of small margins.
    """

    exact: Tensor
    size: Tensor
    margin: Tensor


def merged(
    method: str, inputs: Sequence[Tensor], parameters: dict[str, Any], name: str, *, rounded: bool, seed: int = 0
) -> Merged:
    """The result for the tensor `name`, whose magnitudes are compared and summed in bfloat16 if they are `rounded`."""
    kind, elects = METHODS[method]
    base = inputs[parameters["base"]].double()
    others = [index for index in range(len(inputs)) if index != parameters["base"]]
    settings = [{key: value[index] for key, value in parameters.items() if isinstance(value, list)} for index in others]
    differences = [inputs[index].double() - base for index in others]
    terms, weights = [], [one["weight"] for one in settings]
    for number, (difference, own) in enumerate(zip(differences, settings, strict=True)):
        single = difference.float().abs()
        magnitudes = single.bfloat16().float() if rounded else single
        mask = chosen(kind, magnitudes, own, mask_key(seed, name, number))
        kept = torch.where(mask, difference, 0.0)
        if parameters["rescale"]:
            before, after = (float(part.double().sum()) for part in (magnitudes, magnitudes[mask]))
            kept = kept * (before / after if before >= 1e-7 and after >= 1e-7 else 1)
        terms.append(own["weight"] * kept)
    stack, factors = torch.stack(terms), torch.tensor(weights, dtype=torch.float64).reshape(-1, *[1] * base.dim())
    total, spread = stack.sum(0), stack.abs().sum(0)
    if elects:
        agrees = stack.sign() == torch.where(total >= 0, 1.0, -1.0)
        divisor = torch.where(agrees, factors, 0.0).sum(0)
        divisor = torch.where(divisor == 0, 1.0, divisor)
        stack = torch.where(agrees, stack, 0.0)
    else:
        divisor = factors.sum(0).expand_as(base)
        divisor = torch.where(divisor.abs() < 1e-8, 1.0, divisor)
    if not parameters["normalize"]:
        divisor = torch.ones_like(divisor)
    scale = parameters["lambda"] / divisor
    margin = torch.where(spread > 0, total.abs() / spread, 1.0) if elects else torch.ones_like(total)
    return Merged(base + scale * stack.sum(0), base.abs() + scale.abs() * stack.abs().sum(0), margin)


def chosen(kind: Kind, magnitudes: Tensor, settings: dict[str, float], key: int) -> Tensor:
    """Which elements a method keeps of one difference with these magnitudes."""
    density, count = settings["density"], magnitudes.numel()
    if density >= 1 or density <= 0:
        return torch.full(magnitudes.shape, density > 0)
    if kind in ("random", "magprune"):
        return drawn(probabilities(magnitudes, density, settings.get("epsilon", 0.0)), key)
    size = int(density * count)
    first, size = (
        (0, max(1, size)) if kind == "magnitude" else (min(int(settings["gamma"] * count), count - size), size)
    )
    kept = np.zeros(count, bool)
    kept[descending(magnitudes)[first : first + size]] = True
    return torch.from_numpy(kept).reshape(magnitudes.shape)


def descending(magnitudes: Tensor) -> NDArray[np.intp]:
    """The indices of the elements, the largest first, equal ones by their index."""
    return np.argsort(-magnitudes.double().numpy().ravel(), kind="stable")


def probabilities(magnitudes: Tensor, density: float, epsilon: float) -> NDArray[np.float64]:
    """The probability of each element: density - epsilon for the smallest of a row to density + epsilon."""
    rows = magnitudes.double().numpy().reshape(-1, magnitudes.shape[-1] if magnitudes.dim() else 1)
    ranks = np.argsort(np.argsort(rows, axis=1, kind="stable"), axis=1)
    share = ranks / (rows.shape[1] - 1) if rows.shape[1] > 1 else np.full(rows.shape, 0.5)
    return np.asarray(density - epsilon + 2 * epsilon * share).reshape(magnitudes.shape)


def drawn(probability: NDArray[np.float64], key: int) -> Tensor:
    """What random numbers of 16 bits keep."""
    numbers = uniform16(key, probability.size, torch.device("cpu")).numpy().reshape(probability.shape)
    return torch.from_numpy((numbers + 0.5) / 65536 < probability)
