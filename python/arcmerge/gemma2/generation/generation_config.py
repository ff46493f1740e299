"""The options of generation: those of a call, else those of generation_config.json, else greedy decoding."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arcmerge.checkpoint.header import parse_object
from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.arguments import read_bool, read_number, read_strings, read_token_ids, read_whole
from arcmerge.gemma2.generation.sampler import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from typing_extensions import TypedDict

    class GenerateArguments(TypedDict, total=False):
        """The keyword arguments of Gemma2.generate."""

        max_new_tokens: int | None
        max_length: int | None
        do_sample: bool | None
        temperature: float | None
        top_k: int | None
        top_p: float | None
        min_p: float | None
        repetition_penalty: float | None
        seed: int | None
        eos_token_id: int | Iterable[int] | None
        pad_token_id: int | None
        stop: str | Sequence[str] | None
        stream: Callable[[Any], object] | None


FILE = "generation_config.json"
# The default without a call's argument and without the file's setting.
_MAX_NEW_TOKENS = 256

READERS: dict[str, Callable[[str, Any], Any]] = {
    "do_sample": read_bool,
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), read_number),
    **dict.fromkeys(("top_k", "max_new_tokens", "max_length", "pad_token_id"), read_whole),
    "eos_token_id": read_token_ids,
    "stop_strings": read_strings,
}
# Options that change no token: further outputs, ways to compute, and options of beam search, which num_beams selects.
_WITHOUT_EFFECT = {
    *("transformers_version", "bos_token_id", "decoder_start_token_id", "use_cache", "cache_implementation"),
    *("cache_config", "compile_config", "disable_compile", "return_dict_in_generate", "renormalize_logits"),
    *("remove_invalid_values", "early_stopping", "length_penalty", "diversity_penalty", "low_memory"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind", "assistant_early_exit", "max_matching_ngram_size"),
    *("prompt_lookup_num_tokens", "is_assistant", "generation_kwargs", "prefill_chunk_size", "trust_remote_code"),
}
# Values, other than false ones, that mean that an option is off.
_OFF = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), 1),
    **dict.fromkeys(("typical_p", "encoder_repetition_penalty", "guidance_scale"), 1.0),
}


@dataclass(frozen=True)
class GenerationConfig:
    """The options that are set, under the names of transformers' GenerationConfig; None: not set.

    The defaults are those of `SamplingParams` and 256 new tokens; transformers' own are 20 tokens and top_k 50.
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
        """The options in the generation_config.json of a folder, none if it has no such file.

        Options that arcmerge does not support are ignored with a warning.

        Raises:
            ArcmergeError: if an option has an impossible value.
        """
        path = folder / FILE
        if not path.exists():
            return cls()
        listed = parse_object(path.read_bytes(), path)
        try:
            config = cls().changed({name: value for name, value in listed.items() if name in READERS})
            config.sampling_params()
            config.check_lengths()
        except ArcmergeError as error:
            raise ArcmergeError([f"{path}: {problem}" for problem in error.problems]) from error
        if unsupported := [name for name, value in listed.items() if has_effect(name, value)]:
            named = ", ".join(f"'{name}'" for name in unsupported)
            warnings.warn(f"{path}: ignored {named}, which arcmerge does not support", stacklevel=4)
        return config

    def changed(self, arguments: Mapping[str, Any]) -> GenerationConfig:
        """These options overridden by the arguments of a call that are not None; one length replaces the other."""
        given = {name: READERS[name](name, value) for name, value in arguments.items() if value is not None}
        config = self
        if "max_length" in given and "max_new_tokens" not in given:
            config = replace(config, max_new_tokens=None)
        return replace(config, **given)

    @property
    def settings(self) -> dict[str, Any]:
        """The options that are set, by name."""
        return {one.name: value for one in fields(self) if (value := getattr(self, one.name)) is not None}

    def sampling_params(self, seed: int | None = None) -> SamplingParams:
        """The options of sampling, with this seed."""
        names = {one.name for one in fields(SamplingParams)}
        return SamplingParams(**{name: value for name, value in self.settings.items() if name in names}, seed=seed)

    def check_lengths(self) -> None:
        """Raise ArcmergeError if a maximum length is below 1."""
        for name in ("max_new_tokens", "max_length"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ArcmergeError(f"'{name}' must be 1 or more, got {value!r:.80}")

    @property
    def max_answer_tokens(self) -> int:
        """The maximum number of tokens of an answer, for any prompt."""
        return self.max_new_tokens or self.max_length or _MAX_NEW_TOKENS

    def max_new_tokens_for(self, prompt_tokens: int) -> int:
        """The maximum number of tokens of an answer to a prompt; ArcmergeError if max_length leaves none."""
        self.check_lengths()
        if self.max_new_tokens is not None or self.max_length is None:
            return self.max_answer_tokens
        if prompt_tokens >= self.max_length:
            raise ArcmergeError(
                f"'max_length' must be above the {prompt_tokens} tokens of the prompt, which it includes, got "
                f"{self.max_length}; give max_new_tokens instead"
            )
        return self.max_length - prompt_tokens


def has_effect(name: str, value: Any) -> bool:
    """Whether an option that is not in READERS would change the tokens that transformers generates."""
    if name in READERS or name in _WITHOUT_EFFECT or name.startswith(("_", "output_")):
        return False
    return bool(value) and value != _OFF.get(name)
