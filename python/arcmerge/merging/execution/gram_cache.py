"""Gram matrices that are kept from one run to the next, in a small file beside a parent.

A matrix belongs to tensors, not to parameters, so that every `t` of a recipe has the same one. The file names the
shards that it was summed from, by size, time and header; where one has changed, nothing in the file is trusted.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arcmerge.checkpoint.reader import Checkpoint
from arcmerge.merging.plan.tensor_job import Job

_FORMAT = 1


class GramCache:
    """The matrices of whole tensors of some checkpoints.

    folder: of the parent that the file lies in. A file that is missing, damaged or out of date is an empty one; where
    none can be written there is none the next time.
    """

    def __init__(self, checkpoints: Collection[Checkpoint], folder: Path) -> None:
        self._names = {one.folder: str(one.folder.resolve()) for one in checkpoints}
        self._shards = {self._names[one.folder]: one.fingerprint() for one in checkpoints}
        name = hashlib.sha256("\n".join(sorted(self._shards)).encode()).hexdigest()[:16]
        self._path = folder / f".arcmerge-grams-{name}.json"
        self._grams = self._read()
        self._passing: set[str] = set()

    def get(self, job: Job) -> NDArray[np.float64] | None:
        """The Gram matrix of the inputs of a job, if it is known. Those of vectors never are."""
        return self._grams.get(self._key(job)) if job.along is None else None

    def add(self, job: Job, gram: NDArray[np.float64]) -> None:
        """Keep a matrix (k, k), unless it is not finite, as JSON has no number for that."""
        if np.isfinite(gram).all():
            self._grams[self._key(job)] = gram
            if job.vocabulary:  # tokenizers say which rows met, and they are not in the fingerprint
                self._passing.add(self._key(job))

    def save(self) -> None:
        """Write the file, complete or not at all."""
        content = {
            "format": _FORMAT,
            "shards": self._shards,
            "grams": {key: gram.tolist() for key, gram in self._grams.items() if key not in self._passing},
        }
        with suppress(OSError):  # a folder that only others may write to
            handle, name = tempfile.mkstemp(prefix=".arcmerge-", dir=self._path.parent)
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump(content, file)
                Path(name).replace(self._path)
            except BaseException:
                Path(name).unlink()
                raise

    def _read(self) -> dict[str, NDArray[np.float64]]:
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            content: dict[str, Any] = json.loads(self._path.read_bytes())
            if content["format"] == _FORMAT and content["shards"] == self._shards:
                grams = {key: np.array(rows, np.float64) for key, rows in content["grams"].items()}
                return {key: gram for key, gram in grams.items() if _is_gram(gram)}
        return {}

    def _key(self, job: Job) -> str:
        """What a Gram matrix is of: tensors, the type of their values, and the base that is taken off them."""
        inputs = [[self._names[item.checkpoint.folder], item.info.name, item.dtype.name] for item in job.inputs]
        return json.dumps([inputs, job.base if job.method.centered(job.values) else None, job.vocabulary])


def _is_gram(gram: NDArray[np.float64]) -> bool:
    return gram.ndim == 2 and gram.shape[0] == gram.shape[1] and bool(np.isfinite(gram).all())
