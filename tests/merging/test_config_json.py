"""config.json of the result, key by key, and as transformers reads it."""

from __future__ import annotations

from typing import Any

import pytest

from arcmerge.dtypes import BF16, F32
from arcmerge.merging.output.config_json import output_config

SLIDING, FULL = "sliding_attention", "full_attention"

GEMMA2: dict[str, Any] = {
    "_name_or_path": "/home/someone/gemma",
    "architectures": ["Gemma2ForCausalLM"],
    "dtype": "float32",
    "hidden_size": 16,
    "layer_types": [SLIDING, FULL] * 3,
    "model_type": "gemma2",
    "num_hidden_layers": 6,
    "tie_word_embeddings": True,
    "vocab_size": 320,
}


def test_with_the_same_layers_only_dtype_and_path_change() -> None:
    expected = {key: value for key, value in GEMMA2.items() if key != "_name_or_path"} | {"dtype": "bfloat16"}
    assert output_config(GEMMA2, range(6), dtype=BF16) == expected


def test_the_donor_is_not_changed() -> None:
    donor = {**GEMMA2, "text_config": {"num_hidden_layers": 6, "dtype": "float32"}}
    copy = {**donor, "text_config": {**donor["text_config"]}}
    output_config(donor, [0, 1, 1], dtype=BF16, vocab_size=7, tied=False)
    assert donor == copy


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        pytest.param({"dtype": "float32"}, {"dtype": "bfloat16"}, id="new name"),
        pytest.param({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}, id="old name"),
        pytest.param(
            {"dtype": "float32", "torch_dtype": "float32"}, {"dtype": "bfloat16", "torch_dtype": "bfloat16"}, id="both"
        ),
        pytest.param({}, {}, id="neither"),
    ],
)
def test_dtype_of_the_weights(present: dict[str, str], expected: dict[str, str]) -> None:
    assert output_config({"num_hidden_layers": 1, **present}, [0], dtype=BF16) == {"num_hidden_layers": 1, **expected}


def test_a_part_without_a_dtype_gets_none() -> None:
    donor = {"dtype": None, "attn_config": {"dtype": None}, "text_config": {"torch_dtype": "float32", "dtype": None}}
    assert output_config(donor, [0], dtype=BF16) == {
        "dtype": "bfloat16",
        "attn_config": {"dtype": None},
        "text_config": {"torch_dtype": "bfloat16", "dtype": None},
    }


def test_rows_and_head() -> None:
    config = output_config(GEMMA2, range(6), dtype=F32, vocab_size=336, tied=False)
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (336, False)


def test_gemma2_alternates_by_index_whatever_the_source_layers() -> None:
    """Runtimes for Gemma-2 derive the kind of attention from the layer's index."""
    config = output_config(GEMMA2, [0, 1, 1, 2, 3, 4, 5], dtype=BF16)
    assert config["num_hidden_layers"] == 7
    assert config["layer_types"] == [SLIDING, FULL, SLIDING, FULL, SLIDING, FULL, SLIDING]


@pytest.mark.parametrize("key", ["sliding_window_pattern", "_sliding_window_pattern", None])
def test_gemma3_has_full_attention_in_every_nth_layer(key: str | None) -> None:
    n = 3 if key else 6
    donor = {"model_type": "gemma3_text", "num_hidden_layers": 6, "layer_types": [SLIDING] * 5 + [FULL]}
    config = output_config(donor | ({key: n} if key else {}), [*range(6), 0, 0], dtype=BF16)
    assert config["layer_types"] == [SLIDING if (layer + 1) % n else FULL for layer in range(8)]


def test_other_lists_follow_their_layers() -> None:
    donor = {
        "architectures": ["One"] * 3,
        "eos_token_id": [1, 2, 3],
        "layer_types": [FULL, SLIDING, SLIDING],
        "mlp_only_layers": [1],
        "model_type": "qwen2",
        "no_rope_layers": [0, 1, 1],
        "num_hidden_layers": 3,
    }
    config = output_config(donor, [2, 0, 0, 1], dtype=BF16)
    assert config["layer_types"] == [SLIDING, FULL, FULL, SLIDING]
    assert config["no_rope_layers"] == [1, 0, 0, 1]
    assert config["mlp_only_layers"] == [3]
    unchanged = ("architectures", "eos_token_id")
    assert {key: config[key] for key in unchanged} == {key: donor[key] for key in unchanged}


def test_the_same_number_of_layers_in_another_order() -> None:
    config = output_config(
        {"model_type": "x", "num_hidden_layers": 2, "layer_types": [FULL, SLIDING]}, [1, 0], dtype=BF16
    )
    assert config["layer_types"] == [SLIDING, FULL]


def test_nested_decoder() -> None:
    donor = {
        "dtype": "float32",
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 4, "vocab_size": 5, "dtype": "float32"},
    }
    assert output_config(donor, [0, 1], dtype=BF16, vocab_size=6, tied=True) == {
        "dtype": "bfloat16",
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 2, "vocab_size": 6, "dtype": "bfloat16"},
        "tie_word_embeddings": True,
    }


@pytest.mark.parametrize("depth", [4, 6, 7, 13])
def test_transformers_accepts_any_depth_of_gemma2(depth: int) -> None:
    """transformers refuses mergekit's own result, whose layer_types has the donor's length."""
    transformers = pytest.importorskip("transformers")
    donor = transformers.Gemma2Config(num_hidden_layers=6, vocab_size=320).to_dict()
    config = output_config(donor, [layer % 6 for layer in range(depth)], dtype=BF16)
    read = transformers.Gemma2Config.from_dict(config)
    assert read.layer_types == transformers.Gemma2Config(num_hidden_layers=depth).layer_types


def test_layers_of_a_deeper_model_keep_its_entries() -> None:
    donor = {"num_hidden_layers": 2, "layer_types": [FULL, FULL]}
    deeper = {"num_hidden_layers": 4, "layer_types": [FULL, FULL, FULL, SLIDING]}
    config = output_config(donor, [0, 1, 2, 3], dtype=BF16, models=[donor, donor, deeper, deeper])
    assert config["layer_types"] == [FULL, FULL, FULL, SLIDING]


def test_layers_of_a_deeper_model_without_entries_repeat_those_of_the_donor() -> None:
    donor = {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}
    config = output_config(donor, [0, 1, 2], dtype=BF16, models=[donor, donor, {"num_hidden_layers": 4}])
    assert config["layer_types"] == [SLIDING, FULL, SLIDING]
