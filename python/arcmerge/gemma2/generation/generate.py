"""Generation: prompts in, one token after another out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from arcmerge.errors import ArcmergeError, counted
from arcmerge.gemma2.generation.sampler import Sampler, SamplingParams
from arcmerge.gemma2.runtime.model_lock import with_lock
from arcmerge.gemma2.runtime.network import Network
from arcmerge.gemma2.runtime.runner import Runner


@dataclass
class Generated:
    """tokens: the answer to every prompt, the token that ended it included. Seconds of the two phases, wall clock.

    seed: of the draws, None where none were made. cut: the rows whose answer ended because the context was full, where
    more tokens had been asked for.
    """

    tokens: list[list[int]]
    prompt_tokens: int
    seed: int | None = None
    cut: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0

    def cut_sentence(self, context: int) -> str:
        """What to say about answers that were cut. context: tokens that the model was made for."""
        tokens = counted(len(self.tokens[self.cut[0]]), "token")
        return f"the answer ends after {tokens}, where the {context} of the model's max_position_embeddings are full"


@dataclass
class StoppingCriteria:
    """When an answer ends: after so many tokens, with one of the ends, or when `on_token` says so.

    It ends as well where prompt and answer come to the model's max_position_embeddings; a prompt of that length has an
    answer of one token.

    on_token(row, token): called with each new token; true ends the answer of that row.
    """

    max_new_tokens: int
    ends: Collection[int]
    on_token: Callable[[int, int], bool] = field(default=lambda row, token: False)


@with_lock
def generate(
    network: Network,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingParams,
    limits: StoppingCriteria,
    streams: Sequence[int] | None = None,
) -> Generated:
    """Answers to prompts of one or more tokens each; a prompt's answer does not depend on its company.

    streams: from which of the seed's streams of random numbers each answer is drawn, by default that of its place.

    Raises ArcmergeError for an empty prompt, a token beyond the vocabulary, or a prompt of more tokens than the model
    was made for.
    """
    require_tokens(network, prompts)
    context = network.config.max_position_embeddings
    longest = max(map(len, prompts))
    if longest > context:
        raise ArcmergeError(
            f"the prompt's {longest} tokens are more than the {context} of the model's max_position_embeddings: "
            "shorten the prompt."
        )
    if limits.max_new_tokens < 1:
        raise ArcmergeError(f"'max_new_tokens' must be 1 or more, is {limits.max_new_tokens}.")
    most = [min(limits.max_new_tokens, max(1, context - len(prompt))) for prompt in prompts]
    # The last token is not fed back.
    capacity = max(len(prompt) + new - 1 for prompt, new in zip(prompts, most, strict=True))
    sequences = Runner(network, len(prompts), capacity)
    sampling = sampling.seeded()
    chooser = Sampler(network, sampling, prompts, range(len(prompts)) if streams is None else streams)
    result = Generated([[] for _ in prompts], sum(map(len, prompts)), sampling.seed if sampling.draws else None)

    started = perf_counter()
    chosen = chooser.choose(sequences.feed_for_last(prompts))
    result.prefill_seconds = perf_counter() - started
    started = perf_counter()
    awake = [True] * len(prompts)
    while True:
        for row, token in enumerate(chosen):
            if awake[row]:
                result.tokens[row].append(token)
                ended = limits.on_token(row, token) or token in limits.ends
                full = len(result.tokens[row]) == most[row]
                awake[row] = not (ended or full)
                if full and not ended and most[row] < limits.max_new_tokens:
                    result.cut.append(row)
        if not any(awake):
            break
        network.pause_if_exiting()
        fed = [token if alive else None for token, alive in zip(chosen, awake, strict=True)]
        chosen = chooser.choose(sequences.step(fed))
        result.steps += 1
    result.decode_seconds = perf_counter() - started
    network.weights.require_read()
    return result


def require_tokens(network: Network, prompts: Sequence[Sequence[int]], called: str = "prompt") -> None:
    """Raises ArcmergeError unless there are prompts, each of one token or more, all of them in the vocabulary.

    called: what the sentence calls one of them.
    """
    if not prompts:
        raise ArcmergeError(f"there must be at least one {called}.")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ArcmergeError(f"{called} {number} must have at least one token: begin with BOS.")
        for token in prompt:
            if not 0 <= token < network.config.vocab_size:
                raise ArcmergeError(
                    f"{called} {number} has the token {token!r:.80}; the vocabulary goes from 0 to "
                    f"{network.config.vocab_size - 1}."
                )
