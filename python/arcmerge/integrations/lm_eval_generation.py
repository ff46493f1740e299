"""The generation arguments of an lm-eval request, as its own `hf` passes them to transformers' generate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.arguments import read_strings
from arcmerge.gemma2.generation.generation_config import READERS, GenerationConfig, has_effect
from arcmerge.gemma2.generation.sampler import SamplingParams

# Of transformers' generate, where neither the request nor generation_config.json says otherwise.
_TOP_K = 50


@dataclass(frozen=True)
class GenerationArguments:
    """How a request is answered.

    stops: strings that end an answer, the text of the end-of-text token among them. max_new_tokens: the most tokens of
    an answer. max_length: the most tokens of prompt and answer together, None where it is not given. ends: token ids
    that end an answer, None for the model's. ignored: sentences about arguments without effect.
    """

    sampling: SamplingParams
    stops: list[str]
    max_new_tokens: int
    max_length: int | None
    ends: set[int] | None
    ignored: list[str]

    @classmethod
    def read(
        cls, options: Mapping[str, Any], defaults: GenerationConfig, max_gen_toks: int, end: str
    ) -> GenerationArguments:
        """options: of the request. defaults: of the model. max_gen_toks: where the request does not say how many.

        end: the text of the end-of-text token. Raises ArcmergeError for values that no generation can have.
        """
        if not isinstance(options, Mapping):
            raise ArcmergeError(f"the generation arguments must be a mapping of names to values, got {options!r:.80}")
        read_strings("until", [stop for stop in _listed(options.get("until") or []) if stop != ""])
        try:
            given = dict(normalize_gen_kwargs(dict(options), max_gen_toks))
            stops = handle_stop_sequences(list(given.pop("until")), eos=end)
            if isinstance(given.get("temperature"), str):  # as the command line may leave it
                given["temperature"] = float(given["temperature"])
        except (TypeError, ValueError) as error:
            raise ArcmergeError(f"the generation arguments {dict(options)} cannot be read: {error}") from error
        max_new_tokens, seed = int(given.pop("max_gen_toks")), given.pop("seed", None)
        if max_new_tokens < 1:
            raise ArcmergeError(f"'max_gen_toks' must be 1 or more, got {max_new_tokens}")
        config = defaults.changed({name: value for name, value in given.items() if name in READERS})
        config = config if config.top_k is not None else replace(config, top_k=_TOP_K)
        return cls(
            # Without a seed from torch's generator: lm-eval's --seed holds, and a second call draws anew.
            sampling=config.sampling(None if seed is None else int(seed)).seeded(),
            stops=[stop for stop in (*stops, *(config.stop_strings or ())) if stop],
            max_new_tokens=max_new_tokens,
            max_length=config.max_length if "max_length" in given else None,
            ends=set(config.eos_token_id or ()) if "eos_token_id" in given else None,
            ignored=[
                f"the generation argument '{name}={value}' has no effect with the model arcmerge"
                for name, value in given.items()
                if has_effect(name, value)
            ]
            + ["the stop string '' has no effect with the model arcmerge"] * ("" in stops),
        )


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
