"""Differences between the models' configurations that change the results of their weights.

The result has the donor's config.json, so weights of a model with other settings run with settings that they were not
trained with.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from arcmerge.merging.plan.config_layers import decoder_settings
from arcmerge.merging.recipe.model_reference import ModelReference

# Keys that change the results of the weights without changing shapes.
_HEADS = r"n_heads?|n_head_kv|num_heads|num_(attention|key_value|kv)_heads|head_dim|kv_channels|multi_query_group_num"
_ROTATION = (
    r"\w*rope_(theta|scaling|parameters|ratio|dim|interleave\w*|traditional|local_base_freq)"
    r"|partial_rotary_\w+|rotary_\w+|alibi"
)
_NORMS = r"\w*eps|\w*epsilon"
_ACTIVATIONS = r"activation|hidden_act|hidden_activation|activation_function|mlp_hidden_act"
_SCALES = (
    r"\w+_multiplier|\w+_scaling_factor|logits?_scal\w+|query_pre_attn_scalar|scale_(emb|depth)|dim_model_base|mup_\w+"
)
_ATTENTION = r"\w+_softcapping|(use_)?sliding_window(_size)?|attention_window_size|window_size|clip_qkv|is_causal"
_KINDS = r"(layer|attention)_types"
_BLOCKS = (
    r"parallel_attn|use_parallel_residual|num_experts_per_tok|moe_top_?k|topk_group|n_group|norm_topk_prob|scoring_func"
)
_COMPUTES = re.compile("|".join((_HEADS, _ROTATION, _NORMS, _ACTIVATIONS, _SCALES, _ATTENTION, _KINDS, _BLOCKS)))
# Keys of `_COMPUTES` whose null means a value that follows from other keys.
_DERIVED = re.compile(r"head_dim|num_(key_value|kv)_heads")

# Values that a missing key may stand for.
_DEFAULTS = {
    re.compile(r"rope_theta|rotary_emb_base"): (None, 10000),
    re.compile(r"rms_norm_eps"): (None, 1e-6),
    re.compile(r"layer_norm_eps|layer_norm_epsilon|norm_epsilon"): (None, 1e-5, 1e-12),
}
_UNSET: Any = object()

# Keys under `rope_parameters` in newer configurations, at the top level in older ones.
_ROPE_KEYS = ("rope_theta", "partial_rotary_factor")


def disagreements(configs: Mapping[ModelReference, Mapping[str, Any]], donor: ModelReference) -> list[str]:
    """Return a sentence for each key whose value in some model differs from the donor's, which the result has."""
    settings = {model: _computing(config) for model, config in configs.items()}
    found = []
    for key in dict.fromkeys(key for theirs in settings.values() for key in theirs):
        ours = settings[donor].get(key, _UNSET)
        others = {
            model: value
            for model, theirs in settings.items()
            if (value := theirs.get(key, _UNSET)) is not ours and _differ(key, ours, value)
        }
        if others:
            values = ", ".join(f"{_shown(other)} in {model}" for model, other in others.items())
            found.append(f"`{key}` differs between the models: {_shown(ours)} in {donor}, which is kept, {values}")
    return found


def _differ(key: str, one: Any, other: Any) -> bool:
    """Whether a key's values in two configurations differ in effect.

    A missing key has the default of the model's class, which is known for some keys only.
    """
    if one is _UNSET or other is _UNSET:
        given = other if one is _UNSET else one
        return any(name.fullmatch(key) and given not in usual for name, usual in _DEFAULTS.items())
    if isinstance(one, list) and isinstance(other, list):  # with an entry for each layer; the depths may differ
        return any(mine != theirs for mine, theirs in zip(one, other, strict=False))
    return bool(one != other)


def _shown(value: Any) -> str:
    return "not set" if value is _UNSET else f"{value!r:.120}"


def _computing(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that change the results of weights, with those of the rotation under their older names."""
    decoder = decoder_settings(config)
    attention = decoder.get("attn_config")  # MPT and DBRX
    every = {**decoder, **(attention if isinstance(attention, dict) else {})}
    settings = {key: value for key, value in every.items() if _COMPUTES.fullmatch(key)}
    settings = {key: value for key, value in settings.items() if value is not None or not _DERIVED.fullmatch(key)}
    if settings.get("use_sliding_window") is False:
        settings.pop("sliding_window", None)
    rope = settings.pop("rope_parameters", None)
    if isinstance(rope, dict) and rope and not all(isinstance(value, dict) for value in rope.values()):
        settings |= {key: rope[key] for key in _ROPE_KEYS if rope.get(key) is not None}
        settings["rope_scaling"] = {key: value for key, value in rope.items() if key not in _ROPE_KEYS}
    elif rope:
        settings["rope_parameters"] = rope
    if "rope_scaling" in settings or "rope_theta" in settings:
        settings["rope_scaling"] = _scaling(settings.get("rope_scaling"))
    return settings


def _scaling(value: Any) -> Any:
    """A rope_scaling with one name for its kind; None if it does not scale."""
    if not isinstance(value, dict):
        return value
    kind = value.get("rope_type", value.get("type", "default"))
    rest = {key: entry for key, entry in value.items() if key not in ("rope_type", "type") and entry is not None}
    return None if kind == "default" and not rest else {"rope_type": kind, **rest}
