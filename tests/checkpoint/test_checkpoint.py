"""The reader against the safetensors library, and one clear error for each kind of broken checkpoint."""

from __future__ import annotations

import ctypes
import json
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from arcmerge.checkpoint.header import read_header
from arcmerge.checkpoint.layout import INDEX_NAME
from arcmerge.checkpoint.reader import Checkpoint
from arcmerge.errors import ArcmergeError

SHARDS: dict[str, dict[str, np.ndarray[Any, Any]]] = {
    "model-00001-of-00002.safetensors": {
        "model.embed_tokens.weight": np.arange(5000 * 8, dtype=np.float16).reshape(5000, 8),
        "model.layers.0.weight": np.arange(7, dtype=np.float32),
    },
    "model-00002-of-00002.safetensors": {
        "model.layers.1.weight": np.arange(9, dtype=np.int64).reshape(3, 3),
        "model.scalar": np.array(3.5, np.float32),
        "model.empty": np.zeros((0, 4), np.float16),
    },
}
TENSORS = {name: tensor for shard in SHARDS.values() for name, tensor in shard.items()}


def write_model(folder: Path, *, index: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "gemma2"}')
    for file, tensors in SHARDS.items():
        save_file(tensors, folder / file, {"format": "pt"})
    if index:
        write_index(folder, {name: file for file, tensors in SHARDS.items() for name in tensors})
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_raw(path: Path, header: Any, data: bytes = b"") -> None:
    """Write a file with this header, which is padded to a multiple of 8 bytes unless it is given as bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b"" if isinstance(header, bytes) else b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(dtype: Any = "F16", shape: Any = (2,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize("form", ["index", "no index", "single file"])
def test_files_of_the_safetensors_library_are_read(tmp_path: Path, form: str) -> None:
    folder = write_model(tmp_path, index=form == "index")
    if form == "single file":
        for file in SHARDS:
            (folder / file).unlink()
        save_file(TENSORS, folder / "model.safetensors")
        save_file({"other": np.ones(3, np.float32)}, folder / "consolidated.safetensors")
    checkpoint = Checkpoint(folder)
    assert checkpoint.config == {"model_type": "gemma2"}
    assert set(checkpoint.tensors) == set(TENSORS)
    for name, expected in TENSORS.items():
        info = checkpoint.tensors[name]
        assert (info.shape, info.count, info.nbytes) == (expected.shape, expected.size, expected.nbytes)
        assert info.dtype.name == expected.dtype.name
        assert bytes(checkpoint.tensor_bytes(name)) == expected.tobytes()


def test_the_address_of_a_tensor_has_its_bytes(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_model(tmp_path))
    for name, expected in TENSORS.items():
        assert ctypes.string_at(checkpoint.address(name), expected.nbytes) == expected.tobytes()


def test_tensors_outside_the_index_are_ignored(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    write_index(folder, {"model.scalar": "model-00002-of-00002.safetensors"})
    assert set(Checkpoint(folder).tensors) == {"model.scalar"}


def test_shards_may_be_links_as_in_the_hub_cache(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    for file in SHARDS:
        (folder / file).rename(tmp_path / f"blob-{file}")
        (folder / file).symlink_to(f"../blob-{file}")
    assert set(Checkpoint(folder).tensors) == set(TENSORS)


def resident_bytes(address: int) -> int:
    """Rss of the mapping that starts at `address`, from /proc/self/smaps."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.startswith(f"{address:x}-"):
            return 1024 * int(next(rest for rest in lines if rest.startswith("Rss:")).split()[1])
    raise AssertionError("no such mapping")


