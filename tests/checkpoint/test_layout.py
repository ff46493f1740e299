"""Shards: their order and sizes, headers that the safetensors library accepts, and the sizes that users may give."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from arcmerge.checkpoint.header import read_header
from arcmerge.checkpoint.layout import OutputTensor, Shard, index_json, parse_size, shard
from arcmerge.dtypes import BF16, BY_CODE, F16, F32
from arcmerge.errors import ArcmergeError

NAMES = st.lists(
    st.one_of(
        st.sampled_from(["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", 'odd \u00e9 "name"']),
        st.builds("model.layers.{}.{}.weight".format, st.integers(0, 30), st.sampled_from(["mlp", "self_attn.q_proj"])),
    ),
    unique=True,
    max_size=30,
)
TENSORS = NAMES.flatmap(
    lambda names: st.tuples(
        *(
            st.builds(
                OutputTensor,
                st.just(name),
                st.sampled_from([BF16, F16, F32, BY_CODE["U8"], BY_CODE["I64"]]),
                st.lists(st.integers(0, 9), max_size=3).map(tuple),
            )
            for name in names
        )
    )
)


def write(folder: Path, laid_out: Shard) -> Path:
    path = folder / laid_out.file_name
    path.write_bytes(laid_out.header + bytes(range(256)) * (laid_out.nbytes // 256 + 1))
    with path.open("r+b") as file:
        file.truncate(laid_out.nbytes)
    return path


def test_natural_order_puts_the_embedding_first_and_layers_by_index() -> None:
    ordered = [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.2.input_layernorm.weight",
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.10.mlp.up_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    (single,) = shard([OutputTensor(name, BF16, (4,)) for name in sorted(ordered)], 0)
    assert [entry.tensor.name for entry in single.entries] == ordered
    assert single.file_name == "model.safetensors"


@settings(deadline=None)
@given(tensors=TENSORS, shard_bytes=st.integers(-1, 3000))
def test_shards_hold_every_tensor_once_within_the_size_and_aligned(
    tensors: tuple[OutputTensor, ...], shard_bytes: int
) -> None:
    shards = shard(tensors, shard_bytes)
    placed = [entry.tensor for laid_out in shards for entry in laid_out.entries]
    assert sorted(placed, key=repr) == sorted(tensors, key=repr)
    sizes = [sum(entry.nbytes for entry in laid_out.entries) for laid_out in shards]
    if shard_bytes <= 0:
        assert len(shards) == 1
    for number, (laid_out, size) in enumerate(zip(shards, sizes, strict=True), 1):
        assert shard_bytes <= 0 or size <= shard_bytes or len(laid_out.entries) == 1
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        assert laid_out.file_name == name
        end = len(laid_out.header)
        assert end % 4096 == 0
        for entry in laid_out.entries:
            assert (entry.offset, entry.offset % entry.tensor.dtype.itemsize) == (end, 0)
            end += entry.nbytes
        assert laid_out.nbytes == end
    index = index_json(shards)
    if len(shards) == 1:
        assert index is None
    else:
        assert index is not None
        assert json.loads(index) == {
            "metadata": {"total_size": sum(sizes)},
            "weight_map": {entry.tensor.name: laid_out.file_name for laid_out in shards for entry in laid_out.entries},
        }


@settings(deadline=None, max_examples=40)
@given(tensors=TENSORS, shard_bytes=st.integers(-1, 3000))
def test_a_layout_is_read_by_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tensors: tuple[OutputTensor, ...], shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("out")
    for laid_out in shard(tensors, shard_bytes):
        read = read_header(write(folder, laid_out))
        assert [(info.name, info.dtype, info.shape, info.offset, info.nbytes) for info in read.values()] == [
            (entry.tensor.name, entry.tensor.dtype, entry.tensor.shape, entry.offset, entry.nbytes)
            for entry in sorted(laid_out.entries, key=lambda entry: (entry.offset, entry.nbytes))
        ]


def test_a_layout_is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    tensors = [
        OutputTensor("model.norm.weight", F32, (3,)),
        OutputTensor("model.layers.10.w", F16, (5, 1)),
        OutputTensor("model.layers.2.w", F16, ()),
        OutputTensor('a "quoted" name \u00e9', F32, (0, 2)),
    ]
    (single,) = shard(tensors, 0)
    path = write(tmp_path, single)
    content = path.read_bytes()
    with safe_open(path, "numpy") as file:
        assert file.metadata()["format"] == "pt"
        assert set(file.keys()) == {tensor.name for tensor in tensors}
        for entry in single.entries:
            found = file.get_tensor(entry.tensor.name)
            assert found.shape == entry.tensor.shape
            assert found.dtype == np.dtype(entry.tensor.dtype.name)
            assert found.tobytes() == content[entry.offset : entry.offset + entry.nbytes]


def test_a_larger_tensor_has_its_own_shard() -> None:
    sizes = {"layers.0.w": 10, "layers.1.w": 500, "layers.2.w": 50, "layers.3.w": 50, "layers.4.w": 1}
    shards = shard([OutputTensor(name, BY_CODE["U8"], (size,)) for name, size in sizes.items()], 100)
    assert [[entry.nbytes for entry in laid_out.entries] for laid_out in shards] == [[10], [500], [50, 50], [1]]


def test_two_tensors_with_the_same_name_are_refused() -> None:
    with pytest.raises(ValueError, match="one name"):
        shard([OutputTensor("w", F16, (1,)), OutputTensor("w", F32, (1,))], 0)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5B", 5_000_000_000),
        ("5b", 5_000_000_000),
        ("5G", 5_000_000_000),
        ("5GB", 5_000_000_000),
        (" 5 gb ", 5_000_000_000),
        ("500M", 500_000_000),
        ("500MB", 500_000_000),
        ("2.3G", 2_300_000_000),
        ("7k", 7_000),
        ("1T", 1_000_000_000_000),
        ("4999999999", 4_999_999_999),
        (4_999_999_999, 4_999_999_999),
        ("0", 0),
        (0, 0),
        ("-1", 0),
        (-1, 0),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "B", "five", "5GiB", "-2", -5, "1.5", "0.0001K", "5 5", "1e9", "nan", "9" * 400, "٣M"]
)
def test_wrong_sizes(text: str | int) -> None:
    with pytest.raises(ArcmergeError, match="'out_shard_size' must be a number of bytes such as 5B"):
        parse_size(text)
