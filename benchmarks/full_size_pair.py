"""A pair of checkpoints with the names, shapes, dtype and sharding of google/gemma-2-2b, and random weights.

    python benchmarks/full_size_pair.py .bench/2.6b           A and B: 2 x 5.23 GB, 288 tensors, 2 shards
    python benchmarks/full_size_pair.py .bench/tiny --tiny    the same in small, to try the benchmarks out

A is normal noise of deviation 0.02; B is A plus 0.3 of its own noise, which puts every tensor on the spherical branch
(cosine about 0.958). Every 8 MiB have a random stream of their own, so that threads share the work and the
bytes depend on nothing but the seed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from arcmerge.checkpoint.layout import OutputTensor, index_json, shard
from arcmerge.dtypes import BF16

SEED = 2
DEVIATION = 0.02
NOISE = 0.3
SHARD_BYTES = 4_990_000_000
RUN_BYTES = 1 << 23


@dataclass(frozen=True)
class Geometry:
    """The sizes of a Gemma-2 network; the defaults are those of the 2.6B model."""

    vocab_size: int = 256_000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor. The head is tied to the embedding."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
                yield f"{prefix}.{norm}_layernorm.weight", (hidden,)
            for name, rows in (("q", queries), ("k", keys), ("v", keys)):
                yield f"{prefix}.self_attn.{name}_proj.weight", (rows, hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (hidden, queries)
            for name in ("gate", "up"):
                yield f"{prefix}.mlp.{name}_proj.weight", (inner, hidden)
            yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
        yield "model.norm.weight", (hidden,)

    def config(self) -> dict[str, object]:
        """A config.json that transformers and mergekit take for a Gemma-2."""
        return {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            **vars(self),
            "query_pre_attn_scalar": self.head_dim,
            "max_position_embeddings": 8192,
            "sliding_window": 4096,
            "hidden_activation": "gelu_pytorch_tanh",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
            "torch_dtype": "bfloat16",
        }


TINY = Geometry(512, 64, 256, 4, 2, 1, 32)


def to_bf16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of the nearest bf16 values, ties to even; finite input."""
    bits = values.view(np.uint32)
    return ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)


def to_f32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def make_pair(folder: Path, geometry: Geometry) -> tuple[Path, Path]:
    """The folders A and B inside `folder`, which are made if they are missing."""
    first, second = make_models(folder, geometry, 2)
    return first, second


def make_models(folder: Path, geometry: Geometry, count: int) -> list[Path]:
    """The folders A, B, C and so on inside `folder`, which are made if they are missing. All are near A."""
    models = [folder / letter for letter in "ABCDEFGH"[:count]]
    for index, out in enumerate(models):
        if not out.is_dir():
            write_checkpoint(out, geometry, models[0] if index else None, index)
    return models


def write_checkpoint(out: Path, geometry: Geometry, near: Path | None, index: int) -> None:
    """Write a checkpoint of noise, or of `near` with a little noise. `out` appears when it is complete.

    Noise differs by `index`.
    """
    shards = shard([OutputTensor(name, BF16, shape) for name, shape in geometry.tensors()], SHARD_BYTES)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for number, one in enumerate(shards):
        origin = np.memmap(near / one.file_name, np.uint8, "r") if near else None
        with (partial / one.file_name).open("wb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
            file.write(one.header)
            file.truncate(one.nbytes)
            for begin in range(len(one.header), one.nbytes, RUN_BYTES):
                end = min(begin + RUN_BYTES, one.nbytes)
                pool.submit(write_noise, file.fileno(), origin, [SEED, index, number], begin, end)
    if (index := index_json(shards)) is not None:
        (partial / "model.safetensors.index.json").write_bytes(index)
    (partial / "config.json").write_text(json.dumps(geometry.config(), indent=2))
    partial.rename(out)
    print(f"made {out}", flush=True)


def write_noise(file: int, near: npt.NDArray[np.uint8] | None, seed: list[int], begin: int, end: int) -> None:
    """Fill bytes `begin` to `end` of a file with bf16 noise, round the values of the same bytes of `near` if given."""
    values = np.random.default_rng([*seed, begin]).standard_normal((end - begin) // 2, np.float32)
    values *= np.float32(DEVIATION if near is None else DEVIATION * NOISE)
    if near is not None:
        values += to_f32(near[begin:end].view(np.uint16))
    os.pwrite(file, to_bf16(values), begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="four layers of width 64")
    arguments = parser.parse_args()
    make_pair(arguments.folder, TINY if arguments.tiny else Geometry())


if __name__ == "__main__":
    main()
