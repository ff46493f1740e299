"""The header of a safetensors file: read without trusting it, and written.

A file is the header's length N (8 bytes, little-endian), N bytes of JSON, then the data. The JSON maps each tensor's
name to {"dtype", "shape", "data_offsets": [begin, end]}, with offsets counted from the start of the data;
"__metadata__" maps strings to strings. Tensors must fill the data exactly: no overlap, no hole, nothing after the last.
Format: https://huggingface.co/docs/safetensors

The safetensors library is not used here because it does not tell where in the file a tensor lies. Mapping single pages
of a checkpoint, and writing a result directly to the disk, need these offsets.
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
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
_MAX_DIMENSIONS = 64  # the limit of torch
_MAX_NESTING = 100  # of JSON; published files have up to 10, and Python's own functions recurse up to about 300
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # JSON may spell a lone surrogate, but no UTF-8 file can hold one
_MARK = "arcmerge"  # the metadata key that marks a file written by a merge
_LFS_POINTER = b"version https://git-lfs"
_COPY_AGAIN = "download or copy the file again"
_SAVE_AGAIN = "save it again with the safetensors library"


@dataclass(frozen=True)
class TensorInfo:
    """The location of a tensor: `nbytes` bytes from byte `offset` of the file named `file`, counted from its start."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def count(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Read the header of a safetensors file.

    Args:
        path: the file. Only its header is read.

    Returns:
        The tensors by name, in the order in which they lie in the file.

    Raises:
        ArcmergeError: the file cannot be read or breaks a rule of the format.
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
        raise unreadable(path, error) from error
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


def recorded_files(path: Path) -> set[str] | None:
    """The names of the other files of an output folder, which a merge records in the metadata of every shard.

    Returns:
        The names, or None if no merge wrote the shard. Programs that save a model again, for example after training,
        do not keep the metadata.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            metadata = parse_object(file.read(min(length, _MAX_HEADER_BYTES)), path).get("__metadata__")
        names = json.loads(metadata[_MARK]) if isinstance(metadata, dict) else None
    except (ArcmergeError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else None


def encode_header(
    tensors: Sequence[tuple[str, DType, tuple[int, ...]]], alignment: int, other_files: Iterable[str] = ()
) -> bytes:
    """Encode the header of a file.

    Args:
        tensors: (name, dtype, shape) of each tensor, in the order in which they will lie in the file.
        alignment: the header is padded with spaces to a multiple of so many bytes.
        other_files: the names of the other files of the output folder; see `recorded_files`.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", _MARK: json.dumps(sorted(other_files))}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": dtype.code, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    padding = -(_LENGTH_BYTES + len(text)) % alignment
    return (len(text) + padding).to_bytes(_LENGTH_BYTES, "little") + text + b" " * padding


def parse_object(text: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        text: the content of a file.
        path: the file, for errors.

    Raises:
        ArcmergeError: `text` is not valid JSON or not an object, has a key twice or an unpaired surrogate, or is nested
            more than 100 levels deep.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ArcmergeError(f"{path}: the JSON key '{twice}' must occur once, got it twice; {_COPY_AGAIN}")
        return mapping

    if text.startswith(_LFS_POINTER):
        raise _lfs_pointer(path)
    try:
        value = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ArcmergeError(f"{path} must be valid JSON, got an error ({error}); {_COPY_AGAIN}") from error
    if not isinstance(value, dict):
        raise ArcmergeError(f"{path} must hold a JSON object, got {value!r:.40}; {_COPY_AGAIN}")
    if _nested_deeper(value, _MAX_NESTING):
        raise ArcmergeError(f"{path} must be nested at most {_MAX_NESTING} levels deep, got more; {_COPY_AGAIN}")
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise ArcmergeError(
                f"{path} must hold valid Unicode, got an unpaired surrogate, {error.object[error.start]!r}; "
                f"{_COPY_AGAIN}"
            ) from error
    return value


def unreadable(path: Path, error: OSError) -> ArcmergeError:
    """The error to raise for a file that the system cannot read."""
    return ArcmergeError(f"{path} must be readable, got '{error.strerror}'; check its permissions and its disk")


def _nested_deeper(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        values = (holder.values() if isinstance(holder, dict) else holder for holder in level)
        level = [value for held in values for value in held if isinstance(value, dict | list)]
    return bool(level)


def _lfs_pointer(path: Path) -> ArcmergeError:
    return ArcmergeError(f"{path} must be the file itself, got a Git LFS pointer; run 'git lfs pull' in its folder")


def _check_length(path: Path, start: bytes, length: int, size: int) -> None:
    if start == _LFS_POINTER:
        raise _lfs_pointer(path)
    if size < _LENGTH_BYTES:
        raise ArcmergeError(
            f"{path} must start with the length of its header ({_LENGTH_BYTES} bytes), got a file of {size} bytes; "
            f"{_COPY_AGAIN}"
        )
    if length > _MAX_HEADER_BYTES:
        raise ArcmergeError(
            f"{path} must be a safetensors file with a header of up to {_MAX_HEADER_BYTES:,} bytes, got a length of "
            f"{length:,} bytes"
        )
    if _LENGTH_BYTES + length > size:
        raise ArcmergeError(
            f"{path} must hold its whole header ({_LENGTH_BYTES + length:,} bytes), got a truncated file of {size:,} "
            f"bytes; {_COPY_AGAIN}"
        )


def _tensor(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    tensor = f"{path}: tensor '{name}'"
    if not isinstance(entry, dict):
        raise ArcmergeError(f"{tensor} must have dtype, shape and data_offsets, got {entry!r:.80}; {_SAVE_AGAIN}")
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    dtype = BY_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise ArcmergeError(
            f"{tensor} must have one of the dtypes {', '.join(BY_CODE)}, got {code!r:.80}; convert it to one of them"
        )
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ArcmergeError(
            f"{tensor} must have a shape of up to {_MAX_DIMENSIONS} whole numbers >= 0, got {shape!r:.80}; "
            f"{_SAVE_AGAIN}"
        )
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ArcmergeError(f"{tensor} must have data_offsets [begin, end], got {offsets!r:.80}; {_SAVE_AGAIN}")
    info = TensorInfo(name, dtype, tuple(shape), path.name, data_start + offsets[0], offsets[1] - offsets[0])
    if info.count * dtype.itemsize != info.nbytes:
        raise ArcmergeError(
            f"{tensor} of shape {shape!r:.80} and dtype {code} must have data_offsets of "
            f"{info.count * dtype.itemsize:,} bytes, got {info.nbytes:,} bytes; {_SAVE_AGAIN}"
        )
    return info


def _are_counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _check_filled(path: Path, tensors: Sequence[TensorInfo], data_start: int, size: int) -> None:
    end, before = data_start, "the header"
    for tensor in tensors:
        if tensor.offset != end:
            fault = "overlaps it" if tensor.offset < end else "leaves a hole"
            raise ArcmergeError(
                f"{path}: tensor '{tensor.name}' must start at byte {end:,}, at the end of {before}, got byte "
                f"{tensor.offset:,}, which {fault}; {_SAVE_AGAIN}"
            )
        end, before = tensor.offset + tensor.nbytes, f"'{tensor.name}'"
    if size < end:
        raise ArcmergeError(
            f"{path} must be as long as its header promises ({end:,} bytes), got a truncated file of {size:,} bytes; "
            f"{_COPY_AGAIN}"
        )
    if size > end:
        raise ArcmergeError(
            f"{path} must end with its last tensor ({end:,} bytes), got {size:,} bytes, {size - end:,} too many; "
            f"{_COPY_AGAIN}"
        )
