"""The generation arguments of an lm-eval request, read as `hf` passes them to transformers' generate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.arguments import read_strings
from arcmerge.gemma2.generation.generation_config import READERS, GenerationConfig, has_effect
from arcmerge.gemma2.generation.sampler import SamplingParams

# The default of transformers' generate.
_TOP_K = 50


@dataclass(frozen=True)
class GenerationArguments:
    """The generation arguments of a request.

    Attributes:
        sampling_params: how tokens are chosen.
        stop_strings: end an answer; they include the text of the EOS token.
        max_new_tokens: of an answer.
        max_length: of prompt and answer together; None: not given.
        stop_token_ids: end an answer; None: the model's.
        warnings: about arguments without effect.
    """

    sampling_params: SamplingParams
    stop_strings: list[str]
    max_new_tokens: int
    max_length: int | None
    stop_token_ids: set[int] | None
    warnings: list[str]

    @classmethod
    def read(
        cls, options: Mapping[str, Any], defaults: GenerationConfig, max_gen_toks: int, eos: str
    ) -> GenerationArguments:
        """Read the arguments of a request.

        Args:
            options: of the request.
            defaults: of the model.
            max_gen_toks: for requests that do not set it.
            eos: the text of the EOS token.

        Raises:
            ArcmergeError: if a value is impossible.
        """
        if not isinstance(options, Mapping):
            raise ArcmergeError(f"'gen_kwargs' must be a mapping of names to values, got {options!r:.80}")
        read_strings("until", [stop for stop in _listed(options.get("until") or []) if stop != ""])
        try:
            given = dict(normalize_gen_kwargs(dict(options), max_gen_toks))
            stops = handle_stop_sequences(list(given.pop("until")), eos=eos)
            if isinstance(given.get("temperature"), str):  # as from the command line
                given["temperature"] = float(given["temperature"])
        except (TypeError, ValueError) as error:
            raise ArcmergeError(f"'gen_kwargs' must be readable by lm-eval, got {dict(options)}; {error}") from error
        max_new_tokens, seed = int(given.pop("max_gen_toks")), given.pop("seed", None)
        if max_new_tokens < 1:
            raise ArcmergeError(f"'max_gen_toks' must be 1 or more, got {max_new_tokens}")
        config = defaults.changed({name: value for name, value in given.items() if name in READERS})
        config = config if config.top_k is not None else replace(config, top_k=_TOP_K)
        return cls(
            # Without a seed, one from torch's generator, which lm-eval's --seed sets; a second call draws anew.
            sampling_params=config.sampling_params(None if seed is None else int(seed)).seeded(),
            stop_strings=[stop for stop in (*stops, *(config.stop_strings or ())) if stop],
            max_new_tokens=max_new_tokens,
            max_length=config.max_length if "max_length" in given else None,
            stop_token_ids=set(config.eos_token_id or ()) if "eos_token_id" in given else None,
            warnings=[
                f"the generation argument '{name}={value}' has no effect with the model arcmerge"
                for name, value in given.items()
                if has_effect(name, value)
            ]
            + ["the stop string '' has no effect with the model arcmerge"] * ("" in stops),
        )


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]
