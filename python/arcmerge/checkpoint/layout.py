"""Which output tensor goes where: natural order, shards of a given size, their headers and the index."""

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
    """A tensor that will be written."""

    name: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Entry:
    """A tensor's place: `nbytes` bytes at byte `offset`, counted from the start of the file."""

    tensor: OutputTensor
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """One output file of `nbytes` bytes: the header, then the entries one behind the other, without a gap.

    The header is a whole number of blocks long, so that it and the data can be written past the page cache.
    """

    file_name: str
    header: bytes
    entries: tuple[Entry, ...]
    nbytes: int


def shard(tensors: Sequence[OutputTensor], shard_bytes: int, beside: Iterable[str] = ()) -> list[Shard]:
    """Lays tensors out in natural order: the embedding, the layers by number, the final norm, the head.

    A shard ends before the tensor that would take its data beyond `shard_bytes`; a tensor larger than that has a shard
    of its own; 0 or less means one shard. Inside a shard of mixed dtypes the wider come first, as the safetensors
    library does it, so that every tensor is aligned to its own item size.

    beside: the names of the other files of the output, which every header notes.

    Raises ValueError if two tensors have one name.
    """
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise ValueError("two output tensors have one name")
    groups: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in sorted(tensors, key=lambda tensor: natural_order(tensor.name)):
        if groups[-1] and 0 < shard_bytes < filled + tensor.nbytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    if len(groups) == 1:
        return [_shard(SINGLE_NAME, groups[0], beside)]
    names = (f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1))
    return [_shard(name, group, beside) for name, group in zip(names, groups, strict=True)]


def index_json(shards: Sequence[Shard]) -> bytes | None:
    """The content of model.safetensors.index.json, None for a single shard, which needs none."""
    if len(shards) == 1:
        return None
    total = sum(entry.nbytes for shard in shards for entry in shard.entries)
    weight_map = {entry.tensor.name: shard.file_name for shard in shards for entry in shard.entries}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2).encode() + b"\n"


def natural_order(name: str) -> tuple[int, list[tuple[int, str]]]:
    """A sort key for tensor names that puts layer 2 before layer 10 and the network's ends at its ends."""
    parts = name.split(".")
    if any(part.isdecimal() for part in parts):
        rank = 1
    elif "embed" in name or "wte" in parts:
        rank = 0
    else:
        rank = 3 if "lm_head" in parts else 2
    return rank, [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def parse_size(text: str | int) -> int:
    """Bytes in '5B', '500M', '1.5G', '5GB' or 5000000000, B for a billion as in mergekit; 0 (one file) in 0 or -1."""
    stripped = str(text).strip()
    match = _SIZE.fullmatch(stripped)
    size = Decimal(match[1]) * _UNITS[(match[2] or match[3]).upper()] if match else None
    if stripped == "-1":
        return 0
    if size is None or size != int(size):
        raise ArcmergeError(
            f"a shard size is a number of bytes such as 5B, 500M or 5000000000 (0: one file), got '{text}'."
        )
    return int(size)


def _shard(file_name: str, tensors: Sequence[OutputTensor], beside: Iterable[str]) -> Shard:
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header = encode_header([(tensor.name, tensor.dtype, tensor.shape) for tensor in ordered], BLOCK, beside)
    entries = []
    end = len(header)
    for tensor in ordered:
        entries.append(Entry(tensor, end, tensor.nbytes))
        end += tensor.nbytes
    return Shard(file_name, header, tuple(entries), end)
