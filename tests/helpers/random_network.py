"""Networks of any shape with random weights, created on a device."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from arcmerge.gemma2.config import Gemma2Config
from arcmerge.gemma2.runtime.network import Network
from arcmerge.gemma2.weights import EMBEDDING, assemble, tensor_shapes
from cases.gemma import Shape

TINY = Shape("tiny", 64, 2, 2, 1, 128, 96, 128, vocabulary=300, sliding_window=8)


def config_of(shape: Shape, **changes: object) -> Gemma2Config:
    """The configuration of a model of this shape, with changes by the names of config.json."""
    settings = {
        "model_type": "gemma2",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "query_pre_attn_scalar": shape.query_pre_attn_scalar,
        "vocab_size": shape.vocabulary,
        "sliding_window": shape.sliding_window,
        **changes,
    }
    return Gemma2Config.read(settings, Path("config.json"))


def random_network(config: Gemma2Config, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> Network:
    """The same weights for the same configuration, dtype and kind of device."""
    shapes = tensor_shapes(config)
    generator = torch.Generator(device).manual_seed(0)

    def get(name: str) -> Tensor:
        shape = shapes[name]
        # Products keep the spread of their inputs; norms stay near 1. Embeddings are small compared with the output of
        # layers, or every token would be followed by itself, as the head is tied to them.
        scale = shape[1] ** -0.5 if len(shape) == 2 else 0.1
        scale *= 0.1 if name == EMBEDDING else 1.0
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, scale, generator=generator)

    return Network(config, assemble(config, get), stepwise=False)
