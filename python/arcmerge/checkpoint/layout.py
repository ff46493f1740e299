"""The layout of an output: the order of its tensors, shards of a given size, their headers and the index."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from arcmerge.checkpoint.header import encode_header
from arcmerge.checkpoint.writer import BLOCK
from arcmerge.dtypes import DType
from arcmerge.errors import ArcmergeError

SINGLE_NAME = "model.safetensors"
INDEX_NAME = f"{SINGLE_NAME}.index.json"
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,12})?) ?([KMGT]?)(B?)", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class OutputTensor:
    """A tensor to write."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry:
    """The location of a tensor: `nbytes` bytes from byte `offset` of the file on, counted from its start."""

    tensor: OutputTensor
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One output file of `nbytes` bytes: the header, then the entries without gaps.

    The header is a whole number of blocks long, so that the header and the data can be written past the page cache.
    """

    file_name: str
    header: bytes
    entries: tuple[Entry, ...]
    nbytes: int


def shard(tensors: Sequence[OutputTensor], shard_bytes: int, other_files: Iterable[str] = ()) -> list[Shard]:
    """Lay tensors out in shards, in natural order: the embedding, the layers by index, the final norm, the lm_head.

    In a shard of mixed dtypes the wider dtypes come first, as in the safetensors library, so that every tensor is
    aligned to its item size.

    Args:
        tensors: the tensors of the output, in any order.
        shard_bytes: the maximum size of a shard's data; a larger tensor gets a shard of its own. 0 or less: one shard.
        other_files: the names of the other files of the output, which every header records.

    Raises:
        ValueError: two tensors have the same name.
    """
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("'tensors' must have different names, got one name twice")
    groups: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in sorted(tensors, key=lambda tensor: natural_order(tensor.name)):
        if groups[-1] and 0 < shard_bytes < filled + tensor.nbytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    if len(groups) == 1:
        return [_shard(SINGLE_NAME, groups[0], other_files)]
    names = (f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1))
    return [_shard(name, group, other_files) for name, group in zip(names, groups, strict=True)]


def index_json(shards: Sequence[Shard]) -> bytes | None:
    """The content of model.safetensors.index.json; None for a single shard, which needs no index."""
    if len(shards) == 1:
        return None
    total = sum(entry.nbytes for shard in shards for entry in shard.entries)
    weight_map = {entry.tensor.name: shard.file_name for shard in shards for entry in shard.entries}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode() + b"\n"


def natural_order(name: str) -> tuple[int, list[tuple[int, str]]]:
    """A sort key for tensor names: the embedding first, layer 2 before layer 10, the final norm and lm_head last."""
    parts = name.split(".")
    if any(part.isdecimal() for part in parts):
        rank = 1
    elif "embed" in name or "wte" in parts:
        rank = 0
    else:
        rank = 3 if "lm_head" in parts else 2
    return rank, [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def parse_size(text: str | int) -> int:
    """Parse a shard size.

    Args:
        text: a number of bytes, as '5B', '500M', '1.5G', '5GB' or 5000000000, where B is 10^9 as in mergekit; 0 or -1
            for a single file.

    Returns:
        The number of bytes, 0 for a single file.

    Raises:
        ArcmergeError: `text` is anything else.

    Example:
        >>> parse_size("1.5G")
        1500000000
    """
    stripped = str(text).strip()
    match = _SIZE.fullmatch(stripped)
    size = Decimal(match[1]) * _UNITS[(match[2] or match[3]).upper()] if match else None
    if stripped == "-1":
        return 0
    if size is None or size != int(size):
        raise ArcmergeError(
            f"'out_shard_size' must be a number of bytes such as 5B, 500M or 5000000000 (0: one file), got '{text}'"
        )
    return int(size)


def _shard(file_name: str, tensors: Sequence[OutputTensor], other_files: Iterable[str]) -> Shard:
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header = encode_header([(tensor.name, tensor.dtype, tensor.shape) for tensor in ordered], BLOCK, other_files)
    entries = []
    end = len(header)
    for tensor in ordered:
        entries.append(Entry(tensor, end, tensor.nbytes))
        end += tensor.nbytes
    return Shard(file_name, header, tuple(entries), end)
