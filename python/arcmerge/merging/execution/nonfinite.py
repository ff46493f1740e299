"""The cause of a result that is not finite: a parent with NaN or infinity, a dtype too narrow, or the arithmetic."""

from __future__ import annotations

import numpy as np

from arcmerge import _C
from arcmerge.dtypes import BF16, F16, F32, DType
from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution.work_units import PIECE_ELEMENTS
from arcmerge.merging.plan.tensor_job import Input, Job
from arcmerge.merging.vocabulary.embedding_rows import rounded

# The dtype to advise instead of one that is too narrow; there is none wider than float32.
_WIDER = {F16: BF16, BF16: F32}


def not_finite(job: Job) -> ArcmergeError:
    """The error that names the cause of NaN or infinity in a job's result. Reads the parents once more."""
    name = job.output.name
    counts = [_C.count_nonfinite(_stored(item), 0, _count(job, item)) for item in job.inputs]
    if found := ", ".join(f"{count} in {item.model}" for count, item in zip(counts, job.inputs, strict=True) if count):
        return ArcmergeError(
            f"{name}: weights must be finite, got NaN or infinity ({found}); "
            "repair the checkpoint, or pass --allow-nonfinite to merge it as it is"
        )
    peaks = [(_peak(job, item), str(item.model), item) for item in job.inputs]
    for value, parent, item in peaks:
        if item.cast is not None and not _fits(value, item.cast):
            return ArcmergeError(
                f"{name}: weights must fit into {item.cast.name} (up to {item.cast.largest:.6g}), to which 'dtype' "
                f"casts the inputs, got {value:.6g} in {parent}; {_wider('dtype', item.cast)}"
            )
    # Results are rounded to the dtype of the arithmetic, then to that of the file, where out_dtype may come too late.
    narrow = min(job.result, job.output.dtype, key=lambda dtype: dtype.largest)
    key = "dtype" if job.result == narrow else "out_dtype"
    value, parent, _ = max(peaks, key=lambda peak: abs(peak[0]))
    if not _fits(value, narrow):
        return ArcmergeError(
            f"{name}: weights must fit into {narrow.name} (up to {narrow.largest:.6g}), in which the result is stored, "
            f"got {value:.6g} in {parent}; {_wider(key, narrow)}"
        )
    # Those with bounds, such as density, choose elements and do not scale them.
    scaling = [one for one in job.method.parameters if one.kind is float and one.low is None and one.high is None]
    numbers = " and ".join(f"'{parameter.name}'" for parameter in scaling)
    advice = [f"lower {numbers}"] if numbers else []
    advice += [_wider(key, narrow)] if narrow in _WIDER else []
    return ArcmergeError(
        f"{name}: results of {job.method.name} must fit into {narrow.name} (up to {narrow.largest:.6g}), got an "
        f"overflow although every input fits (the largest is {value:.6g} in {parent}); {', or '.join(advice)}"
    )


def _wider(key: str, narrow: DType) -> str:
    return f"set {key}: {_WIDER[narrow].name}" if narrow in _WIDER else "scale the checkpoint down"


def _stored(item: Input) -> _C.Operand:
    """An input as it is stored: not cast, its rows not matched by token."""
    return _C.Operand(item.checkpoint.address(item.info.name), item.info.dtype.native)


def _count(job: Job, item: Input) -> int:
    """The elements of an input that are used: all if rows are matched by token, else those of the common rows."""
    return item.info.count if job.vocabulary else min(job.count, item.info.count)


def _fits(value: float, dtype: DType) -> bool:
    return bool(np.isfinite(rounded(np.array([value]), dtype)).all())


def _peak(job: Job, item: Input) -> float:
    """The value of an input with the largest magnitude."""
    found, total = 0.0, _count(job, item)
    values = np.empty(min(PIECE_ELEMENTS, total), np.float32)
    for first in range(0, total, PIECE_ELEMENTS):
        count = min(PIECE_ELEMENTS, total - first)
        _C.combine(values.ctypes.data, F32.native, [_stored(item)], [1.0], first, count)
        peak = float(values[np.abs(values[:count]).argmax()])
        found = max(found, peak, key=abs)
    return found
