"""The entries of config.json about layers if a merge changes their order or number."""

from __future__ import annotations

from typing import Any

import pytest

from arcmerge.dtypes import BF16
from arcmerge.merging.output.config_json import output_config
from arcmerge.merging.plan.config_layers import change_layers, claimed_depths, levels

# Six layers of four: the last two are repeated.
AGAIN = [0, 1, 2, 3, 2, 3]


def change(donor: dict[str, Any], layers: list[int], depth: int = 4, kinds: Any = None) -> Any:
    return change_layers(donor, depth, [(donor, layer) for layer in layers], kinds)


@pytest.mark.parametrize(
    "key", ["num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks"]
)
def test_the_depth_has_many_names(key: str) -> None:
    assert output_config({key: 4, "hidden_size": 4}, AGAIN, dtype=BF16) == {key: 6, "hidden_size": 4}


@pytest.mark.parametrize("section", ["text_config", "llm_config", "language_config"])
def test_the_depth_of_a_decoder_in_a_section(section: str) -> None:
    donor = {section: {"n_layer": 4}, "vision_config": {"num_hidden_layers": 4, "depth": 4}}
    assert output_config(donor, AGAIN, dtype=BF16) == {**donor, section: {"n_layer": 6}}


def test_the_depth_at_two_levels() -> None:
    donor = {"num_hidden_layers": 4, "text_config": {"num_hidden_layers": 4, "layer_types": [*"abcd"]}}
    found = output_config(donor, AGAIN, dtype=BF16)
    assert found == {"num_hidden_layers": 6, "text_config": {"num_hidden_layers": 6, "layer_types": [*"abcdcd"]}}


def test_a_default_depth_is_added_if_the_merge_changes_it() -> None:
    assert output_config({"text_config": {}}, range(4), dtype=BF16, depth=4) == {"text_config": {}}
    assert output_config({"text_config": {}}, AGAIN, dtype=BF16, depth=4) == {"text_config": {"num_hidden_layers": 6}}
    assert output_config({"net_depth": 4}, AGAIN, dtype=BF16, depth=4) == {"net_depth": 6}
    kinds = {"layers_block_type": [*"abcd"]}
    assert output_config(kinds, AGAIN, dtype=BF16, depth=4) == {"layers_block_type": [*"abcdcd"]}


