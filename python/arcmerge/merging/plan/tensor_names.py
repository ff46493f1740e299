"""Tensor names: the place of a tensor in the network is all that tells what it is, whatever the architecture.

A checkpoint holds the stack of layers of its decoder, what lies around the stack (embeddings, norms, head), and beside
them perhaps towers and projectors for other media, layers for multi-token prediction, and buffers that any runtime
computes for itself.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import chain
from typing import Any

from arcmerge.checkpoint.reader import Checkpoint, TensorInfo
from arcmerge.merging.plan.config_layers import claimed_depths, predicted_layers

# Modules by the last part of their name, the likelier first; `.weight` follows.
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
# Names that other modules have too: the head is the one that has the rows of the embedding.
_HEADS_BY_ROWS = ("output", "head", "decoder", "out_proj", "ff_out", "linear", "proj", "vocab_projector", "logits")
_HEAD_BIASES = (*(f"{head}.bias" for head in _HEADS), "predictions.bias", "vocab_projector.bias")

_NUMBERED = re.compile(r"^(?P<prefix>(?:[^.]+\.)*?)(?P<number>0|[1-9][0-9]{0,5})\.(?P<rest>.+)$")
_TOWER = re.compile(
    r"visual|vision|image|img_|video|audio|speech|sound|protein|tower|multi_?modal|(?<!vocab_)projector|connector|aligner|resampler"
    r"|perceiver|q_?former|vqmodel|siglip|sam_model|^(?:clip|vit|vpm|apm|tts|dit|merger|talker|token2wav|code2wav|mm_.*)$"
)
_LANGUAGE_MODEL = {"language_model", "text_model", "llm", "lm", "thinker"}
_ENDS = re.compile(r"head|score|classif|reward|^output|^embed_out")
_PREDICTION = re.compile(r"^(?:mtp|nextn)")
# What a layer for multi-token prediction has beside that of a decoder layer: DeepSeek-V3, GLM-4.5 and their kin.
_PREDICTION_PARTS = ("eh_proj.", "enorm.", "hnorm.", "shared_head.")
_BUFFER = re.compile(r"(?:^|\.)(?:inv_freq|masked_bias|causal_mask|position_ids|cos_cached|sin_cached)$")
_MASK = re.compile(r"(?:^|\.)(?:attn|attention|self_attention|self_attn)\.bias$")


def split(name: str) -> tuple[str, int, str] | None:
    """(prefix, number, rest) of a tensor in a numbered row of modules, None for others."""
    match = _NUMBERED.match(name)
    return (match["prefix"], int(match["number"]), match["rest"]) if match else None


def is_tower(name: str) -> bool:
    """Whether a tensor belongs to a part for other media than text, by the words in front of its layer."""
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
    """Masks, positions and frequencies, which old checkpoints carry and every runtime computes for itself."""
    return bool(_BUFFER.search(tensor.name) or (_MASK.search(tensor.name) and len(tensor.shape) > 2))


def is_before(name: str) -> bool:
    """Whether a tensor outside the layers acts before the first of them."""
    module = name.split(".")[-2] if "." in name else name
    if "unembed" in name or module == "embedding_norm":  # LFM2's last norm
        return False
    return "embed" in name or module in ("wte", "wpe", "w")


def place(name: str) -> tuple[int | None, str, str]:
    """(layer, name within the layer, module) of a tensor; modules are self_attn, mlp, norm and what else there is."""
    if (found := split(name)) and "." in found[2] and not is_tower(name) and not is_prediction(name):
        kind = found[2].removesuffix(".weight")
        return found[1], kind, "norm" if "norm" in kind.split(".")[0] else kind.split(".")[0]
    kind = name.removeprefix("model.").removesuffix(".weight")
    return None, kind, kind


def tower_of(name: str) -> str:
    """The part beside the decoder that a tensor belongs to."""
    parts = name.split(".")
    word = next((position for position, part in enumerate(parts) if _TOWER.search(part)), int(parts[0] == "model"))
    return ".".join(parts[: word + 1])


def kind_of(name: str) -> str:
    """The name of a tensor without its layer."""
    found = split(name)
    return found[2] if found else name


class Names:
    """The tensor names of a checkpoint by their place in the network.

    stacks: prefixes of the numbered modules that may be the decoder's layers; one in a checkpoint that can be merged.
    layers, buffers: names within the layer, by layer. outer: the tensors around the layers by their role, which is the
    name behind the prefix that the decoder happens to have (`model.`, `transformer.`, none). head: not among them.
    towers, prediction: parts beside the decoder, by stored name. prediction_layers: as `layers`, behind the last.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors = checkpoint.tensors
        rows: dict[str, dict[int, set[str]]] = {}
        beside: list[str] = []
        for name in checkpoint.tensors:
            if (found := split(name)) and not is_tower(name) and not is_prediction(name):
                rows.setdefault(found[0], {}).setdefault(found[1], set()).add(found[2])
            else:
                beside.append(name)
        self.embedding = self._find_embedding(beside)
        self._home = _home(self.embedding)
        stacks = [prefix for prefix, row in rows.items() if any("." in rest for rest in chain(*row.values()))]
        self.stacks = tuple([prefix for prefix in stacks if prefix.startswith(self._home)] or stacks)
        self.prefix = self.stacks[0] if len(self.stacks) == 1 else ""
        stack = rows.pop(self.prefix) if len(self.stacks) == 1 else {}

        apart = tuple(prefix for prefix in stacks if prefix not in self.stacks)
        beside += [f"{prefix}{number}.{rest}" for prefix, row in rows.items() for number in row for rest in row[number]]
        order = {name: position for position, name in enumerate(checkpoint.tensors)}
        self.towers: list[str] = []
        self.prediction: list[str] = []
        self.outer_buffers: list[str] = []
        kept: list[str] = []
        for name in sorted(beside, key=order.__getitem__):
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
        for number, rests in stack.items():
            self.buffers[number] = {rest for rest in rests if is_buffer(self._tensors[self.in_layer(number, rest)])}
            self.layers[number] = rests - self.buffers[number]
        self.prediction_layers = self._take_prediction_layers(checkpoint.config)

    @property
    def depth(self) -> int:
        return len(self.layers)

    def in_layer(self, layer: int, rest: str) -> str:
        return f"{self.prefix}{layer}.{rest}"

    def stored(self, role: str, like: str) -> str:
        """The name of an outer tensor here, or what it would be. like: its name in another model."""
        return self.outer.get(role) or (role if like == role else f"{self._home}{role}")

    def role(self, name: str) -> str:
        """What an outer tensor is in the network, whatever prefix the decoder has."""
        return name.removeprefix(self._home)

    def layer_buffers(self) -> list[str]:
        return [self.in_layer(layer, rest) for layer, rests in self.buffers.items() for rest in sorted(rests)]

    def is_vocabulary(self, name: str) -> bool:
        """Whether the rows of a tensor outside the layers are the tokens of the vocabulary."""
        if name in (self.embedding, self.head):
            return True
        if name.endswith(_HEAD_BIASES) or (self.head and name == self.head.removesuffix("weight") + "bias"):
            return True
        # Layers for multi-token prediction have copies of both.
        if self.embedding is None or not name.endswith((".embed_tokens.weight", "head.weight")):
            return False
        return self._tensors[name].shape == self._tensors[self.embedding].shape

    def of_each_layer(self) -> list[str]:
        """Tensors that hold a part for each layer, or serve several, and so fit no other number or order of layers."""
        rows = Counter(_row(name) for name in self.outer.values())
        outer = [
            name
            for name in self.outer.values()
            if "per_layer" in name or (_row(name) and rows[_row(name)] % self.depth == 0)
        ]
        shared = [(layer, rest) for layer, rests in self.layers.items() for rest in rests if "shared_transf" in rest]
        return outer + [self.in_layer(layer, rest) for layer, rest in sorted(shared)]  # the latter of Zamba

    def _find_embedding(self, beside: Iterable[str]) -> str | None:
        modules: dict[str, str] = {}
        for name in beside:
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
        """Whether a tensor lies outside what is called the language model, and is no head either."""
        parts = self._home.split(".")
        called = [position for position, part in enumerate(parts) if part in _LANGUAGE_MODEL]
        language = parts[: called[-1] + 1] if called else []
        return name.split(".")[: len(language)] != language and not _ENDS.search(name.split(".")[0])

    def _take_prediction_layers(self, config: Mapping[str, Any]) -> dict[int, set[str]]:
        """Take layers for multi-token prediction, which follow those that config.json counts, out of the layers."""
        depths = claimed_depths(config).values()
        depth = max((depth for depth in depths if 0 < depth < self.depth), default=self.depth)
        last = sorted(number for number in self.layers if number >= depth)
        promised = predicted_layers(config) >= len(last)
        if self.depth in depths or not all(promised or self._predicts(number) for number in last):
            return {}
        for number in last:
            del self.buffers[number]
        return {number: self.layers.pop(number) for number in last}

    def _predicts(self, layer: int) -> bool:
        return any(rest.startswith(_PREDICTION_PARTS) for rest in self.layers[layer])


def _row(name: str) -> str | None:
    """The numbered modules or parameters that a tensor is one of."""
    found = split(f"{name}.weight")  # parameters end in their number
    return found[0] if found else None


def _home(embedding: str | None) -> str:
    """The prefix of the module that holds the embedding, and with it the decoder's other parts."""
    parts = embedding.split(".")[:-2] if embedding else []
    while parts and "embed" in parts[-1]:
        parts.pop()
    return "".join(f"{part}." for part in parts)
