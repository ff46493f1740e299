"""Gram matrices that are kept from one run to the next, in a small file next to a parent.

A Gram matrix depends on tensors alone, so every `t` of a recipe has the same one. The file names the shards that its
matrices were computed from, by size, modification time and header; if a shard has changed, the file is not used.
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
    """The Gram matrices of whole tensors of some checkpoints.

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
        self._grams = self._read()
        self._not_saved: set[str] = set()

    def get(self, job: Job) -> NDArray[np.float64] | None:
        """The Gram matrix (k, k) of a job's inputs if it is known; None for a job with one per row or column."""
        return self._grams.get(self._key(job)) if job.along is None else None

    def add(self, job: Job, gram: NDArray[np.float64]) -> None:
        """Keep a matrix (k, k), unless it has NaN or infinity, which JSON cannot hold."""
        if np.isfinite(gram).all():
            self._grams[self._key(job)] = gram
            if job.vocabulary:  # it depends on tokenizers too, which the fingerprints do not cover
                self._not_saved.add(self._key(job))

    def save(self) -> None:
        """Write the file atomically."""
        content = {
            "format": _FORMAT,
            "shards": self._shards,
            "grams": {key: gram.tolist() for key, gram in self._grams.items() if key not in self._not_saved},
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

    def _read(self) -> dict[str, NDArray[np.float64]]:
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            content: dict[str, Any] = json.loads(self._path.read_bytes())
            if content["format"] == _FORMAT and content["shards"] == self._shards:
                grams = {key: np.array(rows, np.float64) for key, rows in content["grams"].items()}
                return {key: gram for key, gram in grams.items() if _is_gram(gram)}
        return {}

    def _key(self, job: Job) -> str:
        """A Gram matrix depends on the tensors, the dtype of their values, the base, and whether rows are matched."""
        inputs = [[self._folders[item.checkpoint.folder], item.info.name, item.dtype.name] for item in job.inputs]
        return json.dumps([inputs, job.base if job.method.centered(job.values) else None, job.vocabulary])


def _is_gram(gram: NDArray[np.float64]) -> bool:
    return gram.ndim == 2 and gram.shape[0] == gram.shape[1] and bool(np.isfinite(gram).all())
