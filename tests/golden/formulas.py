"""A second implementation of every merge method: on whole tensors, in float64, by its definition.

The product computes these from Gram matrices; nothing here does. Inputs are float64 tensors of one shape, `base` the
position of base_model among them or None, `weight` one number an input (None for the base).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def slerp(inputs: Sequence[Tensor], base: int, t: float) -> Tensor:
    """From the base (t = 0) along the arc; linear where |cosine| > 0.9995; below 1e-8 a length counts as 1."""
    a, b = inputs[base], inputs[1 - base]
    cosine = float((_unit(a, 1e-8) * _unit(b, 1e-8)).sum())
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = torch.tensor(cosine, dtype=torch.float64).acos()
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def nuslerp(
    inputs: Sequence[Tensor],
    base: int | None,
    weight: Sequence[float | None],
    nuslerp_flatten: bool,
    nuslerp_row_wise: bool,
) -> Tensor:
    """slerp of two tensors, or of their differences from the base, as one vector, by rows or by columns."""
    origin = 0 if base is None else inputs[base]
    (a, wa), (b, wb) = ((x - origin, w) for i, (x, w) in enumerate(zip(inputs, weight, strict=True)) if i != base)
    assert wa is not None
    assert wb is not None
    t = 0.5 if abs(wa + wb) < 1e-6 else wb / (wa + wb)
    if nuslerp_flatten or a.dim() == 1:
        vectors = (a.reshape(1, -1), b.reshape(1, -1))
    else:
        vectors = (a.T, b.T) if nuslerp_row_wise else (a, b)
    merged = torch.stack([_nuslerp_vector(x, y, t) for x, y in zip(*vectors, strict=True)])
    return origin + (merged.T if nuslerp_row_wise and not nuslerp_flatten and a.dim() == 2 else merged).reshape(a.shape)


def _nuslerp_vector(a: Tensor, b: Tensor, t: float) -> Tensor:
    if torch.equal(a, b) or torch.equal(a, -b):
        return (1 - t) * a + t * b
    angle = ((a / a.norm().clamp(min=1e-7)) @ (b / b.norm().clamp(min=1e-7))).clamp(-1, 1).acos()
    return (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / torch.sin(angle)


def linear(inputs: Sequence[Tensor], base: int | None, weight: Sequence[float], normalize: bool) -> Tensor:
    """The weighted sum; `normalize` divides by the sum of the weights."""
    return _weighted_sum(inputs, weight) / (sum(weight) if normalize else 1)


def task_arithmetic(
    inputs: Sequence[Tensor], base: int, weight: Sequence[float | None], normalize: bool, scale: float
) -> Tensor:
    """The base plus `scale` (lambda) times the weighted differences from it."""
    others = [(x, w) for i, (x, w) in enumerate(zip(inputs, weight, strict=True)) if i != base and w is not None]
    total = sum(w for _, w in others)
    change = sum(w * (x - inputs[base]) for x, w in others)
    return inputs[base] + scale * change / (total if normalize and abs(total) >= 1e-8 else 1)


def passthrough(inputs: Sequence[Tensor], base: int | None, scale: Sequence[float | None]) -> Tensor:
    """The only input, times its scale if it has one."""
    (x,), (factor,) = inputs, scale
    return x if factor is None else factor * x


def multislerp(
    inputs: Sequence[Tensor],
    base: int | None,
    weight: Sequence[float | None],
    normalize_weights: bool,
    eps: float,
) -> Tensor:
    """Mean direction by a tangent space at the weighted Euclidean mean, times the weighted mean length."""
    origin = torch.zeros_like(inputs[0]) if base is None else inputs[base]
    others = [(x - origin, w) for i, (x, w) in enumerate(zip(inputs, weight, strict=True)) if i != base]
    tensors = [x for x, _ in others]
    weights = [w for _, w in others if w is not None]
    if normalize_weights:
        weights = [w / sum(weights) for w in weights]
    units = [x / (x.norm() + eps) for x in tensors]
    mean = _weighted_sum(units, weights)
    if mean.norm() < eps:
        return origin + _weighted_sum(tensors, weights)
    mean = mean / mean.norm()
    tangent = _weighted_sum([u - (u * mean).sum() * mean for u in units], weights)
    angle = tangent.norm() + eps
    length = sum(w * float(x.norm()) for x, w in zip(tensors, weights, strict=True))
    point: Tensor = mean * torch.cos(angle) + tangent * torch.sin(angle) / angle
    return origin + length * point


def karcher(inputs: Sequence[Tensor], base: int | None, max_iter: int, tol: float) -> Tensor:
    """The Riemannian mean of the directions, by fixed-point iteration, times the mean length."""
    units = [x / x.norm() for x in inputs if x.norm() > tol]
    if not units:
        return torch.zeros_like(inputs[0])
    mean: Tensor = sum(units[1:], units[0]) / len(units)
    mean = units[0] if mean.norm() < tol else mean / mean.norm()
    for _ in range(max_iter):
        tangent = torch.zeros_like(mean)
        for unit in units:
            cosine = (mean * unit).sum().clamp(-1, 1)
            angle = cosine.acos()
            if angle >= tol:
                tangent += angle / torch.sin(angle) * (unit - cosine * mean) / len(units)
        step = tangent.norm()
        if step < tol:
            break
        mean = torch.cos(step) * mean + torch.sin(step) * tangent / step
        mean = mean / mean.norm()
    return mean * sum(float(x.norm()) for x in inputs) / len(inputs)


def model_stock(inputs: Sequence[Tensor], base: int, filter_wise: bool) -> Tensor:
    """Between the base and the mean of the others, at the distance that their mean angle gives (arXiv 2403.19522)."""
    rows = inputs[0].shape[0] if filter_wise and inputs[0].dim() == 2 else 1
    origin = inputs[base].reshape(rows, -1)
    others = [x.reshape(rows, -1) for i, x in enumerate(inputs) if i != base]
    changes = [x - origin for x in others]
    pairs = [(x, y) for i, x in enumerate(changes) for y in changes[i + 1 :]]
    cosines = [(x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)).clamp(min=1e-6) for x, y in pairs]
    cosine = torch.stack([c.clamp(-1, 1) for c in cosines]).mean(0).unsqueeze(1)
    count = len(others)
    t = count * cosine / (1 + (count - 1) * cosine)
    return (t * sum(others[1:], others[0]) / count + (1 - t) * origin).reshape(inputs[0].shape)


def nearswap(inputs: Sequence[Tensor], base: int, t: float) -> Tensor:
    """The base, moved towards the other where the two are near."""
    a, b = inputs[base], inputs[1 - base]
    w = (t / (b - a).abs().clamp(min=1e-6)).clamp(0, 1)
    return w * b + (1 - w) * a


def merged(method: str, inputs: Sequence[Tensor], parameters: dict[str, Any]) -> Tensor:
    """`method` by the name and the parameters of a config, without parameters that it does not have."""
    function, accepted = _METHODS[method]
    known = {"scale" if key == "lambda" else key: value for key, value in parameters.items() if key in accepted}
    return function(inputs, parameters["base"], **known)


def _unit(x: Tensor, eps: float) -> Tensor:
    return x / x.norm() if x.norm() > eps else x


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return torch.stack([w * x for x, w in zip(tensors, weights, strict=True)]).sum(0)


_METHODS: dict[str, tuple[Callable[..., Tensor], frozenset[str]]] = {
    "slerp": (slerp, frozenset({"t"})),
    "nuslerp": (nuslerp, frozenset({"weight", "nuslerp_flatten", "nuslerp_row_wise"})),
    "linear": (linear, frozenset({"weight", "normalize"})),
    "task_arithmetic": (task_arithmetic, frozenset({"weight", "normalize", "lambda"})),
    "passthrough": (passthrough, frozenset({"scale"})),
    "multislerp": (multislerp, frozenset({"weight", "normalize_weights", "eps"})),
    "karcher": (karcher, frozenset({"max_iter", "tol"})),
    "model_stock": (model_stock, frozenset({"filter_wise"})),
    "nearswap": (nearswap, frozenset({"t"})),
}
