"""config.json in all its spellings, and its errors."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.config import Gemma2Config
from fuzz.mutations import ODD

# google/gemma-2-2b, as published.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "initializer_range": 0.02,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 256000,
}
PATH = Path("model/config.json")


def read(**changes: Any) -> Gemma2Config:
    settings = {**PUBLISHED, **changes}
    return Gemma2Config.read({key: value for key, value in settings.items() if value is not ...}, PATH)


def test_the_published_settings() -> None:
    config = read()
    assert (config.hidden_size, config.head_dim, config.vocab_size) == (2304, 256, 256000)
    assert config.windows == (4096, 0) * 13
    assert config.softmax_scale == 1 / 16
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (2, (1,), 0)
    assert config.rope_theta == 10000.0


def test_the_spelling_of_transformers_5() -> None:
    old = read()
    assert old == read(
        rope_theta=...,
        torch_dtype=...,
        dtype="float32",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        layer_types=["sliding_attention", "full_attention"] * 13,
    )
    assert old == read(head_dim=..., query_pre_attn_scalar=..., sliding_window=..., pad_token_id=..., eos_token_id=None)


def test_settings_of_transformers_are_read_alike(tmp_path: Path) -> None:
    import transformers

    theirs = transformers.Gemma2Config(num_hidden_layers=3, query_pre_attn_scalar=144, sliding_window=64)
    theirs.save_pretrained(tmp_path)
    ours = Gemma2Config.read(json.loads((tmp_path / "config.json").read_text()), tmp_path / "config.json")
    assert ours.windows == tuple(64 if kind == "sliding_attention" else 0 for kind in theirs.layer_types)
    assert ours.softmax_scale == 1 / 12
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


def test_caps_and_windows_may_be_off() -> None:
    config = read(attn_logit_softcapping=None, final_logit_softcapping=None, sliding_window=None)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (0.0, 0.0)
    assert config.windows == (0,) * 26
    assert read(eos_token_id=[1, 107]).eos_token_id == (1, 107)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "gemma3"}, "'model_type' must be 'gemma2' to run the model, got 'gemma3'"),
        ({"max_position_embeddings": 2**21}, "'max_position_embeddings' must be a whole number from 1 to 1048576, got"),
        ({"hidden_size": ...}, "'hidden_size' must be a whole number from 1 to 2147483647, got None"),
        ({"head_dim": 24}, "'head_dim' must be a power of two of 16 or more, got 24"),
        ({"num_key_value_heads": 3}, "'num_attention_heads' must be a multiple of num_key_value_heads 3, got 8"),
        ({"rms_norm_eps": "1e-6"}, "'rms_norm_eps' must be a number above 0, got '1e-6'"),
        ({"hidden_activation": "relu"}, "'hidden_activation' must be 'gelu_pytorch_tanh' to run the model, got 'relu'"),
        ({"attention_bias": True}, "'attention_bias' must be false, got True; no Gemma-2 has biases"),
        ({"layer_types": ["full_attention"]}, "'layer_types' must list 'sliding_attention' or 'full_attention' for"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2}}, "'rope_parameters' must be of type 'default'"),
        ({"eos_token_id": ["</s>"]}, "'eos_token_id' must be a token id or a list of token ids"),
        ({"use_bidirectional_attention": True}, "'use_bidirectional_attention' must be false, got True"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_run_raise(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ArcmergeError, match=sentence) as refusal:
        read(**changes)
    assert str(PATH) in str(refusal.value)


ROPE = ("rope_parameters", "rope_scaling")
ODD_ROPE = [{key: value} for key in ("rope_type", "type", "rope_theta", "full_attention") for value in ODD]


@pytest.mark.parametrize("key", [*(key for key in PUBLISHED if key != "model_type"), "layer_types", *ROPE])
def test_any_value_is_read_or_raises(key: str) -> None:
    for value in (*ODD, *(ODD_ROPE if key in ROPE else ())):
        with suppress(ArcmergeError):
            read(**{key: value})


def test_long_values_are_shortened() -> None:
    for key in PUBLISHED:
        for value in ("x" * 5000, 10**400, ["x"] * 5000):
            refusal = ""
            try:
                read(**{key: value})
            except ArcmergeError as error:
                refusal = str(error)
            assert len(refusal) < 300, key


def test_the_mistake_of_the_first_9b_checkpoints_warns() -> None:
    with pytest.warns(UserWarning, match=r"'query_pre_attn_scalar' is 224.* mistake for 256"):
        config = read(query_pre_attn_scalar=224)
    assert config.softmax_scale == 224**-0.5


def test_one_error_names_all_problems() -> None:
    with pytest.raises(ArcmergeError) as refusal:
        read(hidden_size=0, vocab_size=-1)
    assert len(refusal.value.problems) == 2
