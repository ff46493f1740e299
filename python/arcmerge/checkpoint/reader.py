"""A checkpoint folder: config.json and its safetensors shards, checked by their headers and mapped on first use.

The shards are those of model.safetensors.index.json, else model.safetensors, else all *.safetensors files.
Tensors that an index does not list are ignored, as in mergekit.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from arcmerge import _C
from arcmerge.checkpoint.header import TensorInfo, header_digest, parse_object, read_header, unreadable
from arcmerge.checkpoint.layout import INDEX_NAME, SINGLE_NAME
from arcmerge.errors import ArcmergeError, Problems, first_of

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_NUMBERED = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
_QUANTIZED = re.compile(r"\.quant_state\.|\.(qweight|qzeros|absmax|quant_map|SCB)$")
_UNQUANTIZED = "use the original or a dequantized model"


def _is_positive(value: object) -> bool:
    return type(value) is int and value > 0


# The entries of config.json that a merge reads, each with its check and its rule in words.
_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "architectures": (
        lambda value: value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value)),
        "a list of names",
    ),
    "text_config": (lambda value: isinstance(value, dict), "an object of settings"),
    **dict.fromkeys(("num_hidden_layers", "vocab_size"), (_is_positive, "a whole number of 1 or more")),
    **dict.fromkeys(
        ("sliding_window_pattern", "_sliding_window_pattern"),
        (lambda value: value is None or _is_positive(value), "a whole number of 1 or more"),
    ),
}


class Checkpoint:
    """A model folder, read-only, for use by any number of threads. Opening it reads headers only.

    Args:
        folder: the folder.

    Attributes:
        folder: as given.
        config: the content of config.json.
        tensors: by name, in the order of the shards, and in a shard in the order of the file.

    Raises:
        ArcmergeError: names everything that is wrong with the folder, one line each.

    Example:
        >>> checkpoint = Checkpoint(Path("gemma-2-2b"))
        >>> checkpoint.tensors["model.norm.weight"].shape
        (2304,)
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._mapped: dict[str, _C.MappedFile] = {}
        self._lock = threading.Lock()
        if folder.exists() and not folder.is_dir():
            raise ArcmergeError(f"{folder} must be a folder, got a file; give the folder that holds it")
        if not folder.exists():
            raise ArcmergeError(f"{folder} must be an existing folder, got none; check the path")
        self.config = _read_config(folder)
        self.tensors = _read_tensors(folder)
        self._ends: dict[str, int] = {}
        for tensor in self.tensors.values():
            self._ends[tensor.file] = max(self._ends.get(tensor.file, 0), tensor.offset + tensor.nbytes)
        self._states = {file: _state(folder / file) for file in self._ends}

    def address(self, name: str) -> int:
        """The memory address of the first byte of a tensor, valid as long as the checkpoint is."""
        tensor = self.tensors[name]
        address: int = np.frombuffer(memoryview(self._map(tensor)), np.uint8).ctypes.data
        return address + tensor.offset

    def tensor_bytes(self, name: str) -> memoryview:
        """The bytes of a tensor, read-only and not copied. Bytes that cannot be read are zero; see `require_read`."""
        tensor = self.tensors[name]
        return memoryview(self._map(tensor))[tensor.offset : tensor.offset + tensor.nbytes]

    def read_into(self, name: str, first_byte: int, target: memoryview) -> None:
        """Read a range of a tensor, counted from its start, without mapping it. Raises ArcmergeError if that fails."""
        tensor = self.tensors[name]
        path, position = self.folder / tensor.file, tensor.offset + first_byte
        try:
            with path.open("rb", buffering=0) as file:
                while target:
                    if not (count := os.preadv(file.fileno(), [target], position)):
                        raise _lost(path)
                    target, position = target[count:], position + count
        except OSError as error:
            raise unreadable(path, error) from error

    def forget(self, name: str, first_byte: int, byte_count: int) -> None:
        """Unmap the whole pages in a range of a tensor, counted from its start, so that resident memory stays small.

        The page cache keeps them, and they are mapped again when they are read again.
        """
        tensor = self.tensors[name]
        self._map(tensor).forget(tensor.offset + first_byte, tensor.offset + first_byte + byte_count)

    def fingerprint(self) -> dict[str, list[int | str]]:
        """[size, modification time in ns, SHA-256 of the header] of every shard, by its name."""
        found: dict[str, list[int | str]] = {}
        for file in sorted(self._states):
            state = (self.folder / file).stat()
            found[file] = [state.st_size, state.st_mtime_ns, header_digest(self.folder / file)]
        return found

    def require_unchanged(self) -> None:
        """Raises ArcmergeError if a shard was changed or replaced since it was opened, or could not be read."""
        for file, state in self._states.items():
            if _state(self.folder / file) != state:
                raise ArcmergeError(
                    f"{self.folder / file} must stay the same during the work, got a file that has changed while it "
                    "was read; begin again when nothing writes to it"
                )
        self.require_read()

    def require_read(self) -> None:
        """Raises ArcmergeError if bytes of a mapped shard could not be read, so that they were read as zeros.

        A shard that was replaced is no error here: the old one is still mapped.
        """
        for name, file in list(self._mapped.items()):
            if file.lost:
                raise _lost(self.folder / name)

    def _map(self, tensor: TensorInfo) -> _C.MappedFile:
        file = self._mapped.get(tensor.file)
        if file is None:
            with self._lock:
                file = self._mapped.get(tensor.file) or self._open(tensor.file)
                self._mapped[tensor.file] = file
        return file

    def _open(self, name: str) -> _C.MappedFile:
        """Map a shard up to the end of its last tensor, whatever its size is now."""
        path = self.folder / name
        try:
            with path.open("rb") as file:
                return _C.MappedFile(file.fileno(), self._ends[name])
        except OSError as error:
            raise unreadable(path, error) from error


