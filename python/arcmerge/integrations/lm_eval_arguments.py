"""Arguments of lm-eval's model `hf` that `arcmerge` does not have: accepted if they do not change results."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from arcmerge.errors import Problems

# Values that mean that an argument is not set.
_UNSET: tuple[Any, ...] = (None, False, "", {}, [])

# Any value has the same result: they select how `hf` computes.
_WITHOUT_EFFECT = {
    "backend",
    "logits_cache",
    "trust_remote_code",
    "attn_implementation",
    "low_cpu_mem_usage",
    "use_cache",
    "offload_folder",
    "use_safetensors",
}
# They distribute `hf` over devices; arcmerge runs a model on one.
_PLACEMENT = {"parallelize", "device_map", "max_memory_per_gpu", "max_cpu_memory", "max_memory", "tp_plan"}
# They change results.
_REFUSED = {
    "peft": "merge the adapter into its model first and give the result",
    "delta": "add the delta weights to their model first and give the result",
    "autogptq": "quantised weights are not supported",
    "gptqmodel": "quantised weights are not supported",
    "load_in_8bit": "quantised weights are not supported",
    "load_in_4bit": "quantised weights are not supported",
    "quantization_config": "quantised weights are not supported",
    "gguf_file": "give a folder of safetensors",
    "subfolder": "give the path of the subfolder as pretrained",
    "mixed_precision_dtype": "set the dtype of the weights with dtype=bfloat16 or dtype=float32",
}
# Arguments of `hf` of which arcmerge supports one value.
_ONLY: dict[str, tuple[Collection[Any], str]] = {
    "softmax_dtype": ((None, "float32", "auto"), "log-probabilities are always computed in float32"),
    "use_fast_tokenizer": ((True, None), "only tokenizer.json is supported"),
    "truncation": ((False, None), "long contexts are always truncated on the left"),
}
KNOWN = {*_WITHOUT_EFFECT, *_PLACEMENT, *_REFUSED, *_ONLY}


def check_others(given: Mapping[str, Any], own: Collection[str]) -> list[str]:
    """Check further arguments.

    Args:
        given: the arguments.
        own: the names of ArcmergeLM's own arguments, for advice.

    Returns:
        Warnings about arguments without effect.

    Raises:
        ArcmergeError: naming every argument that is unknown or would change results.
    """
    ignored, problems = [], Problems()
    for name, value in given.items():
        if name in _WITHOUT_EFFECT or (name not in _ONLY and name in KNOWN and value in _UNSET):
            continue
        if name in _PLACEMENT:
            ignored.append(f"'{name}' has no effect: the model runs on one device, see 'device'")
        elif name in _REFUSED:
            problems.add(f"'{name}' must be left out with the model arcmerge, got {value!r}; {_REFUSED[name]}")
        elif name in _ONLY:
            values, reason = _ONLY[name]
            if value not in values:
                ignored.append(f"'{name}={value}' has no effect: {reason}")
        else:
            close = difflib.get_close_matches(name, [*own, *KNOWN], n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"its arguments are {', '.join(sorted(own))}"
            problems.add(f"'{name}' must be an argument of the model arcmerge, got {value!r}; {hint}")
    problems.raise_if_any()
    return ignored
