"""Statistics that are kept: Gram matrices from one run to the next, in a small file next to a parent; others in memory.

A Gram matrix depends on tensors alone, so every `t` of a recipe has the same one, and so does a histogram of all
elements for every `density`. The norms of random masks are kept for every seed and density. The file names the shards
that its matrices were computed from, by size, modification time and header; if a shard has changed, the file is not
used.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Collection, Hashable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arcmerge.checkpoint.reader import Checkpoint
from arcmerge.merging.methods.measure import Gram, Histogram, Measure, Norms, Statistic
from arcmerge.merging.plan.tensor_job import Input, Job

_FORMAT = 1


class StatisticsCache:
    """Statistics of whole tensors of some checkpoints.

    A file that is missing, damaged or out of date counts as empty. If no file can be written, nothing is kept.

    Args:
        checkpoints: all checkpoints of a recipe.
        folder: the parent's folder that the file lies in.
    """

    def __init__(self, checkpoints: Collection[Checkpoint], folder: Path) -> None:
        self._folders = {one.folder: str(one.folder.resolve()) for one in checkpoints}
        self._shards = {self._folders[one.folder]: one.fingerprint() for one in checkpoints}
        name = hashlib.sha256("\n".join(sorted(self._shards)).encode()).hexdigest()[:16]
        self._path = folder / f".arcmerge-grams-{name}.json"
        self._statistics = self._read()
        self._inputs: dict[Hashable, str] = {}
        self._counts: dict[Hashable, Statistic] = {}
        self._not_saved: set[str] = set()
        self._unsaved = False

    def get(self, job: Job, measure: Measure) -> Statistic | None:
        """What a measure finds for a job, if that is known."""
        if isinstance(measure, Gram):
            return self._statistics.get(self._key(job, measure)) if measure.dim is None else None
        if not isinstance(measure, Histogram | Norms):
            return None
        statistic = self._counts.get(_key_of(job, measure))
        return replace(statistic, measure=measure) if statistic and _same(statistic.measure, measure) else None

    def add(self, job: Job, statistic: Statistic) -> None:
        """Keep a statistic, unless it is large, cheap, or has NaN or infinity, which JSON cannot hold."""
        measure = statistic.measure
        if isinstance(measure, Histogram | Norms):
            self._counts[_key_of(job, measure)] = statistic
        elif isinstance(measure, Gram) and measure.dim is None and statistic.finite:
            key = self._key(job, measure)
            self._statistics[key] = statistic
            self._unsaved = True
            if job.vocabulary:  # it depends on tokenizers too, which the fingerprints do not cover
                self._not_saved.add(key)

    def save(self) -> None:
        """Write the Gram matrices atomically, if there are new ones."""
        if not self._unsaved:
            return
        self._unsaved = False
        content = {
            "format": _FORMAT,
            "shards": self._shards,
            "grams": {key: one.total.tolist() for key, one in self._statistics.items() if key not in self._not_saved},
        }
        with suppress(OSError):  # the folder may not be writable
            handle, name = tempfile.mkstemp(prefix=".arcmerge-", dir=self._path.parent)
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump(content, file)
                Path(name).replace(self._path)
            except BaseException:
                Path(name).unlink()
                raise

    def _read(self) -> dict[str, Statistic]:
        with suppress(OSError, ValueError, KeyError, IndexError, TypeError, RecursionError):
            content: dict[str, Any] = json.loads(self._path.read_bytes())
            if content["format"] == _FORMAT and content["shards"] == self._shards:
                grams = {key: np.array(rows, np.float64) for key, rows in content["grams"].items()}
                # The second entry of a key is the base of a matrix that is centered.
                measures = {key: Gram(json.loads(key)[1] is not None) for key in grams}
                return {key: Statistic(measures[key], gram) for key, gram in grams.items() if _is_gram(gram)}
        return {}

    def _key(self, job: Job, measure: Gram) -> str:
        """As JSON: the tensors and the dtype of their values, the base, and whether rows are matched."""
        inputs = ", ".join([self._input(item) for item in job.inputs])
        base = job.base if measure.centered and job.base is not None else "null"
        return f"[[{inputs}], {base}, {'true' if job.vocabulary else 'false'}]"

    def _input(self, item: Input) -> str:
        key = item.checkpoint.folder, item.info.name, item.dtype.name
        if key not in self._inputs:
            self._inputs[key] = json.dumps([self._folders[item.checkpoint.folder], *key[1:]])
        return self._inputs[key]


def _key_of(job: Job, measure: Histogram | Norms) -> Hashable:
    """A key of what a measure finds for a job: cuts and the scales of rows play no part."""
    inputs = tuple((item.checkpoint.folder, item.info.name, item.dtype) for item in job.inputs)
    selection = measure.selection
    drawn = (selection.keys, selection.probabilities) if selection.random else None
    key = (type(measure), job.output.name, inputs, job.base, selection.joint, selection.rounded, drawn)
    return key if isinstance(measure, Norms) else (*key, measure.prefixes is None, measure.together is None)


def _same(a: Measure, b: Histogram | Norms) -> bool:
    """Whether two measures of one key find the same. Of histograms of some bins only the latest is kept."""
    if isinstance(a, Histogram) and isinstance(b, Histogram) and a.prefixes != b.prefixes:
        return False
    assert isinstance(a, Histogram | Norms)
    scales = a.selection.row_scales, b.selection.row_scales
    return scales[0] is scales[1]


def _is_gram(gram: NDArray[np.float64]) -> bool:
    return gram.ndim == 2 and gram.shape[0] == gram.shape[1] and bool(np.isfinite(gram).all())
