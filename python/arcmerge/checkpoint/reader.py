"""A checkpoint folder: config.json and its safetensors shards, validated from the headers, mapped when first used.

Which shards count: those of model.safetensors.index.json; else model.safetensors; else every *.safetensors there is.
Tensors that an index does not list are left alone, as mergekit does.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arcmerge import _C
from arcmerge.checkpoint.header import TensorInfo, header_digest, parse_object, read_header
from arcmerge.checkpoint.layout import INDEX_NAME, SINGLE_NAME
from arcmerge.errors import ArcmergeError

__all__ = ["Checkpoint", "TensorInfo"]

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
_QUANTISED = re.compile(r"\.quant_state\.|\.(qweight|qzeros|absmax|quant_map|SCB)$")
_UNQUANTISED = "weights in bf16, f16 or f32 are needed: use the original or a dequantised model"


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


# The entries of config.json that a merge goes by, and what they must be.
_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "architectures": (
        lambda value: value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)),
        "a list of names",
    ),
    "text_config": (lambda value: isinstance(value, dict), "an object of settings"),
    **dict.fromkeys(("num_hidden_layers", "vocab_size"), (_is_count, "a whole number from 1 up")),
    **dict.fromkeys(
        ("sliding_window_pattern", "_sliding_window_pattern"),
        (lambda value: value is None or _is_count(value), "a whole number from 1 up"),
    ),
}


class Checkpoint:
    """A model folder, read-only and safe to share between threads.

    folder: as given. config: config.json. tensors: by name, in the order of the shards and inside them of the file.
    Opening reads headers only; ArcmergeError names everything that is wrong with the folder, one line each.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mapped: dict[str, _C.MappedFile] = {}
        self._lock = threading.Lock()
        if not folder.is_dir():
            what = "is a file; give the folder that holds it" if folder.exists() else "no such folder; check the path"
            raise ArcmergeError(f"{folder}: {what}.")
        self.config = _read_config(folder)
        self.tensors = _read_tensors(folder)
        self._ends: dict[str, int] = {}
        for tensor in self.tensors.values():
            self._ends[tensor.file] = max(self._ends.get(tensor.file, 0), tensor.offset + tensor.nbytes)
        self._stamps = {file: _stamp(folder / file) for file in self._ends}

    def address(self, name: str) -> int:
        """Where the first byte of a tensor lies in memory, until close()."""
        tensor = self.tensors[name]
        address: int = np.frombuffer(memoryview(self._map(tensor)), np.uint8).ctypes.data
        return address + tensor.offset

    def tensor_bytes(self, name: str) -> memoryview:
        """The bytes of a tensor, read-only and not copied. What cannot be read is zero: see require_read."""
        tensor = self.tensors[name]
        return memoryview(self._map(tensor))[tensor.offset : tensor.offset + tensor.nbytes]

    def forget(self, name: str, first_byte: int, byte_count: int) -> None:
        """Unmaps the whole pages inside a range of a tensor, counted from its start; the page cache keeps them.

        Resident memory stays small. The range may be read again: its pages are then mapped afresh.
        """
        tensor = self.tensors[name]
        self._map(tensor).forget(tensor.offset + first_byte, tensor.offset + first_byte + byte_count)

    def fingerprint(self) -> dict[str, list[int | str]]:
        """Size, time of the last change in nanoseconds, and hash of the header of every shard, by its name."""
        found: dict[str, list[int | str]] = {}
        for file in sorted(self._stamps):
            state = (self.folder / file).stat()
            found[file] = [state.st_size, state.st_mtime_ns, header_digest(self.folder / file)]
        return found

    def require_unchanged(self) -> None:
        """Raises ArcmergeError if a shard was written to or replaced since it was opened, or could not be read."""
        for file, stamp in self._stamps.items():
            if _stamp(self.folder / file) != stamp:
                raise ArcmergeError(
                    f"{self.folder / file}: has changed while it was read: begin again when nothing writes to it."
                )
        self.require_read()

    def require_read(self) -> None:
        """Raises ArcmergeError if bytes of a mapped shard could not be read: they were zeros to whoever read them.

        A shard that another has replaced since is no error: the mapping is of the old one.
        """
        for name, file in list(self._mapped.items()):
            if file.lost:
                raise ArcmergeError(
                    f"{self.folder / name}: could not be read to its end, because it became shorter meanwhile or its "
                    "disk failed: check the disk, copy the file again, and start again."
                )

    def close(self) -> None:
        """Ends the mappings; addresses are void from here on. Views of tensor_bytes keep theirs until they go."""
        with self._lock:
            self._mapped = {}

    def _map(self, tensor: TensorInfo) -> _C.MappedFile:
        file = self._mapped.get(tensor.file)
        if file is None:
            with self._lock:
                file = self._mapped.get(tensor.file) or self._open(tensor.file)
                self._mapped[tensor.file] = file
        return file

    def _open(self, name: str) -> _C.MappedFile:
        """Maps a shard as long as its header has said, whatever its length is now."""
        path = self.folder / name
        try:
            with path.open("rb") as file:
                return _C.MappedFile(file.fileno(), self._ends[name])
        except OSError as error:
            raise ArcmergeError(f"{path}: cannot be read: {error.strerror}: check the file and its disk.") from error


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What tells a file from what it was or from another in its place."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise ArcmergeError(f"{folder}: is a LoRA adapter, not a model: merge it into its base model first.")
        raise ArcmergeError(
            f"{folder}: has no config.json, which every model has: give the folder of a complete model."
        )
    config = _read_json(folder / "config.json")
    for place, level in (("", config), ("text_config.", config.get("text_config"))):
        for key, value in level.items() if isinstance(level, dict) else ():
            if key in _SETTINGS and not _SETTINGS[key][0](value):
                raise ArcmergeError(
                    f"{folder / 'config.json'}: {place}{key} must be {_SETTINGS[key][1]}, is {value!r:.80}: correct it."
                )
    quantisation = config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else None
        raise ArcmergeError(f"{folder}: is quantised ({method or 'unnamed method'}): {_UNQUANTISED}.")
    return config


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    listed = _read_index(folder)
    files = sorted(set(listed.values())) if listed is not None else _find_shards(folder)
    missing = [name for name in files if not (folder / name).is_file()]
    if unusable := [name for name in missing if os.path.lexists(folder / name)]:
        raise ArcmergeError(f"{folder / unusable[0]}: is no file, or a link to none: download or copy it again.")
    if missing:
        raise ArcmergeError(
            f"{folder}: {_first(missing, 'shard')} of {len(files)} is missing: download the model again."
        )
    tensors: dict[str, TensorInfo] = {}
    problems: list[str] = []
    for file in files:
        try:
            shard = read_header(folder / file)
        except ArcmergeError as error:
            problems.extend(error.problems)
            continue
        if listed is not None:
            promised = [name for name, shard_name in listed.items() if shard_name == file]
            absent = [name for name in promised if name not in shard]
            if absent:
                problems.append(
                    f"{folder / file}: lacks {_first(absent)}, listed in {INDEX_NAME}: download both again."
                )
            shard = {name: tensor for name, tensor in shard.items() if listed.get(name) == file}
        twice = [name for name in shard if name in tensors]
        if twice:
            where = f"in {tensors[twice[0]].file} and in {file}"
            problems.append(f"{folder}: {_first(twice)} is {where}: remove the file that does not belong.")
        tensors.update(shard)
    quantised = next((name for name in tensors if _QUANTISED.search(name)), None)
    if quantised is not None:
        problems.append(f"{folder}: is quantised (tensor '{quantised}'): {_UNQUANTISED}.")
    if not tensors and not problems:
        problems.append(f"{folder}: its safetensors files hold no tensors: download the model again.")
    if problems:
        raise ArcmergeError(problems)
    return tensors


