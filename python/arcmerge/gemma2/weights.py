"""The weights of a Gemma-2, as they lie in its safetensors files: on the CPU mapped, not copied."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arcmerge.checkpoint.header import TensorInfo
from arcmerge.checkpoint.layout import OutputTensor
from arcmerge.checkpoint.reader import Checkpoint
from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.config import Gemma2Config

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Old checkpoints hold the frequencies of RoPE, which config.json gives.
_RECOMPUTED = "rotary_emb.inv_freq"
_PART_OF_A_LAYER = re.compile(r"(model\.)*layers\.")


@dataclass(frozen=True)
class LayerWeights:
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
    """embed_tokens, head: [vocab_size, hidden_size]; one and the same tensor where they are tied, as Gemma-2's are.

    checkpoint keeps the mapped files alive.
    """

    embed_tokens: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor
    checkpoint: Checkpoint | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, each once."""
        own = [] if self.head is self.embed_tokens else [self.head]
        layers = (tensor for layer in self.layers for tensor in vars(layer).values())
        return [self.embed_tokens, *own, self.norm, *layers]

    @property
    def nbytes(self) -> int:
        """Of what a decode step reads, but for the cache; of an embedding that is not the head it reads few rows."""
        read = self.tensors if self.head is self.embed_tokens else self.tensors[1:]
        return sum(tensor.numel() * tensor.element_size() for tensor in read)

    def require_read(self) -> None:
        """ArcmergeError if weights that are mapped from a file could not be read: what was computed is void."""
        if self.checkpoint is not None:
            self.checkpoint.require_read()


def names(config: Gemma2Config) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint must hold, and its shape, by its name in transformers' Gemma2ForCausalLM."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for number in range(config.num_hidden_layers):
        shapes |= {_name(number, field.name): _shape(config, field.name) for field in fields(LayerWeights)}
    shapes["model.norm.weight"] = (config.hidden_size,)
    return shapes if config.tie_word_embeddings else {**shapes, HEAD: shapes[EMBEDDING]}


