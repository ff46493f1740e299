"""Every argument of the forward of transformers' Gemma-2 gives the same results when accelerated."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma2ForCausalLM,
    Gemma2ForSequenceClassification,
    Gemma2ForTokenClassification,
    Gemma2Model,
    StaticCache,
)
from transformers.utils.generic import TransformersKwargs

from accelerated import IDS, WINDOW, compare
from arcmerge import ops

F32 = torch.float32
LENGTH = IDS.shape[1]


pytestmark = pytest.mark.usefixtures("one_thread")


def mask_of(*lengths: int, left: bool = True) -> Tensor:
    mask = torch.zeros(len(lengths), LENGTH, dtype=torch.int64)
    for row, length in enumerate(lengths):
        mask[row, slice(LENGTH - length, None) if left else slice(0, length)] = 1
    return mask


def added(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(F32).min)


CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
GAPS = torch.ones(2, LENGTH, dtype=torch.int64)
GAPS[0, 4:6] = 0
EMBEDDED = torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(2))
PACKED = torch.tensor([[*range(4), *range(7)]]).expand(2, -1)


def steps(cache_of: Callable[[Any], Any], *counts: int, **named: Any) -> Callable[[Any], Any]:
    """Chunks of these many tokens with a cache: all logits, and the final states of the cache."""

    def run(model: Any) -> Any:
        cache, found, start = cache_of(model), [], 0
        for count in counts:
            piece = IDS[:1, start : start + count]
            found.append(model(piece, past_key_values=cache, **named).logits)
            start += count
        return [*found, cache]

    return run


def dynamic(model: Any) -> DynamicCache:
    return DynamicCache(config=model.config)


def static(model: Any) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=24)


def forward(**named: Any) -> Callable[[Any], Any]:
    return lambda model: model(**{"input_ids": IDS, **named})


# For each argument, calls that it changes.
CALLS: dict[str, list[Callable[[Any], Any]]] = {
    "input_ids": [forward(input_ids=IDS[:rows, :tokens]) for rows in (1, 2) for tokens in (1, WINDOW, WINDOW + 1)]
    + [forward(input_ids=IDS.repeat(2, 1)), forward(input_ids=None), forward(input_ids=IDS[0])],
    "attention_mask": [
        *(forward(attention_mask=mask_of(3, LENGTH, left=left)) for left in (True, False)),
        *(forward(attention_mask=mask_of(3, 8, left=left)) for left in (True, False)),
        forward(attention_mask=mask_of(3, 8).bool()),
        forward(attention_mask=mask_of(1, 0)),
        forward(attention_mask=GAPS),
        forward(attention_mask=added(CAUSAL)),
        forward(attention_mask=added(CAUSAL.triu(-2))),
        forward(attention_mask=added(CAUSAL) / 2e38),
        forward(attention_mask=CAUSAL),
        forward(attention_mask={"full_attention": added(CAUSAL), "sliding_attention": added(CAUSAL.triu(-3))}),
        forward(attention_mask={"full_attention": None, "sliding_attention": None}),
        forward(input_ids=IDS[:, :1], attention_mask=torch.tensor([[1], [0]])),
        forward(attention_mask=torch.ones(2, LENGTH + 3)),
    ],
    "position_ids": [
        forward(position_ids=torch.arange(LENGTH)[None] + 7),
        forward(position_ids=torch.arange(LENGTH)[None] * 2, attention_mask=mask_of(LENGTH, 4)),
        forward(position_ids=torch.stack([torch.arange(LENGTH), torch.arange(LENGTH) + 3])),
        forward(position_ids=PACKED, use_cache=False),
        forward(position_ids=PACKED),
        steps(dynamic, 3, 1, 1, position_ids=torch.tensor([[9]])),
    ],
    "cache": [
        steps(dynamic, 3, 1, 1, 4, 1, 1),
        steps(lambda _: DynamicCache(), 5, 1, 1, 1, 1),
        steps(static, 3, 1, 1, 4, 1, 1),
        steps(lambda model: DynamicCache(config=model.config, offloading=True), 3, 1),
    ],
    "inputs_embeds": [forward(input_ids=None, inputs_embeds=EMBEDDED), forward(inputs_embeds=EMBEDDED)],
    "labels": [forward(labels=IDS), forward(labels=IDS.where(mask_of(3, 8).bool(), -100))],
    "use_cache": [forward(use_cache=False), forward(use_cache=True)],
    "logits_to_keep": [forward(logits_to_keep=keep) for keep in (1, 3, torch.tensor([0, 5]))],
    # In **kwargs.
    "return_dict": [forward(return_dict=False)],
    "output_hidden_states": [
        forward(output_hidden_states=True, attention_mask=mask_of(4, LENGTH)),
        forward(output_hidden_states=[0, -1]),
        steps(dynamic, 3, 1, 1, output_hidden_states=True),
    ],
    "output_attentions": [
        forward(output_attentions=True),
        forward(output_attentions=True, attention_mask=mask_of(4, LENGTH)),
        lambda model: [model(IDS, output_attentions=True), model(IDS)],
        lambda model: (
            model(IDS[:1, 3:4], past_key_values=model(IDS[:1, :3]).past_key_values, output_attentions=True).attentions
        ),
    ],
    "output_router_logits": [forward(output_router_logits=True)],
    "num_items_in_batch": [forward(labels=IDS, num_items_in_batch=torch.tensor(7))],
    "cu_seq_lens_q": [forward(cu_seq_lens_q=torch.tensor([0, 4, LENGTH]), position_ids=PACKED, use_cache=False)],
    "cu_seq_lens_k": [forward(cu_seq_lens_k=torch.tensor([0, 4, LENGTH]))],
    "max_length_q": [forward(max_length_q=7)],
    "max_length_k": [forward(max_length_k=7)],
    "is_causal": [forward(is_causal=False)],
    "seq_idx": [forward(seq_idx=torch.zeros(1, LENGTH, dtype=torch.int32))],
    "cache_position": [forward(cache_position=torch.arange(LENGTH))],
}
CALLS["past_key_values"] = CALLS["cache"]  # its name before transformers 5.20
CASES = [
    pytest.param(call, id=f"{name} {number}") for name, calls in CALLS.items() for number, call in enumerate(calls)
]


def test_every_argument_is_compared() -> None:
    """An argument that a later version of transformers adds fails here until it is listed above."""
    names = {*inspect.signature(Gemma2ForCausalLM.forward).parameters, *TransformersKwargs.__annotations__}
    assert names - {"self", "kwargs"} <= CALLS.keys()


@torch.no_grad()
@pytest.mark.parametrize("call", CASES)
def test_forward(call: Callable[[Any], Any]) -> None:
    compare(call)


@torch.no_grad()
@pytest.mark.parametrize("kind", [Gemma2Model, Gemma2ForSequenceClassification, Gemma2ForTokenClassification])
@pytest.mark.parametrize("left", [True, False])
def test_other_heads(kind: Any, left: bool) -> None:
    ids, mask = IDS * mask_of(4, LENGTH, left=left), mask_of(4, LENGTH, left=left)
    compare(lambda model: model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True), kind=kind)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        {"attention_bias": True},
        {"hidden_activation": "gelu"},
        {"head_dim": 24},
        {"num_key_value_heads": 4},
        {"layer_types": ["full_attention", "full_attention"]},
        {"use_bidirectional_attention": True},
        {"is_causal": False},
        {"tie_word_embeddings": False},
        {"output_attentions": True, "output_hidden_states": True},
        {"use_cache": False},
        {"return_dict": False},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0}},
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0}},
    ],
    ids=str,
)
def test_configurations(changes: dict[str, Any]) -> None:
    compare(forward(attention_mask=mask_of(4, LENGTH)), **changes)
    compare(steps(dynamic, 3, 1, 1), **changes)


@torch.no_grad()
@pytest.mark.parametrize(
    ("call", "served"),
    [
        (forward(), True),
        (forward(attention_mask=mask_of(3, LENGTH)), True),
        (forward(attention_mask=mask_of(3, LENGTH, left=False)), True),
        (forward(attention_mask=mask_of(3, 8, left=False)), True),
        (forward(attention_mask=added(CAUSAL)), True),
        (steps(static, 3, 4, 2), True),
        (forward(attention_mask=GAPS), False),
        (forward(position_ids=PACKED, use_cache=False), False),
        (forward(output_attentions=True), False),
    ],
)
def test_calls_that_the_op_serves(call: Callable[[Any], Any], served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[bool] = []
    original = ops.attention
    monkeypatch.setattr(ops, "attention", lambda *a, **k: called.append(True) or original(*a, **k))
    compare(call, sliding_window=64)
    assert bool(called) is served
