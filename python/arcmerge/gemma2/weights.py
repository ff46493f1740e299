"""The weights of a Gemma-2: mapped from its safetensors files on the CPU, not copied."""

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
from arcmerge.errors import Problems, first_of
from arcmerge.gemma2.config import Gemma2Config

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
STORED_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Old checkpoints store the frequencies of RoPE, which follow from config.json.
_RECOMPUTED = "rotary_emb.inv_freq"
_PART_OF_A_LAYER = re.compile(r"(model\.)*layers\.")
# Weights that are multiplied with the same input: side by side in memory, they are one matrix on a GPU.
_SIDE_BY_SIDE = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


@dataclass(frozen=True)
class LayerWeights:
    """The eleven tensors of a decoder layer: projections [outputs, inputs]; norms [D], stored as weight - 1."""

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
    """All weights of a model.

    Attributes:
        embed_tokens, lm_head: [vocab_size, hidden_size]; the same object where they are tied, as in released models.
        layers: the weights of each decoder layer.
        norm: [hidden_size], of the final norm.
        checkpoint: keeps the mapped files open.
    """

    embed_tokens: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    lm_head: Tensor
    checkpoint: Checkpoint | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor once."""
        own = [] if self.lm_head is self.embed_tokens else [self.lm_head]
        layers = (tensor for layer in self.layers for tensor in vars(layer).values())
        return [self.embed_tokens, *own, self.norm, *layers]

    @property
    def nbytes(self) -> int:
        """Bytes of weights that a decoding step reads, without an untied embedding, of which it reads few rows."""
        read = self.tensors if self.lm_head is self.embed_tokens else self.tensors[1:]
        return sum(tensor.numel() * tensor.element_size() for tensor in read)

    def require_read(self) -> None:
        """Raise ArcmergeError if mapped weights could not be read from their file; results since then are invalid."""
        if self.checkpoint is not None:
            self.checkpoint.require_read()


def tensor_shapes(config: Gemma2Config) -> dict[str, tuple[int, ...]]:
    """The name, as in transformers' Gemma2ForCausalLM, and the shape of every tensor that a checkpoint must have."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for index in range(config.num_hidden_layers):
        shapes |= {_name(index, field.name): _shape(config, field.name) for field in fields(LayerWeights)}
    shapes["model.norm.weight"] = (config.hidden_size,)
    return shapes if config.tie_word_embeddings else {**shapes, LM_HEAD: shapes[EMBEDDING]}


def load(checkpoint: Checkpoint, config: Gemma2Config, dtype: torch.dtype, device: torch.device) -> Weights:
    """The weights of a checkpoint in one dtype on one device.

    On the CPU, tensors that are stored in `dtype` are mapped; all others are converted or copied. On a GPU, q, k and v
    of a layer lie side by side in memory, and gate and up. As in transformers,
    an lm_head in the files is used if it differs from the embedding, whatever config.json says.

    Raises:
        ArcmergeError: see `find_tensors`.
    """
    stored = find_tensors(checkpoint.folder, checkpoint.tensors, config)

    def get(name: str) -> Tensor:
        info = checkpoint.tensors[stored[name]]
        with warnings.catch_warnings():
            # torch warns that the mapped pages are read-only; nothing writes to mapped weights.
            warnings.simplefilter("ignore", UserWarning)
            mapped = torch.frombuffer(checkpoint.tensor_bytes(stored[name]), dtype=STORED_DTYPES[info.dtype.name])
        return mapped.view(info.shape).to(device, dtype)

    weights = assemble(config, get, LM_HEAD in stored, checkpoint)
    if device.type == "cuda":
        weights = replace(weights, layers=tuple(map(_side_by_side, weights.layers)))
    checkpoint.require_read()
    if weights.lm_head is not weights.embed_tokens and torch.equal(weights.lm_head, weights.embed_tokens):
        return replace(weights, lm_head=weights.embed_tokens)
    if weights.lm_head is not weights.embed_tokens:
        advice = "; set 'tie_word_embeddings' to false in config.json" if config.tie_word_embeddings else ""
        warnings.warn(
            f"{checkpoint.folder}: '{LM_HEAD}' differs from the embedding, which released Gemma-2 models use as their "
            f"lm_head; it is used, as in transformers{advice}",
            stacklevel=3,
        )
    return weights


def _side_by_side(layer: LayerWeights) -> LayerWeights:
    parts: dict[str, Any] = {}
    for group in _SIDE_BY_SIDE:
        tensors = [getattr(layer, name) for name in group]
        parts |= zip(group, torch.cat(tensors).split([len(tensor) for tensor in tensors]), strict=True)
    return replace(layer, **parts)


