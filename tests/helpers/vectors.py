"""Merges of explicit float64 vectors by a method, and expected results for vectors at known angles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arcmerge.merging.methods.method import Arguments
from arcmerge.merging.methods.registry import get
from arcmerge.merging.recipe.parameters import REQUIRED

Array = NDArray[np.float64]

# Float64 rounds by 1e-16; a cosine from a few hundred terms is off by some of them, an angle of at least 0.0316 (the
# threshold) by 32 times that, a coefficient by 32 times that again where the angle is near 180 degrees.
RELATIVE = 1e-12

# The methods that follow from a Gram matrix: parameters, the number of inputs, and the base where they need one.
GRAM_METHODS: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.3},
    "nuslerp": {"weight": (0.4, 0.9)},
    "multislerp": {"weight": (0.2, 0.5, 0.7)},
    "karcher": {},
    "model_stock": {},
    "delerp": {"t": 0.3},
    "geometric_median": {"weight": (1, 0.7, 1.2)},
}
COUNT = dict.fromkeys(GRAM_METHODS, 3) | {"slerp": 2, "nuslerp": 2, "delerp": 2}
BASE = {"slerp": 0, "model_stock": 0, "delerp": 0}


def arguments_of(name: str, count: int, base: int | None, parameters: Mapping[str, Any]) -> Arguments:
    """Arguments with the method's defaults filled in. A per-input parameter is a sequence, with None at the base."""
    values = {p.name: p.default for p in get(name).parameters if p.default is not REQUIRED} | dict(parameters)
    shared = {p.name for p in get(name).parameters if p.scope == "shared"}
    return Arguments(
        count,
        base,
        {key: value for key, value in values.items() if key in shared},
        {
            key: tuple(value) if isinstance(value, Sequence) else (value,) * count
            for key, value in values.items()
            if key not in shared
        },
    )


def merge(name: str, tensors: Sequence[Any], base: int | None = None, **parameters: Any) -> Array:
    """A merge by a method in float64: Gram matrix, coefficients, combination."""
    stack = np.stack([np.asarray(tensor, np.float64) for tensor in tensors])
    method, arguments = get(name), arguments_of(name, len(stack), base, parameters)
    assert method.check(arguments) == []
    vectors = stack[method.others(arguments)] - stack[base] if method.centered(arguments) else stack
    axis = method.dim(arguments)
    if axis is None:
        flat = vectors.reshape(len(vectors), -1)
        gram = flat @ flat.T
    else:
        gram = np.einsum("irc,jrc->rij" if axis else "irc,jrc->cij", vectors, vectors)
    values = method.coefficients(gram, arguments).values
    return np.asarray(np.einsum({None: "k,k...->...", 1: "rk,krc->rc", 0: "ck,krc->rc"}[axis], values, stack))


def assert_close(actual: Array, expected: Array, tensors: Sequence[Any], relative: float = RELATIVE) -> None:
    """Equal to within `relative` of the sum of the lengths of the inputs."""
    assert np.linalg.norm(actual - expected) <= relative * sum(np.linalg.norm(tensor) for tensor in tensors)


def random_tensors(seed: int, count: int, shape: tuple[int, ...] = (5, 7), common: float = 0.5) -> list[Array]:
    """Tensors of different lengths with a part in common."""
    generator = np.random.default_rng(seed)
    shared = generator.standard_normal(shape)
    return [(common * shared + generator.standard_normal(shape)) * generator.uniform(0.5, 2) for _ in range(count)]


def at_angle(angle: float, length_a: float = 1.0, length_b: float = 1.0) -> tuple[Array, Array]:
    """Two vectors of a seven-dimensional space with this angle between them."""
    frame, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((7, 2)))
    return length_a * frame[:, 0], length_b * (np.cos(angle) * frame[:, 0] + np.sin(angle) * frame[:, 1])


def unit(x: Array) -> Array:
    return np.asarray(x / np.linalg.norm(x))


def rotated(a: Array, b: Array, t: float) -> Array:
    """The direction of a turned by t of the way to that of b: Gram-Schmidt and a rotation, no sine quotients."""
    along = unit(a)
    across = b - (b @ along) * along
    angle = np.arctan2(np.linalg.norm(across), b @ along)
    return np.cos(t * angle) * along + np.sin(t * angle) * unit(across)


def arc(a: Array, b: Array, t: float) -> Array:
    """slerp of a and b: the combination of a and b whose counterpart of unit(a) and unit(b) lies on the arc."""
    shape, a, b = a.shape, a.ravel(), b.ravel()
    frame = np.stack([unit(a), unit(b)], axis=1)
    weights = np.linalg.lstsq(frame, rotated(a, b, t), rcond=None)[0]
    return np.asarray(weights[0] * a + weights[1] * b).reshape(shape)


def exponential_map_mean(tensors: Sequence[Array], weights: Array, eps: float = 1e-8) -> Array:
    """Multi-SLERP as its reference states it: through the tangent space at the weighted mean direction."""
    directions = [tensor / (np.linalg.norm(tensor) + eps) for tensor in tensors]
    pole = unit(np.sum([w * u for w, u in zip(weights, directions, strict=True)], axis=0))
    tangent = np.sum([w * (u - np.vdot(u, pole) * pole) for w, u in zip(weights, directions, strict=True)], axis=0)
    distance = np.linalg.norm(tangent) + eps
    point = np.cos(distance) * pole + np.sin(distance) / distance * tangent
    length = sum(w * np.linalg.norm(x) for w, x in zip(weights, tensors, strict=True))
    return np.asarray(length * point)


def geometric_median(tensors: Sequence[Array], weights: Sequence[float]) -> Array:
    """The point with the least sum of distances, by Newton steps on explicit vectors, halved until the sum decreases.

    It must not lie at a tensor.
    """
    points = np.stack([tensor.ravel() for tensor in tensors])
    weighted = np.asarray(weights, np.float64)

    def total(point: Array) -> float:
        return float(weighted @ np.linalg.norm(points - point, axis=1))

    point = np.average(points, axis=0, weights=weighted) + 1e-3 * np.ptp(points, axis=0)
    for _ in range(100):
        distances = np.linalg.norm(points - point, axis=1)
        directions = (points - point) / distances[:, None]
        pulls = weighted / distances
        curvature = pulls.sum() * np.eye(len(point)) - (directions.T * pulls) @ directions
        step = np.linalg.solve(curvature, weighted @ directions)
        while total(point + step) > total(point) and np.abs(step).max() > 1e-14:
            step = step / 2
        point = point + step
    return np.asarray(point.reshape(tensors[0].shape))


def karcher_mean(tensors: Sequence[Array], iterations: int = 300) -> Array:
    """The Karcher mean by gradient steps on explicit unit vectors."""
    directions = [unit(tensor) for tensor in tensors]
    point = directions[-1]
    for _ in range(iterations):
        tangents = [u - np.vdot(u, point) * point for u in directions]
        logs = [
            np.arctan2(np.linalg.norm(v), np.vdot(u, point)) * v / max(np.linalg.norm(v), 1e-300)
            for u, v in zip(directions, tangents, strict=True)
        ]
        point = unit(point + 0.5 * np.mean(logs, axis=0))
    return np.asarray(point * np.mean([np.linalg.norm(tensor) for tensor in tensors]))