def _read_index(folder: Path) -> dict[str, str] | None:
    """Tensor name -> shard, from the index if there is one. A shard's name is used only if it stays in the folder."""
    path = folder / INDEX_NAME
    if not path.exists():
        return None
    listed = _read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise ArcmergeError(f"{path}: needs a 'weight_map' of tensor names to file names: download it again.")
    for file in listed.values():
        if file != Path(file).name or "\\" in file or not file.endswith(".safetensors"):
            raise ArcmergeError(f"{path}: a shard must be a *.safetensors file of this folder, found {file!r:.120}.")
    if (folder / SINGLE_NAME).exists() and SINGLE_NAME not in listed.values():
        raise ArcmergeError(
            f"{folder}: has {SINGLE_NAME} and an index of other shards: remove the one that is out of date."
        )
    return listed


def _find_shards(folder: Path) -> list[str]:
    if (folder / SINGLE_NAME).exists():
        return [SINGLE_NAME]
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files and any(path for pattern in _PICKLES for path in folder.glob(pattern)):
        raise ArcmergeError(
            f"{folder}: holds pickled weights only (*.bin, *.pt), and loading a pickle can run any code: convert "
            "them, in a place you trust, with transformers' save_pretrained(folder, safe_serialization=True)."
        )
    if not files:
        raise ArcmergeError(f"{folder}: has no *.safetensors file: give a folder with weights in that format.")
    return [*files, *_absent_numbers(files)]


def _absent_numbers(files: Iterable[str]) -> list[str]:
    """The shards that names like model-00001-of-00003.safetensors promise and `files` lacks."""
    present: dict[tuple[str, str], set[int]] = {}
    for match in filter(None, map(_NUMBERED.fullmatch, files)):
        present.setdefault((match[1], match[3]), set()).add(int(match[2]))
    return [
        f"{stem}-{number:05}-of-{total}.safetensors"
        for (stem, total), numbers in present.items()
        for number in range(1, int(total) + 1)
        if number not in numbers
    ]


def _first(names: Sequence[str], kind: str = "tensor") -> str:
    """One name stands for many, so that a problem stays one line."""
    return f"{kind} '{names[0]}'" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_bytes(), path)
    except OSError as error:
        raise ArcmergeError(f"{path}: cannot be read: {error.strerror}.") from error
