"""Checkpoints with the tensor names of a network and a few small tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from safetensors.torch import load_file

import arcmerge
import tiny

Tensors = dict[str, npt.NDArray[Any]]

TOKENS, WIDTH = 64, 16
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_CODES = {"float32": "F32", "int64": "I64", "bool": "BOOL"}


def decoder(
    seed: int,
    *,
    stack: str = "model.layers.",
    layers: int = 4,
    embedding: str = EMBEDDING,
    norm: str = NORM,
    head: str | None = HEAD,
    more: Iterable[tuple[str, tuple[int, ...]]] = (),
) -> Tensors:
    """Weights of a decoder by the names of its parts. more: further tensors, name and shape."""
    shapes = {embedding: (TOKENS, WIDTH), norm: (WIDTH,)}
    shapes |= {head: (TOKENS, WIDTH)} if head else {}
    for layer in range(layers):
        shapes[f"{stack}{layer}.self_attn.q_proj.weight"] = (WIDTH, WIDTH)
        shapes[f"{stack}{layer}.mlp.up_proj.weight"] = (2 * WIDTH, WIDTH)
    return {name: tiny.normal(seed, name, shape, 0.05) for name, shape in {**shapes, **dict(more)}.items()}


def config(**changes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 4,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": TOKENS,
        **changes,
    }


def write(folder: Path, tensors: Mapping[str, npt.NDArray[Any]], settings: Mapping[str, Any]) -> Path:
    """A folder with one shard. float32 arrays are stored as bfloat16, float64 as float32, others unchanged."""
    folder.mkdir(parents=True)
    header: dict[str, object] = {}
    blobs: list[bytes] = []
    for name, tensor in tensors.items():
        stored = {"float32": "BF16", "float64": "F32"}.get(tensor.dtype.name)
        blob = tiny.stored(tensor, stored) if stored else tensor.tobytes()
        start = sum(map(len, blobs))
        header[name] = {
            "dtype": stored or _CODES[tensor.dtype.name],
            "shape": list(tensor.shape),
            "data_offsets": [start, start + len(blob)],
        }
        blobs.append(blob)
    tiny.write_raw_safetensors(folder / "model.safetensors", header, b"".join(blobs))
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def slerp(*folders: Path, **changes: Any) -> dict[str, Any]:
    models = [{"model": str(folder)} for folder in folders]
    base = models[0]["model"]
    return {"merge_method": "slerp", "base_model": base, "models": models, "parameters": {"t": 0.4}, **changes}


def slices(*ranges: tuple[Path, int, int], **changes: Any) -> dict[str, Any]:
    """A passthrough of layers first .. end of each folder."""
    pieces = [{"sources": [{"model": str(folder), "layer_range": [first, end]}]} for folder, first, end in ranges]
    return {"merge_method": "passthrough", "slices": pieces, **changes}


def settings(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def pair(folder: Path, *, more: Any = (), only_a: Any = (), only_b: Any = (), **names: Any) -> tuple[Path, Path]:
    settings = names.pop("config", {})
    found = []
    for letter, seed, extra in (("a", 1, only_a), ("b", 2, only_b)):
        tensors = decoder(seed, more=[*more, *extra], **names)
        found.append(write(folder / letter, tensors, config(**settings)))
    return found[0], found[1]


def merge(recipe: Any, out: Path) -> tuple[dict[str, torch.Tensor], arcmerge.MergeReport]:
    report = arcmerge.merge(recipe, out, warn=lambda sentence: None)
    return load_file(out / "model.safetensors"), report


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")