def neighbours(names: Collection[str]) -> list[tuple[str, ...]]:
    """Those of the names of tensors, in groups, that should lie side by side in memory."""
    groups = []
    for group in _SIDE_BY_SIDE:
        for name in names:
            before, found, after = name.rpartition(group[0])
            members = tuple(before + part + after for part in group)
            if found and all(member in names for member in members):
                groups.append(members)
    return groups


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The name of the dtype in which most bytes of a checkpoint are stored."""
    counts: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        counts[info.dtype.name] = counts.get(info.dtype.name, 0) + info.nbytes
    return max(counts, key=lambda name: counts[name])


def find_tensors(
    place: Path | str, found: Mapping[str, TensorInfo | OutputTensor], config: Gemma2Config
) -> dict[str, str]:
    """Find the tensors of a Gemma-2 among those of a checkpoint.

    The prefix "model." may be missing, as in checkpoints of the base model class, and other prefixes may precede it, as
    in those of wrappers. An lm_head replaces a missing embedding where config.json ties the two. Tensors that belong to
    no Gemma-2 are ignored with a warning.

    Args:
        place: of the tensors, for messages.
        found: every tensor by its name.
        config: of the model.

    Returns:
        The name in `found` by the name in `tensor_shapes`.

    Raises:
        ArcmergeError: naming every tensor that is missing, has another shape or dtype, or is part of a layer and not
            known.
    """
    shapes, problems = tensor_shapes(config), Problems()
    stored, unknown = _full_names(found, {*shapes, LM_HEAD})
    if config.tie_word_embeddings and LM_HEAD in stored and EMBEDDING not in stored:
        stored[EMBEDDING] = stored.pop(LM_HEAD)
    missing = [name for name in shapes if name not in stored]
    if missing == [LM_HEAD]:
        problems.add(
            f"{place}: '{LM_HEAD}' must be in the checkpoint where tie_word_embeddings in config.json is false, got "
            "none; download the model again, or set it to true if the embedding is the lm_head"
        )
    elif missing:
        problems.add(f"{place}: {first_of(missing)} must be in the checkpoint, got none; download the model again")
    for name, shape in {**shapes, LM_HEAD: shapes[EMBEDDING]}.items():
        if name in stored and tuple(found[stored[name]].shape) != shape:
            problems.add(
                f"{place}: '{stored[name]}' must have the shape {shape} of config.json, got {found[stored[name]].shape}"
            )
    wrong = [name for name in stored.values() if found[name].dtype.name not in STORED_DTYPES]
    if wrong:
        problems.add(
            f"{place}: {first_of(wrong)} must be bfloat16, float16 or float32, got {found[wrong[0]].dtype.name}"
        )
    if parts := [name for name in unknown if _PART_OF_A_LAYER.match(name)]:
        problems.add(f"{place}: the layers must have only the tensors of a Gemma-2, got {first_of(parts)} too")
    problems.raise_if_any()
    if unknown:
        warnings.warn(f"{place}: ignored {first_of(unknown)}, which no Gemma-2 has", stacklevel=4)
    return stored


def _full_names(found: Iterable[str], known: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """The names in `found` by the names in `known` that they match, and the names that match none.

    Of two that match the same name, the one with the shorter prefix counts.
    """
    ranked: list[tuple[int, bool, str, str]] = []
    unknown = []
    for name in found:
        parts = name.split(".")
        ends = ((start, ".".join(parts[start:])) for start in range(len(parts)))
        whole = ((start, full != end, full) for start, end in ends for full in (end, f"model.{end}") if full in known)
        if first := next(whole, None):
            ranked.append((*first, name))
        elif not name.endswith(_RECOMPUTED):
            unknown.append(name)
    stored: dict[str, str] = {}
    for *_, full, name in sorted(ranked):
        if stored.setdefault(full, name) != name:
            unknown.append(name)
    return stored, unknown


def assemble(
    config: Gemma2Config, get: Callable[[str], Tensor], has_lm_head: bool = False, checkpoint: Checkpoint | None = None
) -> Weights:
    """Weights whose tensors `get` returns by their names in `tensor_shapes`; has_lm_head: the head is untied."""

    def layer(index: int) -> LayerWeights:
        tensors: dict[str, Any] = {field.name: get(_name(index, field.name)) for field in fields(LayerWeights)}
        return LayerWeights(**tensors)

    layers = tuple(layer(index) for index in range(config.num_hidden_layers))
    embedding = get(EMBEDDING)
    return Weights(embedding, layers, get("model.norm.weight"), get(LM_HEAD) if has_lm_head else embedding, checkpoint)


def _name(index: int, field: str) -> str:
    if field.endswith("layernorm"):
        part = field
    else:
        part = f"mlp.{field}" if field in ("gate_proj", "up_proj", "down_proj") else f"self_attn.{field}"
    return f"model.layers.{index}.{part}.weight"


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