@pytest.mark.parametrize(
    ("donor", "expected"),
    [
        ({"full_attn_idxs": [0, 3]}, [0, 3, 5]),
        ({"full_attn_idxs": [0, 1, 2, 3]}, [0, 1, 2, 3, 4, 5]),
        ({"attn_layer_indices": [2]}, [2, 4]),
        ({"cross_attention_layers": [1, 2]}, [1, 2, 4]),
        ({"cross_attention_layers": [3, 8, 13]}, [3, 5]),
        ({"layers_num_experts": [2, 4, 8, 16]}, [2, 4, 8, 16, 8, 16]),
        ({"hybrid_layer_ids": [3]}, [3, 5]),
        ({"mlp_only_layers": []}, []),
        ({"encoder_layers": 4, "decoder_layers": 4}, 6),
        ({"num_encoder_layers": 4, "num_decoder_layers": 4}, 6),
        ({"encoder_layers": 2, "decoder_layers": 4}, 2),
        ({"no_rope_layers": [0, 1, 1, 1]}, [0, 1, 1, 1, 1, 1]),
        ({"layer_types": ["full", "full", "full", "sliding"]}, ["full", "full", "full", "sliding", "full", "sliding"]),
        ({"num_attention_heads_per_layer": [8, 8, 4, 2]}, [8, 8, 4, 2, 4, 2]),
        ({"mlp_layer_types": [*"abcd", "mtp"]}, [*"abcdcd", "mtp"]),
        ({"attention_types": [[["global", "local"], 2]]}, [[["global", "local"] * 3, 1]]),
        ({"per_layer_config": {"3": {"head_dim": 8}}}, {"3": {"head_dim": 8}, "5": {"head_dim": 8}}),
        ({"hybrid_override_pattern": "M-M*"}, "M-M*M*"),
        ({"block_types": ["r", "r", "a"]}, ["r", "r", "a", "r", "a", "r"]),
        ({"linear_attn_config": {"kda_layers": [1, 2, 3], "full_attn_layers": [4], "head_dim": 4}},
         {"kda_layers": [1, 2, 3, 5], "full_attn_layers": [4, 6], "head_dim": 4}),
        ({"first_k_dense_replace": 1}, 1),
        ({"max_window_layers": 4, "use_sliding_window": True}, 6),
        ({"moe_layer_start_index": 0}, 0),
        ({"moe_layer_end_index": 3}, 5),
        ({"num_kv_shared_layers": 0}, 0),
        ({"num_kv_shared_layers": 2}, 4),
        ({"max_window_layers": 3, "use_sliding_window": False}, 3),
        ({"max_window_layers": 4, "use_sliding_window": False}, 6),
        ({"max_window_layers": 28, "use_sliding_window": True}, 28),
        ({"eos_token_id": [1, 2, 3, 4]}, [1, 2, 3, 4]),
        ({"vision_feature_layers": [1, 2]}, [1, 2]),
        ({"deepstack_visual_indexes": [1, 3]}, [1, 3]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) and len(value) < 3 else "",
)  # fmt: skip
def test_keys_follow_their_layers(donor: dict[str, Any], expected: Any) -> None:
    found = change(donor, AGAIN)
    assert (found.problems, found.warnings) == ([], [])
    key = next(iter(donor))
    assert found.values.get(key, donor[key]) == expected


@pytest.mark.parametrize(
    ("donor", "word"),
    [
        ({"first_k_dense_replace": 3}, "first"),
        ({"max_window_layers": 3, "use_sliding_window": True}, "first"),
        ({"num_kv_shared_layers": 1}, "last"),
        ({"num_kv_shared_layers": 1, "layer_types": [*"abcd"]}, "last"),
        ({"first_k_dense_replace": 3, "layer_types": [*"abcd"]}, "first"),
        ({"num_dense_layers": 3, "layer_types": [*"abcd"]}, "first"),
        ({"moe_layer_num_skipped": 3}, "first"),
        ({"kv_source_layers": [0, 0, 2, 2]}, "another"),
        ({"loop_layer_index_start": 1}, "by index"),
        ({"num_hidden_layers": 8}, "be the number of layers, 4"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_layers_that_a_key_cannot_describe_are_a_problem(donor: dict[str, Any], word: str) -> None:
    (((key, rule, _),), (expected, *_)) = change(donor, AGAIN).problems, donor
    assert key == expected
    assert word in rule


def test_layers_whose_kind_follows_from_their_index() -> None:
    donor, mamba, attention = {"attn_layer_period": 2}, {"mamba"}, {"attention"}
    kinds = [mamba, attention, mamba, attention]
    moved = [mamba, attention, attention]
    assert "layer 2" in change(donor, [0, 1, 3], kinds=(kinds, moved)).problems[0][2]
    kept = change(donor, [0, 1, 2, 3, 2, 3], kinds=(kinds, [*kinds, mamba, attention]))
    assert (kept.problems, kept.warnings) == ([], [])
    # The donor has no layer at index 6 modulo 8, so the kind of a layer there is unknown.
    assert change({"attn_layer_period": 8}, AGAIN, kinds=([mamba] * 4, [mamba] * 6)).problems
    windows = change({"sliding_window_pattern": 4}, AGAIN, kinds=([mamba] * 4, [mamba] * 6))
    assert "sliding_window_pattern" in windows.warnings[0]
    assert not windows.problems
    listed = {"sliding_window_pattern": 4, "layer_types": [*"abcd"]}
    assert not change(listed, AGAIN).warnings


@pytest.mark.parametrize(
    ("key", "kinds"),
    [
        ("first_k_dense_replace", "mlp_layer_types"),
        ("first_k_dense_replace", "moe_layer_freq"),
        ("max_window_layers", "layer_types"),
    ],
)
def test_a_list_of_kinds_takes_precedence_over_a_count(key: str, kinds: str) -> None:
    found = change({key: 3, kinds: [*"aaab"], "use_sliding_window": True}, AGAIN)
    assert (found.problems, found.values[kinds]) == ([], [*"aaabab"])


@pytest.mark.parametrize(
    ("donor", "layers", "expected"),
    [
        ({"decoder_sparse_step": 2, "mlp_only_layers": []}, [0, 1, 2, 3, 2, 3], (2, [])),
        ({"decoder_sparse_step": 2, "mlp_only_layers": []}, [0, 1, 2, 3, 1, 2, 3], (1, [0, 2, 5])),
        ({"decoder_sparse_step": 2, "mlp_only_layers": None}, [1, 1, 0], (1, [2])),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [0, 1]}, [0, 1, 2, 3, 1, 2, 3], (1, [0, 1, 2, 4, 5])),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [1]}, [0, 1, 2, 3, 1, 2, 3], (1, [1, 4])),
    ],
)
@pytest.mark.parametrize("more", [{}, {"layer_types": ["linear", "full", "linear", "full"]}])
def test_dense_layers_with_a_sparse_step(
    donor: dict[str, Any], layers: list[int], expected: tuple[int, list[int]], more: dict[str, Any]
) -> None:
    kinds = [{"mlp"}, {"expert"}, {"mlp"}, {"expert"}]
    found = change(donor | more, layers, kinds=(kinds, [kinds[layer] for layer in layers]))
    assert (found.problems, found.warnings) == ([], [])
    new = donor | found.values
    assert (new["decoder_sparse_step"], new["mlp_only_layers"] or []) == expected


