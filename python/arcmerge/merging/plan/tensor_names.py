"""Tensor names: a tensor's role in the network follows from its name, without a table of architectures.

A checkpoint has the stack of layers of its decoder and the tensors around the stack (embeddings, norms, head). It may
also have towers and projectors for other media, layers for multi-token prediction, and buffers that every runtime
computes itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import chain
from typing import Any

from arcmerge.checkpoint.header import TensorInfo
from arcmerge.checkpoint.reader import Checkpoint
from arcmerge.merging.plan.config_layers import claimed_depths, predicted_layers

# Last parts of the names of modules, in the order in which they are searched; `.weight` follows.
_EMBEDDINGS = (
    "embed_tokens",
    "word_embeddings",
    "wte",
    "embed_in",
    "tok_embeddings",
    "token_embeddings",
    "token_embedding",
    "tokens_embed",
    "word_embedding",
    "input_embedding",
    "embeddings",
    "embedding",
    "embed",
    "shared",
    "w",
)
_HEADS = (
    "lm_head",
    "embed_out",
    "output_layer",
    "output_projection",
    "generator_lm_head",
    "proj_out",
    "lm_loss",
    "unembed",
)
# Names that other modules have too. The head is the module with as many rows as the embedding.
_HEADS_BY_ROWS = ("output", "head", "decoder", "out_proj", "ff_out", "linear", "proj", "vocab_projector", "logits")
_HEAD_BIASES = (*(f"{head}.bias" for head in _HEADS), "predictions.bias", "vocab_projector.bias")

_INDEXED = re.compile(r"^(?P<prefix>(?:[^.]+\.)*?)(?P<index>0|[1-9][0-9]{0,5})\.(?P<rest>.+)$")
_TOWER = re.compile(
    r"visual|vision|image|img_|video|audio|speech|sound|protein|tower|multi_?modal|(?<!vocab_)projector|connector|aligner|resampler"
    r"|perceiver|q_?former|vqmodel|siglip|sam_model|^(?:clip|vit|vpm|apm|tts|dit|merger|talker|token2wav|code2wav|mm_.*)$"
)
_LANGUAGE_MODEL = {"language_model", "text_model", "llm", "lm", "thinker"}
_ENDS = re.compile(r"head|score|classif|reward|^output|^embed_out")
_PREDICTION = re.compile(r"^(?:mtp|nextn)")
# Tensors of layers for multi-token prediction that decoder layers do not have, as in DeepSeek-V3 and GLM-4.5.
_PREDICTION_PARTS = ("eh_proj.", "enorm.", "hnorm.", "shared_head.")
_BUFFER = re.compile(r"(?:^|\.)(?:inv_freq|masked_bias|causal_mask|position_ids|cos_cached|sin_cached)$")
_MASK = re.compile(r"(?:^|\.)(?:attn|attention|self_attention|self_attn)\.bias$")


def split(name: str) -> tuple[str, int, str] | None:
    """(prefix, index, rest) of a tensor in an indexed list of modules, None for other tensors."""
    match = _INDEXED.match(name)
    return (match["prefix"], int(match["index"]), match["rest"]) if match else None


def is_tower(name: str) -> bool:
    """Whether a tensor belongs to a part for other media than text, by the words before its layer index."""
    return _has(_TOWER, _outside(name))


def is_prediction(name: str) -> bool:
    """Whether a tensor belongs to modules for multi-token prediction, which runtimes may leave out."""
    return _has(_PREDICTION, _outside(name))


def _outside(name: str) -> str:
    found = split(name)
    return found[0] if found else name


@lru_cache(maxsize=4096)
def _has(word: re.Pattern[str], path: str) -> bool:
    return any(word.search(part) for part in path.split("."))


def is_buffer(tensor: TensorInfo) -> bool:
    """Whether a tensor has masks, positions or frequencies: old checkpoints store them, runtimes compute them."""
    return bool(_BUFFER.search(tensor.name) or (_MASK.search(tensor.name) and len(tensor.shape) > 2))


def is_before(name: str) -> bool:
    """Whether a tensor outside the layers acts before the first of them."""
    module = name.split(".")[-2] if "." in name else name
    if "unembed" in name or module == "embedding_norm":  # LFM2's last norm
        return False
    return "embed" in name or module in ("wte", "wpe", "w")


def place(name: str) -> tuple[int | None, str, str]:
    """(layer, name in the layer, module) of a tensor. Modules are self_attn, mlp, norm and others."""
    if (found := split(name)) and "." in found[2] and not is_tower(name) and not is_prediction(name):
        kind = found[2].removesuffix(".weight")
        return found[1], kind, "norm" if "norm" in kind.split(".")[0] else kind.split(".")[0]
    kind = name.removeprefix("model.").removesuffix(".weight")
    return None, kind, kind


def tower_of(name: str) -> str:
    """The name of the part outside the decoder that a tensor belongs to."""
    parts = name.split(".")
    word = next((position for position, part in enumerate(parts) if _TOWER.search(part)), int(parts[0] == "model"))
    return ".".join(parts[: word + 1])


def kind_of(name: str) -> str:
    """The name of a tensor without its layer."""
    found = split(name)
    return found[2] if found else name


class TensorNames:
    """The tensor names of a checkpoint by their role in the network.

    Attributes:
        stacks: prefixes of the indexed modules that may be the decoder's layers; checkpoints that can be merged have
            one.
        prefix: the prefix of the layers, empty if there are several stacks.
        embedding, head: stored names, None if there is none.
        layers, buffers: names in the layer, by the index of the layer.
        outer: stored names of the tensors around the layers except for the head, by role. The role is the name without
            the prefix of the decoder (`model.`, `transformer.`, none).
        outer_buffers, towers, prediction: stored names of the parts outside the decoder.
        prediction_layers: as `layers`, for layers for multi-token prediction after the last layer.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors = checkpoint.tensors
        rows: dict[str, dict[int, set[str]]] = {}
        outside: list[str] = []
        for name in checkpoint.tensors:
            if (found := split(name)) and not is_tower(name) and not is_prediction(name):
                rows.setdefault(found[0], {}).setdefault(found[1], set()).add(found[2])
            else:
                outside.append(name)
        self.embedding = self._find_embedding(outside)
        self._home = _home(self.embedding)
        stacks = [prefix for prefix, row in rows.items() if any("." in rest for rest in chain(*row.values()))]
        self.stacks = tuple([prefix for prefix in stacks if prefix.startswith(self._home)] or stacks)
        self.prefix = self.stacks[0] if len(self.stacks) == 1 else ""
        stack = rows.pop(self.prefix) if len(self.stacks) == 1 else {}

        apart = tuple(prefix for prefix in stacks if prefix not in self.stacks)
        outside += [f"{prefix}{index}.{rest}" for prefix, row in rows.items() for index in row for rest in row[index]]
        order = {name: position for position, name in enumerate(checkpoint.tensors)}
        self.towers: list[str] = []
        self.prediction: list[str] = []
        self.outer_buffers: list[str] = []
        kept: list[str] = []
        for name in sorted(outside, key=order.__getitem__):
            if is_prediction(name):
                self.prediction.append(name)
            elif is_tower(name) or (apart and name.startswith(apart)) or self._is_foreign(name):
                self.towers.append(name)
            elif is_buffer(self._tensors[name]):
                self.outer_buffers.append(name)
            else:
                kept.append(name)
        self.head = self._find_head(kept)
        self.outer: dict[str, str] = {}
        for name in kept:
            role = self.role(name)
            if name != self.head:
                self.outer[name if role in self.outer else role] = name

        self.layers: dict[int, set[str]] = {}
        self.buffers: dict[int, set[str]] = {}
        for layer, rests in stack.items():
            self.buffers[layer] = {rest for rest in rests if is_buffer(self._tensors[self.in_layer(layer, rest)])}
            self.layers[layer] = rests - self.buffers[layer]
        self.prediction_layers = self._take_prediction_layers(checkpoint.config)

    @property
    def depth(self) -> int:
        return len(self.layers)

    def in_layer(self, layer: int, rest: str) -> str:
        return f"{self.prefix}{layer}.{rest}"

    def stored(self, role: str, like: str) -> str:
        """The stored name of an outer tensor, or the name it would have. like: its name in another model."""
        return self.outer.get(role) or (role if like == role else f"{self._home}{role}")

    def role(self, name: str) -> str:
        """The role of an outer tensor: its name without the prefix of the decoder."""
        return name.removeprefix(self._home)

    def layer_buffers(self) -> list[str]:
        return [self.in_layer(layer, rest) for layer, rests in self.buffers.items() for rest in sorted(rests)]

    def is_vocabulary(self, name: str) -> bool:
        """Whether a tensor outside the layers has one row for each token of the vocabulary."""
        if name in (self.embedding, self.head):
            return True
        if name.endswith(_HEAD_BIASES) or (self.head and name == self.head.removesuffix("weight") + "bias"):
            return True
        # Layers for multi-token prediction have copies of the embedding and the head.
        if self.embedding is None or not name.endswith((".embed_tokens.weight", "head.weight")):
            return False
        return self._tensors[name].shape == self._tensors[self.embedding].shape

    def of_each_layer(self) -> list[str]:
        """Tensors with a part for each layer or shared by layers, which fit no other number or order of layers."""
        rows = Counter(_row(name) for name in self.outer.values())
        outer = [
            name
            for name in self.outer.values()
            if "per_layer" in name or (_row(name) and rows[_row(name)] % self.depth == 0)
        ]
        shared = [(layer, rest) for layer, rests in self.layers.items() for rest in rests if "shared_transf" in rest]
        return outer + [self.in_layer(layer, rest) for layer, rest in sorted(shared)]  # shared: as in Zamba

    def _find_embedding(self, outside: Iterable[str]) -> str | None:
        modules: dict[str, str] = {}
        for name in outside:
            if name.endswith(".weight") and not split(name) and not is_tower(name) and not is_prediction(name):
                modules.setdefault(name.split(".")[-2], name)
        return next((modules[module] for module in _EMBEDDINGS if module in modules), None)

    def _find_head(self, outer: Iterable[str]) -> str | None:
        modules: dict[str, str] = {}
        for name in outer:
            if name.endswith(".weight") and name != self.embedding:
                modules.setdefault(name.split(".")[-2], name)
        if named := next((modules[module] for module in _HEADS if module in modules), None):
            return named
        rows = self._tensors[self.embedding].shape[:1] if self.embedding else None
        alike = [modules[module] for module in _HEADS_BY_ROWS if module in modules]
        return next((name for name in alike if self._tensors[name].shape[:1] == rows), None)

    def _is_foreign(self, name: str) -> bool:
        """Whether a tensor is neither in the module of the language model nor a head."""
        parts = self._home.split(".")
        called = [position for position, part in enumerate(parts) if part in _LANGUAGE_MODEL]
        language = parts[: called[-1] + 1] if called else []
        return name.split(".")[: len(language)] != language and not _ENDS.search(name.split(".")[0])

    def _take_prediction_layers(self, config: Mapping[str, Any]) -> dict[int, set[str]]:
        """Remove layers for multi-token prediction, which follow those that config.json counts, from the layers."""
        depths = claimed_depths(config).values()
        depth = max((depth for depth in depths if 0 < depth < self.depth), default=self.depth)
        last = sorted(layer for layer in self.layers if layer >= depth)
        promised = predicted_layers(config) >= len(last)
        if self.depth in depths or not all(promised or self._predicts(layer) for layer in last):
            return {}
        for layer in last:
            del self.buffers[layer]
        return {layer: self.layers.pop(layer) for layer in last}

    def _predicts(self, layer: int) -> bool:
        return any(rest.startswith(_PREDICTION_PARTS) for rest in self.layers[layer])


def _row(name: str) -> str | None:
    """The prefix of the indexed modules or parameters that a tensor belongs to."""
    found = split(f"{name}.weight")  # the names of indexed parameters end in the index
    return found[0] if found else None


def _home(embedding: str | None) -> str:
    """The prefix of the module that contains the embedding and the decoder's other parts."""
    parts = embedding.split(".")[:-2] if embedding else []
    while parts and "embed" in parts[-1]:
        parts.pop()
    return "".join(f"{part}." for part in parts)
