"""A second implementation of the methods that compare the inputs: on whole tensors, by sorting, in float64.

Of equal variances those of the lowest index come first, as in arcmerge; mergekit leaves that open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from golden.task_vectors import Merged, descending

METHODS = ("sce", "ram", "ramplus_tl", "arcee_fusion")
# A comparison with a threshold that is nearer to it, relative to it, may turn by the rounding of float32.
NEAR = 1e-5
NOISE = 2.0**-23

Terms = tuple[Tensor, Tensor]
"""What is added to the base for each input, [k, *], and a margin, [*]."""


def merged(method: str, inputs: Sequence[Tensor], parameters: dict[str, Any], *, rounded: bool) -> Merged:
    """The result of `method`; variances are compared in bfloat16 if they are `rounded`.

    The margin is also 0 where an element lies next to a threshold.
    """
    base = inputs[parameters["base"]].double()
    others = [x.double() for index, x in enumerate(inputs) if index != parameters["base"]]
    differences = torch.stack([x - base for x in others])
    if method == "sce":
        variant = parameters.get("variant", "mergekit")
        terms, margin = sce(differences, parameters["select_topk"], paper=variant == "paper", rounded=rounded)
    elif method == "arcee_fusion":
        terms, margin = arcee_fusion(others[0], base)
    else:
        amplify = (parameters["r"], parameters["alpha"]) if method == "ramplus_tl" else (0.0, 0.0)
        terms, margin = ram(differences, parameters["epsilon"], *amplify)
    return Merged(base + terms.sum(0), base.abs() + terms.abs().sum(0), margin)


def sce(differences: Tensor, select_topk: float, *, paper: bool, rounded: bool) -> Terms:
    """Selects by variance, weighs by energy, erases the minority."""
    chosen, near = torch.ones_like(differences[0], dtype=torch.bool), torch.zeros_like(differences[0], dtype=torch.bool)
    if select_topk < 1:
        found = variances(differences, rounded=rounded)
        order = descending(found)[: int(int((found != 0).sum()) * select_topk)]
        chosen = torch.zeros(found.numel(), dtype=torch.bool)
        chosen[torch.from_numpy(order.copy())] = True
        chosen = chosen.reshape(found.shape)
        if len(order):
            near = _near(found.double(), float(found.flatten()[order[-1]]), 2.0**-6 if rounded else NEAR)
    selected = torch.where(chosen, differences, 0.0)
    squares = selected.square().reshape(len(selected), -1).mean(1)
    small = squares.sum() == 0 if paper else squares.sum() < 1e-6
    weights = torch.full_like(squares, 1 / len(squares)) if small else squares / squares.sum()
    votes = differences if paper else selected
    total = votes.sum(0)
    agrees = votes.sign() == torch.where(total >= 0, 1.0, -1.0)
    shares = torch.where(agrees, weights.reshape(-1, *[1] * total.dim()), 0.0)
    divisor = shares.sum(0)
    divisor = torch.where(divisor == 0, 1.0, divisor) if paper else divisor.clamp(min=1e-6)
    spread = votes.abs().sum(0)
    margin = torch.where(spread > 0, total.abs() / spread, 1.0)
    return shares * votes / divisor, torch.where(near, 0.0, margin)


def variances(differences: Tensor, *, rounded: bool) -> Tensor:
    """Of each element over the inputs, in float32, step by step as the contract of the ops says."""
    rows, count = [row.float() for row in differences], len(differences)
    mean = sum(rows[1:], rows[0]) / count
    squares = [(row - mean) * (row - mean) for row in rows]
    found = sum(squares[1:], squares[0]) / count
    return found.bfloat16().float() if rounded else found


def ram(differences: Tensor, epsilon: float, r: float, alpha: float) -> Terms:
    """What one input has changed, times its factor; the mean of what several have."""
    threshold = float(torch.tensor(epsilon, dtype=torch.float32))
    active = differences.float().abs() > threshold
    count = active.sum(0)
    factors = []
    for own in active:
        alone, shared = int((own & (count == 1)).sum()), int((own & (count > 1)).sum())
        factors.append(1 + r * min(max(shared / alone, 0), alpha) if alone else 1.0)
    scale = torch.tensor(factors, dtype=torch.float64).reshape(-1, *[1] * count.dim())
    terms = torch.where(active, differences, 0.0) * torch.where(count == 1, scale, 1 / count.clamp(min=1))
    near = torch.stack([_near(one.abs(), threshold, 2.0**-7) for one in differences]).any(0)
    return terms, torch.where(near, 0.0, 1.0).double()


def arcee_fusion(x: Tensor, base: Tensor) -> Terms:
    """The difference where it is important."""
    divergence = torch.from_numpy(divergences(x, base)).float().double()
    importance = ((x - base).float().abs() * divergence.float().reshape(*x.shape[:-1], 1)).double()
    threshold = threshold_of(importance.numpy())
    taken = importance >= threshold
    # A divergence in float32 is a difference of numbers of the size of 1.
    near = (importance - threshold).abs() <= NOISE * (x - base).abs().max()
    return torch.where(taken, x - base, 0.0)[None], torch.where(near, 0.0, 1.0).double()


def divergences(x: Tensor, base: Tensor) -> NDArray[np.float64]:
    """KL(softmax(x) || softmax(base)) of each row, by its definition in numbers of 64 bits and an exponent."""
    columns = x.shape[-1] if x.dim() else 1
    log_p, log_q = (_log_softmax(one.double().numpy().reshape(-1, columns)) for one in (x, base))
    return (np.exp(log_p) * (log_p - log_q)).sum(1).astype(np.float64)


def threshold_of(importance: NDArray[np.floating[Any]]) -> float:
    """The median and one and a half times the distance of the quartiles, which are elements of the tensor."""
    ordered = np.sort(importance.astype(np.float64).ravel())
    first, middle, third = (float(ordered[int(q * (len(ordered) - 1))]) for q in (0.25, 0.5, 0.75))
    return middle + 1.5 * (third - first)


def _log_softmax(rows: NDArray[np.float64]) -> NDArray[np.longdouble]:
    shifted = rows.astype(np.longdouble) - rows.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)))


def _near(values: Tensor, threshold: float, relative: float) -> Tensor:
    return (values - threshold).abs() <= relative * abs(threshold)