def test_forget_unmaps_whole_pages_inside_the_range_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    values = np.arange(1 << 18, dtype=np.float32)
    save_file({"big": values}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    start = checkpoint.address("big") - checkpoint.tensors["big"].offset
    assert bytes(checkpoint.tensor_bytes("big")) == values.tobytes()
    whole = resident_bytes(start)
    assert whole >= values.nbytes
    checkpoint.forget("big", 4000, 100)
    assert resident_bytes(start) == whole
    checkpoint.forget("big", 1, values.nbytes - 1)
    assert resident_bytes(start) <= 3 * 4096
    assert bytes(checkpoint.tensor_bytes("big")) == values.tobytes()


def test_a_view_outlives_its_checkpoint(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_model(tmp_path))
    view = checkpoint.tensor_bytes("model.scalar")
    del checkpoint
    assert bytes(view) == TENSORS["model.scalar"].tobytes()


@pytest.mark.alone
def test_a_header_of_300_tensors_opens_in_milliseconds(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({f"model.layers.{i}.weight": np.zeros(4, np.float16) for i in range(300)}, tmp_path / "model.safetensors")
    best = 1.0
    for _ in range(5):
        start = time.perf_counter()
        Checkpoint(tmp_path)
        best = min(best, time.perf_counter() - start)
    assert best < 0.05  # about 3 ms; the margin is for a loaded machine


HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "not JSON": (b"{not json", b"", "must be valid JSON, got an error ("),
    "not UTF-8": (b'{"\xff": 1}', b"", "must be valid JSON, got an error ("),
    "nested too deep": (b'{"a":' * 100_000, b"", "must be valid JSON, got an error ("),
    # The json module reads it, but recursive functions of Python could neither copy nor write it.
    "nested deep": (b'{"a":' * 500 + b"1" + b"}" * 500, b"", "must be nested at most 100 levels deep, got more"),
    "a list": ([], b"", "must hold a JSON object, got []"),
    "key twice": (b'{"a": {}, "a": {}}', b"", "JSON key 'a' must occur once, got it twice"),
    "entry is a number": ({"w": 1}, b"", "tensor 'w' must have dtype, shape and data_offsets, got 1"),
    "unknown dtype": ({"w": entry("F4")}, b"1234", "tensor 'w' must have one of the dtypes BF16"),
    "dtype is a list": ({"w": entry(["F16"])}, b"1234", "got ['F16']; convert"),
    "negative shape": ({"w": entry(shape=[-2])}, b"1234", "whole numbers >= 0, got [-2]"),
    "boolean shape": ({"w": entry(shape=[True, 2])}, b"1234", "whole numbers >= 0, got [True, 2]"),
    "no offsets": ({"w": {"dtype": "F16", "shape": [2]}}, b"1234", "must have data_offsets [begin, end], got None"),
    "offsets backwards": ({"w": entry(offsets=[4, 0])}, b"1234", "must have data_offsets [begin, end], got [4, 0]"),
    "shape against bytes": ({"w": entry(shape=[3])}, b"1234", "must have data_offsets of 6 bytes, got 4 bytes"),
    "overlap": (
        {"v": entry(), "w": entry(offsets=[2, 6])},
        b"123456",
        "which overlaps it",
    ),
    "hole": (
        {"v": entry(), "w": entry(offsets=[6, 10])},
        b"1234567890",
        "which leaves a hole",
    ),
    "hole at the start": (
        {"w": entry(offsets=[2, 6])},
        b"123456",
        "at the end of the header, got byte",
    ),
    "truncated data": (
        {"w": entry()},
        b"123",
        "header promises (76 bytes), got a truncated file of 75 bytes",
    ),
    "bytes behind": ({"w": entry()}, b"12345", "must end with its last tensor (76 bytes), got 77 bytes, 1 too many"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_broken_header(tmp_path: Path, case: str) -> None:
    header, data, sentence = HEADERS[case]
    path = tmp_path / "model.safetensors"
    write_raw(path, header, data)
    with pytest.raises(ArcmergeError) as caught:
        read_header(path)
    assert sentence in str(caught.value)
    assert len(caught.value.problems) == 1
    assert str(caught.value).startswith(str(path))


def test_a_tensor_may_start_at_any_byte(tmp_path: Path) -> None:
    """Old files have headers that are not padded; the kernels read from any address."""
    path = tmp_path / "model.safetensors"
    write_raw(path, json.dumps({"w": entry()}).ljust(65).encode(), b"1234")
    assert read_header(path)["w"].offset == 73


def replace(folder: Path, file: str, content: str | bytes) -> None:
    (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)


def remove(folder: Path, *files: str) -> None:
    for file in files:
        (folder / file).unlink()


def leave_only(folder: Path, file: str, content: bytes) -> None:
    remove(folder, *SHARDS, INDEX_NAME)
    (folder / file).write_bytes(content)


def add_shard(folder: Path, name: str) -> None:
    remove(folder, INDEX_NAME)
    save_file({name: np.zeros(2, np.uint8)}, folder / "extra.safetensors")


def make_folder(folder: Path, file: str) -> None:
    remove(folder, file)
    (folder / file).mkdir()


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n"
SECOND = "model-00002-of-00002.safetensors"

FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: remove(f, "config.json"), "must have a config.json, got none"),
    "adapter": (lambda f: (f / "config.json").rename(f / "adapter_config.json"), "must be a model, got a LoRA adapter"),
    "config broken": (lambda f: replace(f, "config.json", '{"a": '), "config.json must be valid JSON"),
    "config a list": (lambda f: replace(f, "config.json", "[]"), "config.json must hold a JSON object"),
    "config a pointer": (
        lambda f: replace(f, "config.json", LFS),
        "config.json must be the file itself, got a Git",
    ),
    "quantized by config": (
        lambda f: replace(f, "config.json", '{"quantization_config": {"quant_method": "awq"}}'),
        "got quantized ones (awq)",
    ),
    "quantized, GPTQ": (
        lambda f: add_shard(f, "layers.0.q_proj.qweight"),
        "got quantized ones (tensor 'layers.0.q_proj.qweight')",
    ),
    "quantized, bitsandbytes": (
        lambda f: add_shard(f, "layers.0.q_proj.weight.quant_state.bitsandbytes__nf4"),
        "got quantized ones (tensor 'layers.0.q_proj.weight.quant_state.bitsandbytes__nf4')",
    ),
    "shard missing from index": (lambda f: remove(f, SECOND), f"all of its 2 shards, got no '{SECOND}'"),
    "shard missing, no index": (
        lambda f: remove(f, SECOND, INDEX_NAME),
        f"all of its 2 shards, got no '{SECOND}'",
    ),
    "shard a folder": (lambda f: make_folder(f, SECOND), "must be a file, or a link to one, got neither"),
    "shard a pointer": (lambda f: replace(f, SECOND, LFS), f"{SECOND} must be the file itself, got a Git LFS pointer"),
    "shard empty": (lambda f: replace(f, SECOND, b""), "the length of its header (8 bytes), got a file of 0 bytes"),
    "shard a zip": (
        lambda f: replace(f, SECOND, b"PK\3\4" + b" " * 99),
        "must be a safetensors file with",
    ),
    "shard cut in header": (
        lambda f: replace(f, SECOND, struct.pack("<Q", 500) + b"{" * 100),
        "must hold its whole header (508 bytes), got a truncated file of 108 bytes",
    ),
    "index broken": (lambda f: replace(f, INDEX_NAME, "{"), f"{INDEX_NAME} must be valid JSON"),
    "index without map": (lambda f: write_index(f, None), "'weight_map' must map tensor names to file names, got None"),
    "index of numbers": (
        lambda f: write_index(f, {"w": 1}),
        "must map tensor names to file names, got {'w': 1}",
    ),
    "index leaves by ..": (lambda f: write_index(f, {"w": "../x.safetensors"}), "got '../x.safetensors'"),
    "index absolute": (lambda f: write_index(f, {"w": "/x.safetensors"}), "got '/x.safetensors'"),
    "index into sub-folder": (lambda f: write_index(f, {"w": "a/x.safetensors"}), "got 'a/x.safetensors'"),
    "index of pickles": (lambda f: write_index(f, {"w": "x.bin"}), "got 'x.bin'"),
    "index names absent tensors": (
        lambda f: write_index(f, {"w": SECOND, "v": SECOND}),
        f"{SECOND} must have all tensors that {INDEX_NAME} lists, got no 'w' and 1 more",
    ),
    "index and single file": (
        lambda f: save_file(TENSORS, f / "model.safetensors"),
        "must have either model.safetensors or an index of other shards, got both",
    ),
    "tensor in two shards": (
        lambda f: add_shard(f, "model.scalar"),
        f"a tensor must be in one file, got 'model.scalar' in extra.safetensors and in {SECOND}",
    ),
    "pickles only": (lambda f: leave_only(f, "pytorch_model.bin", b"PK"), "loading a pickle can run any code"),
    "no weights": (lambda f: leave_only(f, "tokenizer.json", b"{}"), "must have *.safetensors files, got none"),
    "no tensors": (
        lambda f: leave_only(f, "model.safetensors", struct.pack("<Q", 2) + b"{}"),
        "must have tensors, got safetensors files without any",
    ),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_broken_folder(tmp_path: Path, case: str) -> None:
    damage, sentence = FOLDERS[case]
    folder = write_model(tmp_path / "model")
    damage(folder)
    with pytest.raises(ArcmergeError) as caught:
        Checkpoint(folder)
    assert sentence in str(caught.value)
    assert len(caught.value.problems) == 1
    assert not caught.value.problems[0].endswith(".")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ArcmergeError, match="must be an existing folder, got none"):
        Checkpoint(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(ArcmergeError, match="must be a folder, got a file; give the folder that holds it"):
        Checkpoint(tmp_path / "file")


def test_every_broken_shard_is_named(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    for file in SHARDS:
        (folder / file).write_bytes(b"1")
    with pytest.raises(ArcmergeError) as caught:
        Checkpoint(folder)
    assert [Path(problem.split(" must ")[0]).name for problem in caught.value.problems] == list(SHARDS)
