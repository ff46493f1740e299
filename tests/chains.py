"""A Gemma-2 that answers with tokens that are known beforehand."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer


def chain(folder: Path, *tokens: str | int) -> Path:
    """Change the weights in `folder` so that each of `tokens` is followed by the next in a greedy answer.

    tokens: token ids, and texts that stand for their tokens. The hidden state of a token is one-hot, and the MLP of the
    first layer moves it on by one; other layers change nothing.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    numbers = [
        number
        for token in tokens
        for number in ([token] if isinstance(token, int) else tokenizer.encode(token, add_special_tokens=False).ids)
    ]
    path = folder / "model.safetensors"
    weights = {name: torch.zeros_like(weight) for name, weight in load_file(path).items()}
    assert len(set(numbers)) == len(numbers) <= json.loads((folder / "config.json").read_text())["hidden_size"]
    mlp = "model.layers.0.mlp."
    for place, number in enumerate(numbers):
        weights["model.embed_tokens.weight"][number, place] = 1
    for place in range(len(numbers) - 1):
        weights[f"{mlp}gate_proj.weight"][place, place] = weights[f"{mlp}up_proj.weight"][place, place] = 1
        weights[f"{mlp}down_proj.weight"][place + 1, place] = 1
    weights["model.layers.0.post_feedforward_layernorm.weight"][:] = 20
    path.chmod(0o644)
    save_file(weights, path, metadata={"format": "pt"})
    return folder
