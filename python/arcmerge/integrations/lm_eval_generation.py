"""The generation arguments of an lm-eval request, as its own `hf` passes them to transformers' generate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.sampling import Sampling

# Of transformers' generate where neither the request nor generation_config.json says otherwise.
_TOP_K = 50
_SAMPLED = ("temperature", "top_k", "top_p", "min_p")
_OWN = {*_SAMPLED, "do_sample", "repetition_penalty", "seed", "max_length", "eos_token_id", "until", "max_gen_toks"}
# They change no token: how transformers computes and what it returns beside the tokens.
_NEUTRAL = {"use_cache", "cache_implementation", "pad_token_id", "bos_token_id", "return_dict_in_generate"}
# What asks for nothing, where that is not None, 0, 1 or false.
_NOTHING = {"early_stopping": (False, True, "never"), "typical_p": (1.0,), "length_penalty": (1.0,)}


@dataclass(frozen=True)
class GenerationArguments:
    """How a request is answered.

    stops: strings that end an answer, and the text of the end-of-text token among them. max_new_tokens, max_length:
    tokens of an answer, and of prompt and answer together where that is given. ends: token ids that end an answer, None
    for the model's. ignored: sentences about arguments without effect.
    """

    sampling: Sampling
    stops: list[str]
    max_new_tokens: int
    max_length: int | None
    ends: set[int] | None
    ignored: list[str]

    @classmethod
    def read(
        cls, options: Mapping[str, Any], defaults: Mapping[str, Any], max_gen_toks: int, end: str, seed: int
    ) -> GenerationArguments:
        """options: of the request. defaults: of the model's generation_config.json. end: the text of its last token.

        max_gen_toks: where the request does not say. seed: of draws, where it does not.
        Raises ArcmergeError for values that no generation can have.
        """
        try:
            given = dict(normalize_gen_kwargs(dict(options), max_gen_toks))
            stops = handle_stop_sequences(list(given.pop("until")), eos=end)
        except (TypeError, ValueError) as error:
            raise ArcmergeError(f"the generation arguments {dict(options)} cannot be read: {error}") from error
        given = {name: value for name, value in given.items() if value is not None}
        wanted = {"top_k": _TOP_K, **{name: value for name, value in defaults.items() if value is not None}, **given}
        drawn = bool(given.get("do_sample")) and wanted.get("temperature", 1.0) != 0
        sampling = Sampling(
            do_sample=drawn,
            repetition_penalty=wanted.get("repetition_penalty", 1.0),
            seed=int(given.get("seed", seed)),
            **({name: wanted[name] for name in _SAMPLED if name in wanted} if drawn else {}),
        )
        ends = given.get("eos_token_id")
        return cls(
            sampling=sampling,
            stops=[stop for stop in stops if stop],
            max_new_tokens=int(given["max_gen_toks"]),
            max_length=int(given["max_length"]) if "max_length" in given else None,
            ends=None if ends is None else ({ends} if isinstance(ends, int) else set(ends)),
            ignored=[
                f"the generation argument '{name}={value}' has no effect with the model arcmerge"
                for name, value in given.items()
                if name not in _OWN and name not in _NEUTRAL and not name.startswith("output_")
                if value not in _NOTHING.get(name, (0, 1, False))
            ],
        )
