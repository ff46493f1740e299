"""The arguments of lm-eval's own model class `hf` that `arcmerge` has not: accepted where they change no number."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from arcmerge.errors import ArcmergeError

# Values that ask for nothing.
_UNSET: tuple[Any, ...] = (None, False, "", {}, [])

# They choose how `hf` computes, not what: any value is right.
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
# They choose where `hf` computes: one model runs on one device here.
_PLACEMENT = {"parallelize", "device_map", "max_memory_per_gpu", "max_cpu_memory", "max_memory", "tp_plan"}
# They change the numbers.
_REFUSED = {
    "peft": "merge the adapter into its model first and give the result",
    "delta": "add the delta weights to their model first and give the result",
    "autogptq": "quantised weights are not supported",
    "gptqmodel": "quantised weights are not supported",
    "load_in_8bit": "quantised weights are not supported",
    "load_in_4bit": "quantised weights are not supported",
    "quantization_config": "quantised weights are not supported",
    "gguf_file": "give a folder of safetensors",
    "subfolder": "give the path of the folder itself as pretrained",
    "mixed_precision_dtype": "choose the type of the weights with dtype=bfloat16 or dtype=float32",
}
# Arguments of `hf` with a single value that holds here too.
_ONLY: dict[str, tuple[Collection[Any], str]] = {
    "softmax_dtype": ((None, "float32", "auto"), "log-probabilities are always computed in float32"),
    "use_fast_tokenizer": ((True, None), "tokenizer.json is the only form of a tokenizer that is read"),
    "truncation": ((False, None), "contexts that are too long are always cut on the left"),
}
KNOWN = {*_WITHOUT_EFFECT, *_PLACEMENT, *_REFUSED, *_ONLY}


def check_others(given: Mapping[str, Any], own: Collection[str]) -> list[str]:
    """Sentences for those of the arguments `given` that have no effect; own: the names of the class's own arguments.

    Raises ArcmergeError for arguments that would change the numbers and for unknown ones.
    """
    ignored, problems = [], []
    for name, value in given.items():
        if name in _WITHOUT_EFFECT or (name not in _ONLY and name in KNOWN and value in _UNSET):
            continue
        if name in _PLACEMENT:
            ignored.append(f"'{name}' has no effect: the model runs on the one device that 'device' names")
        elif name in _REFUSED:
            problems.append(f"'{name}' must be left out with the model arcmerge, got {value!r}; {_REFUSED[name]}")
        elif name in _ONLY:
            values, reason = _ONLY[name]
            if value not in values:
                ignored.append(f"'{name}={value}' has no effect: {reason}")
        else:
            close = difflib.get_close_matches(name, [*own, *KNOWN], n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"its arguments are {', '.join(sorted(own))}"
            problems.append(f"'{name}' must be an argument of the model arcmerge, got {value!r}; {hint}")
    if problems:
        raise ArcmergeError(problems)
    return ignored
