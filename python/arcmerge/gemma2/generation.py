"""Generation: prompts in, one token after another out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.network import Network
from arcmerge.gemma2.sampling import Chooser, Sampling
from arcmerge.gemma2.sequences import Sequences


@dataclass
class Generated:
    """tokens: the answer to every prompt, the token that ended it included. Seconds of the two phases, wall clock."""

    tokens: list[list[int]]
    prompt_tokens: int
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0


@dataclass
class Limits:
    """When an answer ends: after so many tokens, with one of the ends, or when `on_token` says so.

    on_token(row, token): called with each new token; true ends the answer of that row.
    """

    max_new_tokens: int
    ends: Collection[int]
    on_token: Callable[[int, int], bool] = field(default=lambda row, token: False)


def generate(network: Network, prompts: Sequence[Sequence[int]], sampling: Sampling, limits: Limits) -> Generated:
    """Answers to prompts of one or more tokens each; a prompt's answer does not depend on its company.

    Raises ArcmergeError for an empty prompt, a token beyond the vocabulary, or more tokens than the model was made for.
    """
    require_tokens(network, prompts)
    if limits.max_new_tokens < 1:
        raise ArcmergeError(f"'max_new_tokens' must be 1 or more, is {limits.max_new_tokens}.")
    # The last token is not fed back.
    capacity = max(map(len, prompts)) + limits.max_new_tokens - 1
    sequences = Sequences(network, len(prompts), capacity)
    chooser = Chooser(network, sampling, prompts)
    result = Generated([[] for _ in prompts], sum(map(len, prompts)))

    started = perf_counter()
    chosen = chooser.choose(sequences.feed_for_last(prompts))
    result.prefill_seconds = perf_counter() - started
    started = perf_counter()
    awake = [True] * len(prompts)
    while True:
        for row, token in enumerate(chosen):
            if awake[row]:
                result.tokens[row].append(token)
                full = len(result.tokens[row]) == limits.max_new_tokens
                awake[row] = not (limits.on_token(row, token) or token in limits.ends or full)
        if not any(awake):
            break
        fed = [token if alive else None for token, alive in zip(chosen, awake, strict=True)]
        chosen = chooser.choose(sequences.step(fed))
        result.steps += 1
    result.decode_seconds = perf_counter() - started
    return result


def require_tokens(network: Network, prompts: Sequence[Sequence[int]]) -> None:
    """Raises ArcmergeError unless there are prompts, each of one token or more, all of them in the vocabulary."""
    if not prompts:
        raise ArcmergeError("there must be at least one prompt.")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ArcmergeError(f"prompt {number} must have at least one token: begin with BOS.")
        for token in prompt:
            if not 0 <= token < network.config.vocab_size:
                raise ArcmergeError(
                    f"prompt {number} has the token {token}; the vocabulary goes from 0 to "
                    f"{network.config.vocab_size - 1}."
                )
