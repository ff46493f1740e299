"""The relation of two checkpoints by layer: the angle, the norm ratio, and the share of nearly collinear weights.

All figures follow from the Gram matrices of the pairs of tensors. A group of tensors counts as one long vector, whose
Gram matrix is the sum of the matrices of its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arcmerge.geometry import NEARLY_PARALLEL
from arcmerge.merging.execution.statistics_pass import StatisticsPass
from arcmerge.merging.plan.plan import Plan
from arcmerge.merging.plan.tensor_names import place


@dataclass(frozen=True)
class Relation:
    """The relation of weights b to weights a.

    Attributes:
        angle: the angle between them in degrees, 0 to 180; NaN if one of them is zero.
        ratio: |b| / |a|; NaN if a is zero.
        collinear: the share of elements in tensors with |cos(angle)| above slerp's threshold for linear interpolation.
        elements: the number of elements.
    """

    angle: float
    ratio: float
    collinear: float
    elements: int


@dataclass(frozen=True)
class Pair:
    """A tensor of model a and the tensor of the same name of model b.

    Attributes:
        name: the full name of the tensor.
        layer: index of the layer, None outside the layers.
        kind: the name within the layer.
        module: the part of the layer, as "mlp".
        gram: the Gram matrix (2, 2) of the pair.
        elements: the number of elements.
    """

    name: str
    layer: int | None
    kind: str
    module: str
    gram: NDArray[np.float64]
    elements: int

    @property
    def cosine(self) -> float:
        """The cosine of the angle between the tensors; NaN if one of them is zero."""
        norms = math.sqrt(float(self.gram[0, 0])) * math.sqrt(float(self.gram[1, 1]))
        return float(self.gram[0, 1]) / norms if norms else math.nan


def pairs_of(plan: Plan, statistics: StatisticsPass) -> list[Pair]:
    """The pairs of tensors of a plan with two models, as far as their Gram matrices were summed."""
    return [
        Pair(job.output.name, *place(job.output.name), statistics.grams[index], job.count)
        for index, job in enumerate(plan.jobs)
        if index in statistics.grams
    ]


def relation(pairs: Iterable[Pair]) -> Relation:
    """The relation of the two long vectors that the tensors of `pairs` make when they are concatenated."""
    pairs = list(pairs)
    gram = np.sum([pair.gram for pair in pairs], axis=0)
    elements = sum(pair.elements for pair in pairs)
    a, b = math.sqrt(float(gram[0, 0])), math.sqrt(float(gram[1, 1]))
    cosine = float(gram[0, 1]) / (a * b) if a and b else math.nan
    collinear = sum(pair.elements for pair in pairs if abs(pair.cosine) > NEARLY_PARALLEL)
    return Relation(
        angle=math.degrees(math.acos(max(-1.0, min(1.0, cosine)))) if not math.isnan(cosine) else math.nan,
        ratio=b / a if a else math.nan,
        collinear=collinear / elements if elements else 0.0,
        elements=elements,
    )


def relations_by(pairs: Sequence[Pair], key: Callable[[Pair], Any]) -> dict[Any, Relation]:
    """The relation of each group of pairs with the same key."""
    groups: dict[Any, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(key(pair), []).append(pair)
    return {group: relation(members) for group, members in groups.items()}


def as_json(pairs: Sequence[Pair]) -> Mapping[str, Any]:
    """All relations as JSON values: of the whole models, of every (layer, module), and of every tensor."""

    def row(found: Relation) -> dict[str, Any]:
        return {
            "angle_degrees": None if math.isnan(found.angle) else found.angle,
            "norm_ratio": None if math.isnan(found.ratio) else found.ratio,
            "near_collinear_share": found.collinear,
            "elements": found.elements,
        }

    return {
        "model": row(relation(pairs)),
        "layers": [
            {"layer": layer, "module": module, **row(found)}
            for (layer, module), found in relations_by(pairs, lambda pair: (pair.layer, pair.module)).items()
        ],
        "tensors": {pair.name: row(relation([pair])) for pair in pairs},
    }
