"""Tiny checkpoints of every architecture that transformers can build, with random weights.

`tiny_config` shrinks the default configuration of a class by what its keys are called, at every level; `OVERRIDES`
holds what the names do not tell. `write(kind, model_type, folder)` builds the model and saves two parents of it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

Kind = Literal["causal", "reward", "base", "masked", "image", "sequence"]

DEPTH = 4
VOCABULARY = 96

MAPPINGS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "reward": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "base": modeling_auto.MODEL_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "sequence": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}

# The first pattern that matches a key gives its small value.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"^(?:vocab_size|.*_vocab_size|unpadded_vocab_size|vocab_size_per_layer_input)$", VOCABULARY),
    (r"_token_id$|_token_index$|^(?:eoi|boi|image|audio|video)_token", 1),
    (r"(?:period|every_n_layers|_interval|sparse_step|layer_group_size|window_pattern)$", 2),
    (r"(?:layer_offset)$", 1),
    (r"^(?:num_kv_shared_layers)$", 0),
    (r"^(?:hidden_size_per_layer_input)$", 8),
    (r"^(?:num_shared_experts|n_shared_experts|moe_num_shared_experts|pretraining_tp)$", 1),
    (r"(?:first_k_dense_replace|num_dense_layers|num_nextn_predict_layers)$", 1),
    (r"^(?:num_hidden_layers|n_layers?|num_layers|(?:num_)?(?:en|de)coder_layers|depth|num_blocks)$", DEPTH),
    (r"(?:key_value_heads|kv_heads|kv_n_heads|num_key_heads|multi_query_group_num)$", 2),
    (r"(?:num_attention_heads|_heads|n_head|attention_heads|num_heads|num_query_groups)$", 4),
    (r"(?:experts_per_tok|experts_per_token|moe_topk|moe_top_k|moe_k|topk_blocks)$", 2),
    (r"(?:n_group|topk_group|num_expert_group|n_groups|ngroups)$", 1),
    (r"(?:num_experts|routed_experts|local_experts|expert_num)$", 4),
    (r"(?:intermediate_size|ffn_dim|dff|dim_ff|ffn_hidden_size|d_inner|feed_forward_size|intermediate_size_mlp)$", 64),
    (r"(?:qk_head_dim)$", 16),
    (r"(?:head_dim|d_head|dim_head|headdim|kv_channels|rotary_dim|attention_head_size|head_size)$", 8),
    (r"(?:_rank|d_state|state_size|lowrank)$", 8),
    (r"(?:max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length)$", 64),
    (r"(?:sliding_window|window_size|attention_chunk_size|local_attention)$", 16),
    (r"(?:chunk_size)$", 16),
    (r"(?:patch_size|temporal_patch_size)$", 4),
    (r"(?:image_size|crop_size)$", 16),
)
_WIDE = re.compile(r"(?:hidden_size|d_model|n_embd|dim_model|_dim|_size|_width|_length|_channels|channels|width|dim)$")
_KEPT = re.compile(r"chunk_size_feed_forward|chunk_size_lm_head|conv.*kernel|d_conv|type_vocab_size|num_channels")

# Values that do not follow from the names of keys, by the model type of their level.
_MAMBA = {"mamba_n_heads": 8}
_FULL, _SLIDING, _LINEAR = "full_attention", "sliding_attention", "linear_attention"
_GEMMA4 = {"layer_types": [_SLIDING, _FULL] * 2, "per_layer_config": {1: {"head_dim": 16}, 3: {"head_dim": 16}}}
_HYBRID = {
    "layers_block_type": [_LINEAR, "hybrid"] * 2,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"] * 2},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "mamba2": {"num_heads": 8},
    "cohere_compass_text": {
        "layer_types": [_FULL, _SLIDING] * 2,
        "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in (_FULL, _SLIDING)},
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8}, "num_key_value_heads": None},
    "dory": {"n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "layer_types": [_FULL, _SLIDING] * 2,
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", _FULL] * 2},
    "lfm2": {"layer_types": ["conv", _FULL] * 2, "full_attn_idxs": None},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "gemma3n_text": {"intermediate_size": 64, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 1},
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [8, 24],
    },
    "zamba": _HYBRID,
    "zamba2": {**_HYBRID, "hybrid_layer_ids": [1, 3], "mamba_headdim": 8, "n_mamba_heads": 8},
    "xmod": {"default_language": "en_XX"},
    "musicgen_decoder": {"num_codebooks": 1},
    "musicgen_melody_decoder": {"num_codebooks": 1},
    "kimi_linear": {"layer_types": [_LINEAR, _FULL] * 2},
    "hrm_text": {"H_cycles": 1, "L_cycles": 1, "num_layers_per_stack": 2},
    "zaya": {"num_experts_per_tok": 1},
    "qwen4_exp_text": {
        "layer_types": [_LINEAR, "indexed_attention"] * 2,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "blt": {"encoder_hash_byte_group_vocab": 96, "encoder_hash_byte_group_size": [3, 4]},
    "dots3_note_text": {
        "head_dim": 16,
        "layer_types": ["indexed_attention", _SLIDING] * 2,
        "per_layer_config": {1: {"kv_lora_rank": 16}, 3: {"kv_lora_rank": 16}},
    },
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "gpt_oss": {"layer_types": [_SLIDING, _FULL] * 2},
    "gemma3_text": {"layer_types": [_SLIDING, _FULL] * 2, "sliding_window_pattern": 2},
}


# Networks that compute in float32 only.
_FLOAT32 = ("reformer", "xlnet")


def names(kind: str) -> list[str]:
    """Model types that `kind` has a class for."""
    return list(MAPPINGS[kind])


def model_class(kind: Kind, model_type: str) -> Any:
    return getattr(transformers, MAPPINGS[kind][model_type])


def tiny_config(kind: Any, model_type: str) -> Any:
    """A configuration of class `kind` of a tiny model."""
    return kind(**_shrunk({**kind().to_dict(), "model_type": model_type}))


def _shrunk(settings: dict[str, Any]) -> dict[str, Any]:
    overrides = OVERRIDES.get(settings.get("model_type", ""), {})
    depth = next((settings[key] for key in ("num_hidden_layers", "n_layer", "num_layers") if settings.get(key)), None)
    small: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict) and key.endswith("config"):
            small[key] = _shrunk(value)
        elif isinstance(value, dict) and "mrope_section" in value:
            small[key] = {**value, "mrope_section": [2, 1, 1]}  # half of the dimensions of a head
        elif key == "per_layer_config" or (isinstance(value, list) and depth and len(value) in (depth, depth + 1)):
            continue  # an entry for each layer: the class makes it anew
        elif type(value) is int and not _KEPT.search(key):
            small[key] = _size(key, value)
        elif key in ("transformers_version", "_name_or_path", "dtype", "architectures"):
            continue
        else:
            small[key] = value
    if small.get("kv_lora_rank") and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
    return {key: value for key, value in {**small, **overrides}.items() if value is not None or key in overrides}


def _size(key: str, value: int) -> int:
    for pattern, size in _SIZES:
        if re.search(pattern, key):
            return size if value > 0 else value
    if _WIDE.search(key):
        return min(value, 32)
    return value


def build(kind: Kind, model_type: str, seed: int) -> Any:
    """A model in memory whose weights depend on the seed only."""
    torch.manual_seed(seed)
    cls = model_class(kind, model_type)
    # The decoder of a model for several media has its own configuration.
    settings = CONFIG_MAPPING[model_type] if kind == "image" else cls.config_class
    config = tiny_config(settings, settings.model_type)
    model = cls(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor += 0.02 * torch.randn(tensor.shape, generator=generator)
    return model


def write(kind: Kind, model_type: str, folder: Path) -> tuple[Path, Path]:
    """Two models with the same configuration and independent weights."""
    parents = folder / "a", folder / "b"
    dtype = torch.float32 if model_type in _FLOAT32 else torch.bfloat16
    for seed, path in enumerate(parents):
        build(kind, model_type, seed).to(dtype).save_pretrained(path)
    return parents


def tokens(model_type: str) -> Any:
    """A function of the model that gives the arguments of a forward pass."""

    def arguments(model: Any) -> dict[str, Any]:
        numbers = torch.randint(3, VOCABULARY - 8, (1, 12), generator=torch.Generator().manual_seed(9))
        found = {"input_ids": numbers}
        if getattr(model.config, "is_encoder_decoder", False):
            found["decoder_input_ids"] = numbers
        return found

    return arguments
