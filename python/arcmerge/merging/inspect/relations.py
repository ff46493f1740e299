"""Two checkpoints compared: the angle, the ratio of lengths and the near-collinear share, by layer.

All of it is read off the Gram matrices of the pairs of tensors; a group of tensors counts as one long vector, whose
Gram matrix is the sum of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arcmerge.merging.execution.gram_pass import GramPass
from arcmerge.merging.methods.spherical import Slerp
from arcmerge.merging.plan.plan import Plan
from arcmerge.merging.plan.tensor_names import place


@dataclass(frozen=True)
class Relation:
    """How b lies to a. angle: degrees, NaN where one of them is zero; ratio: |b| / |a|.

    collinear: the share of the elements in tensors whose |cos| is above the threshold of slerp's linear branch.
    """

    angle: float
    ratio: float
    collinear: float
    elements: int


@dataclass(frozen=True)
class Pair:
    """One pair of tensors. layer: None for tensors outside the layers; kind: the name within its layer."""

    name: str
    layer: int | None
    kind: str
    module: str
    gram: NDArray[np.float64]
    elements: int

    @property
    def cosine(self) -> float:
        lengths = math.sqrt(float(self.gram[0, 0])) * math.sqrt(float(self.gram[1, 1]))
        return float(self.gram[0, 1]) / lengths if lengths else math.nan


def pairs_of(plan: Plan, grams: GramPass) -> list[Pair]:
    """The pairs of tensors of a two-model plan whose Gram matrices have been summed."""
    return [
        Pair(job.output.name, *place(job.output.name), grams.grams[number], job.count)
        for number, job in enumerate(plan.jobs)
        if number in grams.grams
    ]


def relation(pairs: Iterable[Pair]) -> Relation:
    """The relation of the long vectors that `pairs` make when laid end to end."""
    pairs = list(pairs)
    gram = np.sum([item.gram for item in pairs], axis=0)
    elements = sum(item.elements for item in pairs)
    a, b = math.sqrt(float(gram[0, 0])), math.sqrt(float(gram[1, 1]))
    cosine = float(gram[0, 1]) / (a * b) if a and b else math.nan
    collinear = sum(item.elements for item in pairs if abs(item.cosine) > Slerp.THRESHOLD)
    return Relation(
        angle=math.degrees(math.acos(max(-1.0, min(1.0, cosine)))) if not math.isnan(cosine) else math.nan,
        ratio=b / a if a else math.nan,
        collinear=collinear / elements if elements else 0.0,
        elements=elements,
    )


def by(pairs: Sequence[Pair], key: Callable[[Pair], Any]) -> dict[Any, Relation]:
    """The relation of each group of `pairs` that shares a key."""
    groups: dict[Any, list[Pair]] = {}
    for item in pairs:
        groups.setdefault(key(item), []).append(item)
    return {group: relation(members) for group, members in groups.items()}


def as_json(pairs: Sequence[Pair]) -> Mapping[str, Any]:
    """The whole inspection as plain data: every tensor, every (layer, module), and the models as a whole."""

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
            for (layer, module), found in by(pairs, lambda item: (item.layer, item.module)).items()
        ],
        "tensors": {item.name: row(relation([item])) for item in pairs},
    }
