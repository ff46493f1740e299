"""How a model generates: as a call says, else as generation_config.json says, else greedily."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from arcmerge.checkpoint.header import parse_object
from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.arguments import read_number, read_strings, read_tokens, read_truth, read_whole
from arcmerge.gemma2.generation.sampler import SamplingParams

FILE = "generation_config.json"
# Where neither the call nor the file says.
_MAX_NEW_TOKENS = 256

READERS: dict[str, Callable[[str, Any], Any]] = {
    "do_sample": read_truth,
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), read_number),
    **dict.fromkeys(("top_k", "max_new_tokens", "max_length", "pad_token_id"), read_whole),
    "eos_token_id": read_tokens,
    "stop_strings": read_strings,
}
# They choose no token: what else generation returns, how it computes, and options of beams, which num_beams asks for.
_WITHOUT_EFFECT = {
    *("transformers_version", "bos_token_id", "decoder_start_token_id", "use_cache", "cache_implementation"),
    *("cache_config", "compile_config", "disable_compile", "return_dict_in_generate", "renormalize_logits"),
    *("remove_invalid_values", "early_stopping", "length_penalty", "diversity_penalty", "low_memory"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind", "assistant_early_exit", "max_matching_ngram_size"),
    *("prompt_lookup_num_tokens", "is_assistant", "generation_kwargs", "prefill_chunk_size", "trust_remote_code"),
}
# Ask for nothing, beside None, 0, False and what is empty.
_NOTHING = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("typical_p", "encoder_repetition_penalty", "guidance_scale"), 1.0),
}


@dataclass(frozen=True)
class GenerationConfig:
    """Fields have the names and meanings of transformers' GenerationConfig; None is not set.

    Not set, the defaults are those of `SamplingParams` and 256 new tokens: transformers' own are 20, and top_k 50.
    """

    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    eos_token_id: tuple[int, ...] | None = None
    pad_token_id: int | None = None
    stop_strings: tuple[str, ...] | None = None

    @classmethod
    def read(cls, folder: Path) -> GenerationConfig:
        """Of the folder's generation_config.json, if it has one; options without effect here are a warning.

        Raises ArcmergeError for a value that no generation can have.
        """
        path = folder / FILE
        if not path.exists():
            return cls()
        listed = parse_object(path.read_bytes(), path)
        try:
            config = cls().changed({name: value for name, value in listed.items() if name in READERS})
            config.sampling()
            config.require_lengths()
        except ArcmergeError as error:
            raise ArcmergeError([f"{path}: {problem}" for problem in error.problems]) from error
        if strange := [name for name, value in listed.items() if has_effect(name, value)]:
            named = ", ".join(f"'{name}'" for name in strange)
            warnings.warn(f"{path}: {named} cannot be followed here; generation goes on without.", stacklevel=4)
        return config

    def changed(self, arguments: Mapping[str, Any]) -> GenerationConfig:
        """With the arguments of a call, which win; None leaves an option as it is. A length takes the other's place."""
        given = {name: READERS[name](name, value) for name, value in arguments.items() if value is not None}
        config = self
        if "max_length" in given and "max_new_tokens" not in given:
            config = replace(config, max_new_tokens=None)
        return replace(config, **given)

    @property
    def settings(self) -> dict[str, Any]:
        """What is set, by name."""
        return {one.name: value for one in fields(self) if (value := getattr(self, one.name)) is not None}

    def sampling(self, seed: int | None = None) -> SamplingParams:
        names = {one.name for one in fields(SamplingParams)}
        return SamplingParams(**{name: value for name, value in self.settings.items() if name in names}, seed=seed)

    def require_lengths(self) -> None:
        """Raises ArcmergeError for an answer of no token."""
        for name in ("max_new_tokens", "max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ArcmergeError(f"'{name}' must be 1 or more, is {value!r:.80}.")

    @property
    def most_new_tokens(self) -> int:
        """Of an answer to whatever prompt."""
        return self.max_new_tokens or self.max_length or _MAX_NEW_TOKENS

    def new_tokens_after(self, prompt: int) -> int:
        """The most tokens of an answer to a prompt of so many; ArcmergeError if max_length leaves none."""
        self.require_lengths()
        if self.max_new_tokens is not None or self.max_length is None:
            return self.most_new_tokens
        if prompt >= self.max_length:
            raise ArcmergeError(
                f"'max_length' must be above the {prompt} tokens of the prompt, which it counts too, is "
                f"{self.max_length}; give max_new_tokens instead."
            )
        return self.max_length - prompt


def has_effect(name: str, value: Any) -> bool:
    """Whether an option that is none of READERS asks transformers for other tokens."""
    if name in READERS or name in _WITHOUT_EFFECT or name.startswith(("_", "output_")):
        return False
    return bool(value) and value != _NOTHING.get(name)
