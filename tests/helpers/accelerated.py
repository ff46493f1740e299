"""A tiny Gemma-2 of transformers, plain and accelerated, with a comparison of results and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from arcmerge.integrations.transformers import accelerate

VOCABULARY, WINDOW = 61, 6
IDS = torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(1))  # beyond the window
SETTINGS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": WINDOW,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def tiny(kind: Any = Gemma2ForCausalLM, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The same weights at every call."""
    torch.manual_seed(0)
    config = Gemma2Config(**{**SETTINGS, **changes}, attn_implementation="eager")
    return kind(config).to(dtype).eval()


def tensors(found: Any) -> list[Tensor]:
    """All tensors in outputs and caches of transformers, in order."""
    if isinstance(found, Tensor):
        return [found]
    if hasattr(found, "layers") and not isinstance(found, torch.nn.Module):
        return [states for layer in found.layers if layer.is_initialized for states in (layer.keys, layer.values)]
    inside = found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple) else ()
    return [tensor for part in inside for tensor in tensors(part)]


def outcome(function: Callable[[Any], Any], model: Any) -> list[Tensor] | str:
    """The tensors that a function returns, or its error."""
    try:
        torch.manual_seed(3)
        return tensors(function(model))
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]


def assert_same(found: list[Tensor] | str, expected: list[Tensor] | str, tolerance: float = 1e-4) -> None:
    """Equal within 1e-4, for float32 logits of about 30 before the softcap."""
    if isinstance(found, str) or isinstance(expected, str):
        assert found == expected
        return
    assert expected
    assert [(tensor.shape, tensor.dtype) for tensor in found] == [(other.shape, other.dtype) for other in expected]
    for tensor, other in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=tolerance, atol=tolerance, equal_nan=True)


def compare(function: Callable[[Any], Any], tolerance: float = 1e-4, **how: Any) -> list[Tensor] | str:
    """Compare `function` of a plain and of an accelerated model, and return the result."""
    expected, model = outcome(function, tiny(**how)), tiny(**how)
    with accelerate(model):
        assert_same(outcome(function, model), expected, tolerance)
    return expected
