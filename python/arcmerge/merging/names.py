"""Tensor names: the place of a tensor in the network is all that tells what it is, whatever the architecture."""

from __future__ import annotations

import re

from arcmerge.checkpoint.reader import Checkpoint

EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"

_LAYER = re.compile(r"^(?P<prefix>(?:.*\.)?layers\.)(?P<layer>0|[1-9][0-9]*)\.(?P<rest>.+)$")
# Buffers that old checkpoints carry and every runtime computes for itself.
_RECOMPUTED = ("rotary_emb.inv_freq",)


def is_vocabulary(name: str) -> bool:
    """Whether the rows of a tensor are the tokens of the vocabulary."""
    return name.endswith((EMBEDDING, HEAD, "lm_head.bias"))


def place(name: str) -> tuple[int | None, str, str]:
    """(layer, name within the layer, module) of a tensor; modules are self_attn, mlp, norm and what else there is."""
    if match := _LAYER.match(name):
        kind = match["rest"].removesuffix(".weight")
        return int(match["layer"]), kind, "norm" if "norm" in kind.split(".")[0] else kind.split(".")[0]
    kind = name.removeprefix("model.").removesuffix(".weight")
    return None, kind, kind


class Names:
    """The tensor names of a checkpoint by their place in the network."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.layers: dict[int, set[str]] = {}
        self.outer: list[str] = []
        prefixes: dict[str, None] = {}
        for name in checkpoint.tensors:
            if name.endswith(_RECOMPUTED):
                continue
            if match := _LAYER.match(name):
                prefixes[match["prefix"]] = None
                self.layers.setdefault(int(match["layer"]), set()).add(match["rest"])
            else:
                self.outer.append(name)
        self.prefixes = tuple(prefixes)

    def in_layer(self, layer: int, rest: str) -> str:
        return f"{self.prefixes[0]}{layer}.{rest}"

    def embedding(self) -> str | None:
        return next((name for name in self.outer if name.endswith(EMBEDDING)), None)