def load(checkpoint: Checkpoint, config: Gemma2Config, dtype: torch.dtype, device: torch.device) -> Weights:
    """The weights of a checkpoint in one dtype on one device.

    A tensor that has the dtype already, on the CPU, is the mapped file itself; any other is converted, or copied.
    A head in the files is used if it differs from the embedding, whatever config.json says, as in transformers.
    Raises what find_tensors raises.
    """
    stored = find_tensors(checkpoint.folder, checkpoint.tensors, config)

    def get(name: str) -> Tensor:
        info = checkpoint.tensors[stored[name]]
        with warnings.catch_warnings():
            # torch warns that the file's pages cannot be written to; nothing writes to weights that are mapped.
            warnings.simplefilter("ignore", UserWarning)
            mapped = torch.frombuffer(checkpoint.tensor_bytes(stored[name]), dtype=DTYPES[info.dtype.name])
        return mapped.view(info.shape).to(device, dtype)

    weights = assemble(config, get, HEAD in stored, checkpoint)
    checkpoint.require_read()
    if weights.head is not weights.embed_tokens and torch.equal(weights.head, weights.embed_tokens):
        return replace(weights, head=weights.embed_tokens)
    if weights.head is not weights.embed_tokens:
        advice = ": set tie_word_embeddings to false" if config.tie_word_embeddings else ""
        warnings.warn(
            f"{checkpoint.folder}: '{HEAD}' differs from the embedding, which is every released Gemma-2's head; "
            f"it is used as the head, as in transformers{advice}.",
            stacklevel=3,
        )
    return weights


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The name of the dtype that most bytes of a checkpoint are stored in."""
    counts: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        counts[info.dtype.name] = counts.get(info.dtype.name, 0) + info.nbytes
    return max(counts, key=lambda name: counts[name])


def find_tensors(
    where: Path | str, found: Mapping[str, TensorInfo | OutputTensor], config: Gemma2Config
) -> dict[str, str]:
    """The name in `found` of every tensor of a Gemma-2 of this config, by the name that `names` has for it.

    The prefix "model." may be missing, as in checkpoints of the base model class, and others may stand before it, as of
    wrappers. Where config.json ties the two, a head stands for an embedding that is missing.
    where: what holds the tensors. Raises ArcmergeError naming every tensor that is missing, of another shape or dtype,
    or a part of a layer that Gemma-2's have not. Any other tensor is left out, with a warning.
    """
    shapes, problems = names(config), []
    stored, strange = _full_names(found, {*shapes, HEAD})
    if config.tie_word_embeddings and HEAD in stored and EMBEDDING not in stored:
        stored[EMBEDDING] = stored.pop(HEAD)
    missing = [name for name in shapes if name not in stored]
    if missing == [HEAD]:
        problems.append(
            f"'{HEAD}' is missing, which config.json promises by tie_word_embeddings false: download the model again, "
            "or set it to true if the embedding is the head."
        )
    elif missing:
        problems.append(f"{_some(missing)} missing: download the model again.")
    for name, shape in {**shapes, HEAD: shapes[EMBEDDING]}.items():
        if name in stored and tuple(found[stored[name]].shape) != shape:
            problems.append(
                f"'{stored[name]}' must have the shape {shape} that config.json gives, has {found[stored[name]].shape}."
            )
    wrong = [name for name in stored.values() if found[name].dtype.name not in DTYPES]
    if wrong:
        problems.append(f"'{wrong[0]}' must be bfloat16, float16 or float32, is {found[wrong[0]].dtype.name}.")
    if parts := [name for name in strange if _PART_OF_A_LAYER.match(name)]:
        problems.append(f"{_some(parts)} not part of a Gemma-2 of this config.json.")
    if problems:
        raise ArcmergeError([f"{where}: {problem}" for problem in problems])
    if strange:
        warnings.warn(f"{where}: {_some(strange)} not part of a Gemma-2, and left out.", stacklevel=4)
    return stored


def _full_names(found: Iterable[str], known: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """The names in `found` by those in `known` that they stand for, and the names that stand for none.

    Of two that stand for the same, the one with fewer parts before it does.
    """
    ranked: list[tuple[int, bool, str, str]] = []
    strange = []
    for name in found:
        parts = name.split(".")
        ends = ((start, ".".join(parts[start:])) for start in range(len(parts)))
        whole = ((start, full != end, full) for start, end in ends for full in (end, f"model.{end}") if full in known)
        if first := next(whole, None):
            ranked.append((*first, name))
        elif not name.endswith(_RECOMPUTED):
            strange.append(name)
    stored: dict[str, str] = {}
    for *_, full, name in sorted(ranked):
        if stored.setdefault(full, name) != name:
            strange.append(name)
    return stored, strange


def assemble(
    config: Gemma2Config, get: Callable[[str], Tensor], own_head: bool = False, checkpoint: Checkpoint | None = None
) -> Weights:
    """Weights whose tensors come from `get`, by the names that `names` has. own_head: the head is one of them."""

    def layer(number: int) -> LayerWeights:
        tensors: dict[str, Any] = {field.name: get(_name(number, field.name)) for field in fields(LayerWeights)}
        return LayerWeights(**tensors)

    layers = tuple(layer(number) for number in range(config.num_hidden_layers))
    embedding = get(EMBEDDING)
    return Weights(embedding, layers, get("model.norm.weight"), get(HEAD) if own_head else embedding, checkpoint)


def _name(number: int, field: str) -> str:
    if field.endswith("layernorm"):
        part = field
    else:
        part = f"mlp.{field}" if field in ("gate_proj", "up_proj", "down_proj") else f"self_attn.{field}"
    return f"model.layers.{number}.{part}.weight"


def _shape(config: Gemma2Config, field: str) -> tuple[int, ...]:
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
