"""The weights of a Gemma-2, as they lie in its safetensors files: on the CPU mapped, not copied."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arcmerge.checkpoint.layout import OutputTensor
from arcmerge.checkpoint.reader import Checkpoint, TensorInfo
from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.config import Config

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Layer:
    """The eleven tensors of a decoder layer; projections are [outputs, inputs], norms are centred on zero."""

    input_layernorm: Tensor
    q_proj: Tensor
    k_proj: Tensor
    v_proj: Tensor
    o_proj: Tensor
    post_attention_layernorm: Tensor
    pre_feedforward_layernorm: Tensor
    gate_proj: Tensor
    up_proj: Tensor
    down_proj: Tensor
    post_feedforward_layernorm: Tensor


@dataclass(frozen=True)
class Weights:
    """embed_tokens [vocab_size, hidden_size] is the head too. checkpoint keeps the mapped files alive."""

    embed_tokens: Tensor
    layers: tuple[Layer, ...]
    norm: Tensor
    checkpoint: Checkpoint | None = None

    @property
    def tensors(self) -> list[Tensor]:
        return [self.embed_tokens, self.norm, *(tensor for layer in self.layers for tensor in vars(layer).values())]

    @property
    def nbytes(self) -> int:
        """Of all of them: what a decode step reads, but for the cache."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors)


def names(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint must hold, and its shape."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for number in range(config.num_hidden_layers):
        shapes |= {_name(number, field.name): _shape(config, field.name) for field in fields(Layer)}
    return {**shapes, "model.norm.weight": (config.hidden_size,)}


def load(checkpoint: Checkpoint, config: Config, dtype: torch.dtype, device: torch.device) -> Weights:
    """The weights of a checkpoint in one dtype on one device.

    A tensor that has the dtype already, on the CPU, is the mapped file itself; any other is converted, or copied.
    Raises ArcmergeError naming every tensor that is missing, of another shape, or not part of a Gemma-2. A head beside
    the embedding is left alone: Gemma-2's are tied.
    """
    require_tensors(checkpoint.folder, checkpoint.tensors, config)

    def get(name: str) -> Tensor:
        info = checkpoint.tensors[name]
        with warnings.catch_warnings():
            # torch warns that the file's pages cannot be written to; nothing writes to weights that are mapped.
            warnings.simplefilter("ignore", UserWarning)
            mapped = torch.frombuffer(checkpoint.tensor_bytes(name), dtype=DTYPES[info.dtype.name])
        return mapped.view(info.shape).to(device, dtype)

    return assemble(config, get, checkpoint)


def require_tensors(where: Path | str, found: Mapping[str, TensorInfo | OutputTensor], config: Config) -> None:
    """ArcmergeError unless these tensors, by name, are those of a Gemma-2 of this config; where: what holds them."""
    shapes, problems = names(config), []
    missing = [name for name in shapes if name not in found]
    if missing:
        problems.append(f"{_some(missing)} missing: download the model again.")
    for name, shape in shapes.items():
        if name in found and tuple(found[name].shape) != shape:
            problems.append(f"'{name}' must have the shape {shape} that config.json gives, has {found[name].shape}.")
    wrong = [name for name in shapes if name in found and found[name].dtype.name not in DTYPES]
    if wrong:
        problems.append(f"'{wrong[0]}' must be bfloat16, float16 or float32, is {found[wrong[0]].dtype.name}.")
    # Old checkpoints hold the frequencies of RoPE, which config.json gives.
    strange = [
        name for name in found if name not in shapes and name != HEAD and not name.endswith("rotary_emb.inv_freq")
    ]
    if strange:
        problems.append(f"{_some(strange)} not part of a Gemma-2 of this config.json.")
    if problems:
        raise ArcmergeError([f"{where}: {problem}" for problem in problems])
    if HEAD in found:
        warnings.warn(
            f"{where}: holds a '{HEAD}' of its own; Gemma-2 ties the head to the embedding, which serves "
            "as the head here, as in transformers.",
            stacklevel=4,
        )


def assemble(config: Config, get: Callable[[str], Tensor], checkpoint: Checkpoint | None = None) -> Weights:
    """Weights whose tensors come from `get`, by the names of the checkpoint."""

    def layer(number: int) -> Layer:
        tensors: dict[str, Any] = {field.name: get(_name(number, field.name)) for field in fields(Layer)}
        return Layer(**tensors)

    layers = tuple(layer(number) for number in range(config.num_hidden_layers))
    return Weights(get(EMBEDDING), layers, get("model.norm.weight"), checkpoint)


def _name(number: int, field: str) -> str:
    if field.endswith("layernorm"):
        part = field
    else:
        part = f"mlp.{field}" if field in ("gate_proj", "up_proj", "down_proj") else f"self_attn.{field}"
    return f"model.layers.{number}.{part}.weight"


def _shape(config: Config, field: str) -> tuple[int, ...]:
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    matrices = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    return matrices.get(field, (hidden,))


def _some(names: list[str]) -> str:
    rest = len(names) - 1
    return f"'{names[0]}' is" if not rest else f"'{names[0]}' and {rest} more are"