def _lost(path: Path) -> ArcmergeError:
    return ArcmergeError(
        f"{path} must be readable to its end, got a file that has become shorter or a disk that fails; check the disk, "
        "copy the file again, and begin again"
    )


def _state(path: Path) -> tuple[int, ...] | None:
    """The properties of a file by which a changed or replaced one is recognised."""
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").exists():
        if (folder / "adapter_config.json").exists():
            raise ArcmergeError(f"{folder} must be a model, got a LoRA adapter; merge it into its base model first")
        raise ArcmergeError(f"{folder} must have a config.json, got none; give the folder of a complete model")
    config = _read_json(folder / "config.json")
    for prefix, level in (("", config), ("text_config.", config.get("text_config"))):
        for key, value in level.items() if isinstance(level, dict) else ():
            if key in _SETTINGS and not _SETTINGS[key][0](value):
                raise ArcmergeError(
                    f"{folder / 'config.json'}: '{prefix}{key}' must be {_SETTINGS[key][1]}, got {value!r:.80}; "
                    "correct it"
                )
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise ArcmergeError(
            f"{folder} must have weights in bf16, f16 or f32, got quantized ones ({method or 'unnamed method'}); "
            f"{_UNQUANTIZED}"
        )
    return config


def _read_tensors(folder: Path) -> dict[str, TensorInfo]:
    listed = _read_index(folder)
    files = sorted(set(listed.values())) if listed is not None else _find_shards(folder)
    missing = [name for name in files if not (folder / name).is_file()]
    if unusable := [name for name in missing if os.path.lexists(folder / name)]:
        raise ArcmergeError(
            f"{folder / unusable[0]} must be a file, or a link to one, got neither; download or copy it again"
        )
    if missing:
        raise ArcmergeError(
            f"{folder} must have all of its {len(files)} shards, got no {first_of(missing)}; download the model again"
        )
    tensors: dict[str, TensorInfo] = {}
    problems = Problems()
    for file in files:
        try:
            shard = read_header(folder / file)
        except ArcmergeError as error:
            for problem in error.problems:
                problems.add(problem)
            continue
        if listed is not None:
            promised = [name for name, shard_name in listed.items() if shard_name == file]
            if absent := [name for name in promised if name not in shard]:
                problems.add(
                    f"{folder / file} must have all tensors that {INDEX_NAME} lists, got no {first_of(absent)}; "
                    "download both again"
                )
            shard = {name: tensor for name, tensor in shard.items() if listed.get(name) == file}
        if twice := [name for name in shard if name in tensors]:
            problems.add(
                f"{folder}: a tensor must be in one file, got {first_of(twice)} in {tensors[twice[0]].file} and in "
                f"{file}; remove the file that does not belong"
            )
        tensors.update(shard)
    quantized = next((name for name in tensors if _QUANTIZED.search(name)), None)
    if quantized is not None:
        problems.add(
            f"{folder} must have weights in bf16, f16 or f32, got quantized ones (tensor '{quantized}'); {_UNQUANTIZED}"
        )
    if not tensors and not problems:
        problems.add(f"{folder} must have tensors, got safetensors files without any; download the model again")
    problems.raise_if_any()
    return tensors


def _read_index(folder: Path) -> dict[str, str] | None:
    """The shard of each tensor name, from the index if there is one. A shard must be in the folder itself."""
    path = folder / INDEX_NAME
    if not path.exists():
        return None
    listed = _read_json(path).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise ArcmergeError(
            f"{path}: 'weight_map' must map tensor names to file names, got {listed!r:.80}; download it again"
        )
    for file in listed.values():
        if file != Path(file).name or "\\" in file or not file.endswith(".safetensors"):
            raise ArcmergeError(
                f"{path}: 'weight_map' must name *.safetensors files of this folder, got {file!r:.120}; "
                "download it again"
            )
    if (folder / SINGLE_NAME).exists() and SINGLE_NAME not in listed.values():
        raise ArcmergeError(
            f"{folder} must have either {SINGLE_NAME} or an index of other shards, got both; remove the one that is "
            "out of date"
        )
    return listed


def _find_shards(folder: Path) -> list[str]:
    if (folder / SINGLE_NAME).exists():
        return [SINGLE_NAME]
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if not files and any(path for pattern in _PICKLES for path in folder.glob(pattern)):
        raise ArcmergeError(
            f"{folder} must have *.safetensors files, got pickled weights only (*.bin, *.pt), and loading a pickle can "
            "run any code; convert them, in a place you trust, with transformers' "
            "save_pretrained(folder, safe_serialization=True)"
        )
    if not files:
        raise ArcmergeError(
            f"{folder} must have *.safetensors files, got none; give a folder with weights in that format"
        )
    return [*files, *_absent_shards(files)]


def _absent_shards(files: Iterable[str]) -> list[str]:
    """The shards that are missing from `files`, as names like model-00001-of-00003.safetensors tell."""
    present: dict[tuple[str, str], set[int]] = {}
    for match in filter(None, map(_NUMBERED.fullmatch, files)):
        present.setdefault((match[1], match[3]), set()).add(int(match[2]))
    return [
        f"{stem}-{number:05}-of-{total}.safetensors"
        for (stem, total), numbers in present.items()
        for number in range(1, int(total) + 1)
        if number not in numbers
    ]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return parse_object(path.read_bytes(), path)
    except OSError as error:
        raise unreadable(path, error) from error