@pytest.mark.parametrize("key", ["decoder_sparse_step", "moe_layer_interval", "expert_layer_period"])
def test_a_list_of_kinds_of_attention_does_not_give_the_sparse_layers(key: str) -> None:
    kinds = [{"linear", "mlp"}, {"full", "expert"}] * 2
    donor = {key: 2, "layer_types": ["linear", "full"] * 2}
    moved = [0, 1, 2, 3, 1, 2]
    assert "layer 4" in change(donor, moved, kinds=(kinds, [kinds[i] for i in moved])).problems[0][2]
    assert not change(donor, AGAIN, kinds=(kinds, [kinds[i] for i in AGAIN])).problems


def test_layers_with_listed_attention_may_move_if_their_experts_fit() -> None:
    """The last layer gets an index at which the donor has dense layers with both kinds of attention."""
    kinds = [{"linear", "mlp"}, {"full", "mlp"}, {"linear", "mlp"}, {"linear", "expert"}, {"full", "mlp"}]
    donor = {"moe_layer_interval": 4, "layer_types": ["linear", "full", "linear", "linear", "full"]}
    layers = [0, 1, 2, 3, 1]
    found = change(donor, layers, 5, kinds=(kinds, [kinds[layer] for layer in layers]))
    assert (found.problems, found.warnings) == ([], [])


@pytest.mark.parametrize(
    "donor", [{"scale_depth": 1.4}, {"scale_attn_by_inverse_layer_idx": True}, {"model_type": "diffllama"}]
)
def test_layers_that_are_scaled_by_their_index_give_a_warning(donor: dict[str, Any]) -> None:
    (warning,) = change(donor, AGAIN).warnings
    assert f"`{next(iter(donor))}" in warning
    assert not change(donor, [0, 1, 2, 3]).warnings
    assert bool(change(donor, [1, 0, 2, 3]).warnings) == ("scale_depth" not in donor)
    assert not change({"scale_attn_by_inverse_layer_idx": False}, AGAIN).warnings


def test_layers_of_another_model_keep_its_entries() -> None:
    donor, other = {"full_attn_idxs": [0], "first_k_dense_replace": 1}, {"full_attn_idxs": [2, 3]}
    found = change_layers(donor, 4, [(donor, 0), (donor, 1), (other, 2), (other, 3)])
    assert found.values == {"full_attn_idxs": [0, 2, 3], "first_k_dense_replace": 1}
    found = change_layers(donor, 4, [(donor, 0), (other, 2), (other, 3)])
    assert found.values == {"full_attn_idxs": [0, 1, 2], "first_k_dense_replace": 1}


def test_claimed_depths_have_the_path_of_their_key() -> None:
    config = {"n_layer": True, "llm_config": {"num_hidden_layers": 3, "n_layers": "3"}, "vision_config": {"n_layer": 2}}
    assert claimed_depths(config) == {"llm_config.num_hidden_layers": 3}
    assert levels({"thinker_config": {"text_config": {}}}) == [
        (),
        ("thinker_config",),
        ("thinker_config", "text_config"),
    ]
