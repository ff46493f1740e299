"""attn_implementation="arcmerge" equals eager attention in other architectures of transformers too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from accelerated import IDS, SETTINGS, assert_same, outcome
from arcmerge import ops
from arcmerge.integrations.transformers import register_attention

KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "llama, heads of 8": (LlamaForCausalLM, LlamaConfig, {"head_dim": 8}),
    "llama, dropout": (LlamaForCausalLM, LlamaConfig, {"attention_dropout": 0.5}),
    "llama, not causal": (LlamaForCausalLM, LlamaConfig, {"is_causal": False}),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"hidden_size": 64}),
    "qwen2, window": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"hidden_size": 64, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {}),
    "mistral without window": (MistralForCausalLM, MistralConfig, {"sliding_window": None}),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {}),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gemma3, both directions": (Gemma3ForCausalLM, Gemma3TextConfig, {"use_bidirectional_attention": True}),
    "phi3": (Phi3ForCausalLM, Phi3Config, {"hidden_size": 64}),
    "gpt-oss with sinks": (GptOssForCausalLM, GptOssConfig, {"num_local_experts": 2, "num_experts_per_tok": 1}),
}
MASK = torch.ones(2, IDS.shape[1], dtype=torch.int64)
LEFT, RIGHT, GAP = MASK.clone(), MASK.clone(), MASK.clone()
LEFT[0, :4], RIGHT[0, 7:], GAP[0, 3:5] = 0, 0, 0
PACKED = torch.tensor([[*range(4), *range(7)]])


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    with register_attention():
        yield


def of(kind: str, attention: str, dtype: torch.dtype = torch.float32) -> Any:
    model, config, changes = KINDS[kind]
    torch.manual_seed(0)
    made = model(config(**{**SETTINGS, **changes}, attn_implementation=attention))
    return made.to(dtype).eval()


def compare(kind: str, *functions: Callable[[Any], Any], tolerance: float = 1e-4, **how: Any) -> None:
    """Compare the results of functions of a model with arcmerge's and with eager attention."""
    eager, ours = of(kind, "eager", **how), of(kind, "arcmerge", **how)
    for function in functions:
        expected = outcome(function, eager)
        assert not isinstance(expected, str)
        assert_same(outcome(function, ours), expected, tolerance)


def stepped(cache_of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def steps(model: Any) -> Any:
        cache, found, start = cache_of(model), [], 0
        for count in (3, 1, 1, 4, 1, 1):
            found.append(model(IDS[:, start : start + count], past_key_values=cache).logits)
            start += count
        return [*found, cache]

    return steps


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_forward(kind: str) -> None:
    """Padding on either side and in between, packed sequences, weights, caches, generation."""
    causal = torch.zeros(1, 1, 11, 11).masked_fill(torch.ones(11, 11).triu(1).bool(), torch.finfo(torch.float32).min)
    compare(
        kind,
        *(
            lambda model, mask=mask: model(IDS, attention_mask=mask, output_hidden_states=True)
            for mask in (None, LEFT, RIGHT, GAP, causal)
        ),
        lambda model: model(IDS[:1], position_ids=PACKED, use_cache=False),
        lambda model: model(IDS, attention_mask=LEFT, output_attentions=True),
        lambda model: model(IDS, cu_seq_lens_q=torch.tensor([0, 4, 11]), max_length_q=7, is_causal=True),
        stepped(lambda model: DynamicCache(config=model.config)),
        stepped(lambda model: StaticCache(config=model.config, max_cache_len=24)),
        lambda model: model.generate(IDS, attention_mask=LEFT, max_new_tokens=6, num_beams=2),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_training(kind: str) -> None:
    def train(model: Any) -> Any:
        model.train()
        model(IDS, attention_mask=LEFT, labels=IDS).loss.backward()
        with torch.no_grad():
            loss = model(IDS, labels=IDS).loss  # with dropout
        return [loss, *(weight.grad for weight in model.parameters() if weight.grad is not None)]

    compare(kind, train)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3"])
def test_other_precisions(kind: str) -> None:
    def autocast(model: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(IDS, attention_mask=LEFT).logits

    def plain(model: Any) -> Any:
        return model(IDS, attention_mask=LEFT).logits

    compare(kind, autocast, tolerance=0.0)
    compare(kind, plain, tolerance=0.0, dtype=torch.float16)
    compare(kind, plain, tolerance=0.3, dtype=torch.bfloat16)


@torch.no_grad()
def test_two_registrations() -> None:
    """The name stays until the last registration is undone."""
    model = of("llama", "arcmerge")
    first, second = register_attention(), register_attention()
    first.undo()
    first.undo()
    second.undo()
    model(IDS)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3", "phi3", "qwen2, window"])
def test_the_op_runs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("attention", "attention_decode"):
        original = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *a, name=name, original=original, **k: called.append(name) or original(*a, **k)
        )
    model = of(kind, "arcmerge")
    for mask in (None, LEFT, RIGHT):
        called.clear()
        cache = model(IDS, attention_mask=mask).past_key_values
        model(IDS[:, :1], past_key_values=cache)
        assert called == ["attention"] * 2 + ["attention_decode"] * 2
