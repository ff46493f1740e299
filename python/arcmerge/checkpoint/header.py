"""The safetensors header: read with suspicion, written plainly.

A file is the header's length N (8 bytes, little-endian), N bytes of JSON, then the data. The JSON maps each tensor's
name to {"dtype", "shape", "data_offsets": [begin, end]}, the offsets counted from the start of the data; "__metadata__"
holds strings. Tensors must fill the data exactly: no overlap, no hole, nothing after the last.
Format: https://huggingface.co/docs/safetensors
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from arcmerge.dtypes import BY_CODE, DType
from arcmerge.errors import ArcmergeError

_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors library
_MOST_DIMENSIONS = 64  # the limit of torch
_MAX_NESTING = 100  # of JSON; published files have up to 10, and Python's own functions recurse up to about 300
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # what JSON may spell and no UTF-8 file can hold on its own
_MARK = "arcmerge"  # the key of the metadata that tells a file of ours
_LFS_POINTER = b"version https://git-lfs"
_COPY_AGAIN = "download or copy the file again"
_SAVE_AGAIN = "save it again with the safetensors library"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `nbytes` bytes at byte `offset`, counted from the start of the file called `file`."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, in the order in which they lie. Reads the header only.

    Raises ArcmergeError naming the file and the broken rule.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
            file.seek(_LENGTH_BYTES)
            length = int.from_bytes(start[:_LENGTH_BYTES], "little")
            data_start = _LENGTH_BYTES + length
            _check_length(path, start, length, size)
            text = file.read(length)
    except OSError as error:
        raise ArcmergeError(f"{path}: cannot be read: {error.strerror}.") from error
    entries = parse_object(text, path)
    entries.pop("__metadata__", None)
    tensors = [_tensor(path, name, entry, data_start) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_filled(path, tensors, data_start, size)
    return {tensor.name: tensor for tensor in tensors}


def header_digest(path: Path) -> str:
    """The SHA-256 of a header with its length, as hexadecimal digits. Raises OSError if the file cannot be read."""
    with path.open("rb") as file:
        length = file.read(_LENGTH_BYTES)
        return hashlib.sha256(length + file.read(int.from_bytes(length, "little"))).hexdigest()


def files_beside(path: Path) -> set[str] | None:
    """The file names that a merge recorded in the metadata of this shard: the other files that it wrote to the folder.

    Returns None if no merge wrote the shard. Programs that save a model again, for example after training it, do not
    keep the metadata.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            metadata = parse_object(file.read(min(length, _LONGEST_HEADER)), path).get("__metadata__")
        names = json.loads(metadata[_MARK]) if isinstance(metadata, dict) else None
    except (ArcmergeError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else None


def encode_header(
    tensors: Sequence[tuple[str, DType, tuple[int, ...]]], alignment: int, beside: Iterable[str] = ()
) -> bytes:
    """The first bytes of a file that holds `tensors` (name, dtype, shape) one behind the other.

    Padded with spaces, so that the data starts at a multiple of `alignment` bytes. beside: see files_beside.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", _MARK: json.dumps(sorted(beside))}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": dtype.code, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    padding = -(_LENGTH_BYTES + len(text)) % alignment
    return (len(text) + padding).to_bytes(_LENGTH_BYTES, "little") + text + b" " * padding


def parse_object(text: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in `text`, the content of `path`.

    Raises ArcmergeError for what is not valid JSON or no object, a key that occurs twice, an unpaired surrogate, and
    more than 100 levels of nesting.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ArcmergeError(f"{path}: the JSON key '{twice}' occurs twice: {_COPY_AGAIN}.")
        return mapping

    if text.startswith(_LFS_POINTER):
        raise ArcmergeError(_lfs_problem(path))
    try:
        value = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ArcmergeError(f"{path}: is not valid JSON ({error}): {_COPY_AGAIN}.") from error
    if not isinstance(value, dict):
        raise ArcmergeError(f"{path}: must hold a JSON object, holds {value!r:.40}: {_COPY_AGAIN}.")
    if _nested_deeper(value, _MAX_NESTING):
        raise ArcmergeError(f"{path}: is nested more than {_MAX_NESTING} levels deep: {_COPY_AGAIN}.")
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ArcmergeError(
                f"{path}: holds half a character, {error.object[error.start]!r}: {_COPY_AGAIN}."
            ) from error
    return value


def _nested_deeper(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        values = (holder.values() if isinstance(holder, dict) else holder for holder in level)
        level = [value for held in values for value in held if isinstance(value, dict | list)]
    return bool(level)


def _lfs_problem(path: Path) -> str:
    return f"{path}: is a Git LFS pointer, not the file itself: run 'git lfs pull' in its folder."


def _check_length(path: Path, start: bytes, length: int, size: int) -> None:
    if start == _LFS_POINTER:
        raise ArcmergeError(_lfs_problem(path))
    if size < _LENGTH_BYTES:
        raise ArcmergeError(
            f"{path}: a safetensors file starts with {_LENGTH_BYTES} bytes of length, it has {size}: {_COPY_AGAIN}."
        )
    if length > _LONGEST_HEADER:
        raise ArcmergeError(
            f"{path}: is not a safetensors file: a header may have {_LONGEST_HEADER:,} bytes, it claims {length:,}."
        )
    if _LENGTH_BYTES + length > size:
        raise ArcmergeError(
            f"{path}: is truncated inside its header, which needs {_LENGTH_BYTES + length:,} bytes of {size:,}: "
            f"{_COPY_AGAIN}."
        )


def _tensor(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    where = f"{path}: tensor '{name}'"
    if not isinstance(entry, dict):
        raise ArcmergeError(f"{where} needs dtype, shape and data_offsets, its entry is {entry!r:.80}: {_SAVE_AGAIN}.")
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    dtype = BY_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise ArcmergeError(
            f"{where} has dtype {code!r:.80}, known are {', '.join(BY_CODE)}: convert it to one of them."
        )
    if not _are_counts(shape) or len(shape) > _MOST_DIMENSIONS:
        raise ArcmergeError(
            f"{where} needs a shape of up to {_MOST_DIMENSIONS} whole numbers >= 0, has {shape!r:.80}: {_SAVE_AGAIN}."
        )
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ArcmergeError(f"{where} needs data_offsets [begin, end], has {offsets!r:.80}: {_SAVE_AGAIN}.")
    tensor = TensorInfo(name, dtype, tuple(shape), path.name, data_start + offsets[0], offsets[1] - offsets[0])
    if tensor.count * dtype.itemsize != tensor.nbytes:
        raise ArcmergeError(
            f"{where} of shape {shape!r:.80} and dtype {code} needs {tensor.count * dtype.itemsize:,} bytes, "
            f"its data_offsets span {tensor.nbytes:,}: {_SAVE_AGAIN}."
        )
    return tensor


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _check_filled(path: Path, tensors: Sequence[TensorInfo], data_start: int, size: int) -> None:
    end, before = data_start, "the header"
    for tensor in tensors:
        if tensor.offset != end:
            rule = "overlaps" if tensor.offset < end else "leaves a hole behind"
            raise ArcmergeError(
                f"{path}: tensor '{tensor.name}' {rule} {before}: it starts at byte {tensor.offset:,}, "
                f"not {end:,}: {_SAVE_AGAIN}."
            )
        end, before = tensor.offset + tensor.nbytes, f"'{tensor.name}'"
    if size < end:
        raise ArcmergeError(f"{path}: is truncated: its header promises {end:,} bytes, it has {size:,}: {_COPY_AGAIN}.")
    if size > end:
        raise ArcmergeError(
            f"{path}: has {size - end:,} bytes behind the last tensor ({size:,}, not {end:,}): {_COPY_AGAIN}."
        )
