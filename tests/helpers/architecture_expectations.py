"""The merges of tiny architectures that are refused, with words of the message. All others succeed."""

from __future__ import annotations

# Whole models.
REFUSED = {
    "causal/hrm_text": "must have one stack of layers",
    "causal/xlm": "must have one stack of layers",
    "base/t5": "'is_encoder_decoder' must be false",
    "sequence/bart": "'is_encoder_decoder' must be false",
    "sequence/t5": "'is_encoder_decoder' must be false",
}

_BY_INDEX = "must give each layer the kind of its tensors"
_SEVERAL = "serves several of the 4 layers"

# Slices of another depth: the layers 0 to 3, then 1 to 3 again.
REFUSED_DEPTH = {
    "causal/dory": "must not select layers by index",
    "causal/ernie4_5_moe": _BY_INDEX,
    "causal/gemma3n_text": _SEVERAL,
    "causal/gemma4": _SEVERAL,
    "causal/gemma4_text": _SEVERAL,
    "causal/gpt_neox_japanese": "because only this layer has",
    "causal/inkling2_loop_text": _SEVERAL,
    "causal/inkling2_text": _SEVERAL,
    "causal/jamba": _BY_INDEX,
    "causal/zamba": _SEVERAL,
    "causal/zamba2": _SEVERAL,
    "image/gemma4": _SEVERAL,
    "masked/albert": "must be within the layers 0 to 0",  # one layer that all share
    "reward/jamba": _BY_INDEX,
}

# Architectures that transformers cannot build here, or cannot run on text only.
UNBUILDABLE = {
    "causal/blt": "transformers 5.24 cannot run it from its own configuration",
    "causal/gemma3n": "its tower needs timm",
    "causal/gemma4_assistant": "its default configuration is not valid",
    "causal/gemma4_unified_assistant": "runs only beside its main model",
    "causal/xlstm": "its recurrent step does not run at this size",
}
