"""Every argument of transformers' generate gives the same results with an accelerated Gemma-2."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    Gemma2ForCausalLM,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    WatermarkingConfig,
)
from transformers.generation.configuration_utils import ALL_CACHE_IMPLEMENTATIONS
from transformers.generation.streamers import BaseStreamer

from accelerated import IDS, assert_same, compare, outcome, tiny
from arcmerge.integrations.transformers import accelerate

PROMPT = IDS[:1, :4]
BEAMS = {"num_beams": 3}
SAMPLED = {"do_sample": True}
WHOLE = {"return_dict_in_generate": True}
LOOKUP = {"prompt_lookup_num_tokens": 2}


pytestmark = pytest.mark.usefixtures("one_thread")


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(value)

    def end(self) -> None:
        pass


def with_assistant(model: Any, **named: Any) -> Any:
    return model.generate(PROMPT, max_new_tokens=6, assistant_model=tiny(num_hidden_layers=1), **named)


def streamed(model: Any) -> Any:
    collector = Collector()
    model.generate(PROMPT, max_new_tokens=4, streamer=collector)
    return collector.seen


def continued(model: Any) -> Any:
    """With the cache of an earlier call."""
    first = model.generate(PROMPT, max_new_tokens=3, **WHOLE)
    return model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=4)


# For each name, arguments of generate; names that transformers has removed raise the same error.
GIVEN: dict[str, list[dict[str, Any]]] = {
    "max_length": [{"max_length": 7}],
    "max_new_tokens": [{"max_new_tokens": 12}],
    "min_length": [{"min_length": 9}],
    "min_new_tokens": [{"min_new_tokens": 5}],
    "early_stopping": [{**BEAMS, "early_stopping": True}],
    "max_time": [{"max_time": 60.0}],
    "stop_strings": [{"stop_strings": "a"}],
    "do_sample": [SAMPLED],
    "num_beams": [BEAMS, {**BEAMS, **SAMPLED}],
    "use_mtp": [{"use_mtp": True}],
    "use_cache": [{"use_cache": False}],
    "cache_implementation": [{"cache_implementation": name} for name in sorted(ALL_CACHE_IMPLEMENTATIONS)],
    "cache_config": [{"cache_implementation": "quantized", "cache_config": {"backend": "quanto"}}],
    "max_cache_len": [{"cache_implementation": "static", "max_cache_len": 32}],
    "temperature": [{**SAMPLED, "temperature": 0.6}],
    "top_k": [{**SAMPLED, "top_k": 5}],
    "top_p": [{**SAMPLED, "top_p": 0.7}],
    "min_p": [{**SAMPLED, "min_p": 0.1}],
    "top_h": [{**SAMPLED, "top_h": 0.5}],
    "typical_p": [{**SAMPLED, "typical_p": 0.7}],
    "epsilon_cutoff": [{**SAMPLED, "epsilon_cutoff": 0.02}],
    "eta_cutoff": [{**SAMPLED, "eta_cutoff": 0.02}],
    "repetition_penalty": [{"repetition_penalty": 1.8}],
    "encoder_repetition_penalty": [{"encoder_repetition_penalty": 1.8}],
    "length_penalty": [{**BEAMS, "length_penalty": -2.0}],
    "no_repeat_ngram_size": [{"no_repeat_ngram_size": 1}],
    "bad_words_ids": [{"bad_words_ids": [[5], [6, 7]]}],
    "renormalize_logits": [{**WHOLE, "renormalize_logits": True, "output_scores": True}],
    "forced_bos_token_id": [{"forced_bos_token_id": 9}],
    "forced_eos_token_id": [{"forced_eos_token_id": 9}],
    "remove_invalid_values": [{"remove_invalid_values": True}],
    "exponential_decay_length_penalty": [{"exponential_decay_length_penalty": (2, 3.0)}],
    "suppress_tokens": [{"suppress_tokens": list(range(40))}],
    "begin_suppress_tokens": [{"begin_suppress_tokens": list(range(40))}],
    "sequence_bias": [{"sequence_bias": [[[7], 20.0]]}],
    "token_healing": [{"token_healing": True}],
    "guidance_scale": [{"guidance_scale": 1.5}],
    "watermarking_config": [{"watermarking_config": WatermarkingConfig(bias=4.0)}],
    "num_return_sequences": [{**BEAMS, "num_return_sequences": 2}, {**SAMPLED, "num_return_sequences": 3}],
    "output_attentions": [{**WHOLE, "output_attentions": True}, {**WHOLE, **BEAMS, "output_attentions": True}],
    "output_hidden_states": [{**WHOLE, "output_hidden_states": True}],
    "output_scores": [{**WHOLE, "output_scores": True}, {**WHOLE, **BEAMS, "output_scores": True}],
    "output_logits": [{**WHOLE, "output_logits": True}],
    "return_dict_in_generate": [WHOLE],
    "pad_token_id": [{"pad_token_id": 5}],
    "bos_token_id": [{"bos_token_id": 5}],
    "eos_token_id": [{"eos_token_id": list(range(3, 30))}],
    "encoder_no_repeat_ngram_size": [{"encoder_no_repeat_ngram_size": 1}],
    "decoder_start_token_id": [{"decoder_start_token_id": 5}],
    "is_assistant": [{"is_assistant": True}],
    "num_assistant_tokens": [{**LOOKUP, "num_assistant_tokens": 3}],
    "num_assistant_tokens_schedule": [{**LOOKUP, "num_assistant_tokens_schedule": "heuristic"}],
    "assistant_confidence_threshold": [{**LOOKUP, "assistant_confidence_threshold": 0.2}],
    "prompt_lookup_num_tokens": [LOOKUP, {**LOOKUP, **SAMPLED}, {**LOOKUP, **WHOLE, "output_logits": True}],
    "max_matching_ngram_size": [{**LOOKUP, "max_matching_ngram_size": 1}],
    "assistant_early_exit": [{"assistant_early_exit": 1}],
    "assistant_lookbehind": [{**LOOKUP, "assistant_lookbehind": 3}],
    "target_lookbehind": [{**LOOKUP, "target_lookbehind": 3}],
    "assistant_ensemble_weight": [{**LOOKUP, "assistant_ensemble_weight": 0.5}],
    "speculation_type": [{"speculation_type": "none"}],
    "compile_config": [{"compile_config": CompileConfig(backend="eager"), "cache_implementation": "static"}],
    "disable_compile": [{"disable_compile": True, "cache_implementation": "static"}],
    "continuous_batching_config": [{"continuous_batching_config": None}],
    "low_memory": [{**BEAMS, "low_memory": True}],
    "penalty_alpha": [{"penalty_alpha": 0.6, "top_k": 4}],
    "dola_layers": [{"dola_layers": "low"}],
    "diversity_penalty": [{"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0}],
    "num_beam_groups": [{"num_beams": 4, "num_beam_groups": 2}],
    "constraints": [{**BEAMS, "constraints": []}],
    "force_words_ids": [{**BEAMS, "force_words_ids": [[5]]}],
    "prefill_chunk_size": [{"prefill_chunk_size": 3}],
}
# Further arguments of generate.
CALLS: dict[str, Callable[[Any], Any]] = {
    "inputs": lambda model: model.generate(inputs=IDS, max_new_tokens=5),
    "generation_config": lambda model: model.generate(PROMPT, generation_config=GenerationConfig(max_new_tokens=5)),
    "logits_processor": lambda model: model.generate(
        PROMPT, max_new_tokens=5, logits_processor=LogitsProcessorList([lambda _, scores: -scores])
    ),
    "stopping_criteria": lambda model: model.generate(
        PROMPT, max_new_tokens=9, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(6)])
    ),
    "prefix_allowed_tokens_fn": lambda model: model.generate(
        PROMPT, max_new_tokens=5, prefix_allowed_tokens_fn=lambda *_: [7, 8, 9]
    ),
    "synced_gpus": lambda model: model.generate(PROMPT, max_new_tokens=5, synced_gpus=False),
    "assistant_model": with_assistant,
    "streamer": streamed,
    "negative_prompt_ids": lambda model: model.generate(
        PROMPT, max_new_tokens=5, guidance_scale=2.0, negative_prompt_ids=IDS[1:, :3]
    ),
    "negative_prompt_attention_mask": lambda model: model.generate(
        PROMPT,
        max_new_tokens=5,
        guidance_scale=2.0,
        negative_prompt_ids=IDS[1:, :3],
        negative_prompt_attention_mask=torch.tensor([[0, 1, 1]]),
    ),
    "custom_generate": lambda model: model.generate(
        PROMPT, max_new_tokens=5, custom_generate=lambda model, ids, **_: model(ids).logits
    ),
    "inputs_embeds": lambda model: model.generate(
        inputs_embeds=model.get_input_embeddings()(PROMPT), max_new_tokens=5, do_sample=False
    ),
    "attention_mask": lambda model: model.generate(
        IDS, attention_mask=(torch.arange(11) >= torch.tensor([[0], [7]])).long(), max_new_tokens=9, **BEAMS
    ),
    "past_key_values": continued,
    "sampled assistant": lambda model: with_assistant(model, do_sample=True),
}
CASES = [
    pytest.param(given, id=f"{name} {number}")
    for name, several in GIVEN.items()
    for number, given in enumerate(several)
]


def test_every_argument_is_compared() -> None:
    """An argument that a later version of transformers adds fails here until it is listed above."""
    names = {name for name in vars(GenerationConfig()) if not name.startswith("_")} - {"transformers_version"}
    assert names <= GIVEN.keys()
    assert inspect.signature(Gemma2ForCausalLM.generate).parameters.keys() - {"self", "kwargs"} <= CALLS.keys()


@pytest.mark.parametrize("given", CASES)
def test_generation_config(given: dict[str, Any]) -> None:
    room = {} if "max_length" in given else {"max_new_tokens": 5}
    compare(lambda model: model.generate(PROMPT, **{**room, **given}))


@pytest.mark.parametrize("name", CALLS)
def test_generate(name: str) -> None:
    assert not isinstance(compare(CALLS[name]), str)


def test_an_accelerated_assistant() -> None:
    expected = outcome(with_assistant, tiny())
    assistant = tiny(num_hidden_layers=1)
    with accelerate(assistant):
        found = outcome(lambda model: model.generate(PROMPT, max_new_tokens=6, assistant_model=assistant), tiny())
    assert_same(found, expected)


def test_continuous_batching() -> None:
    def batched(model: Any) -> Any:
        small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)  # or it takes most of the memory
        config = GenerationConfig(
            max_new_tokens=4, do_sample=False, eos_token_id=1, pad_token_id=0, continuous_batching_config=small
        )
        found = model.generate_batch([PROMPT[0].tolist(), IDS[1].tolist()], generation_config=config)
        return [torch.tensor(request.generated_tokens) for _, request in sorted(found.items())]

    assert not isinstance(compare(batched), str)
