"""Generation on token ids: prompts in, one token after another out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter

from torch import Tensor

from arcmerge.errors import ArcmergeError, counted
from arcmerge.gemma2.generation.sampler import Sampler, SamplingParams
from arcmerge.gemma2.runtime.arrival import read_late
from arcmerge.gemma2.runtime.bandwidth import read_bandwidth
from arcmerge.gemma2.runtime.model_lock import with_lock
from arcmerge.gemma2.runtime.network import Network
from arcmerge.gemma2.runtime.runner import Runner
from arcmerge.gemma2.weights import Weights

# Bytes of weights above which decoding is bound by memory. Those of a smaller model stay in the caches, and a share of
# the memory's bandwidth means nothing.
BEYOND_CACHES = 1 << 28


@dataclass
class Generated:
    """The result of `generate`.

    Attributes:
        tokens: the answer to every prompt, with the token that ended it.
        prompt_tokens: the number of tokens of all prompts together.
        seed: of the random numbers; None for greedy decoding.
        truncated: indices of the answers that ended because the context was full.
        prefill_seconds, decode_seconds: wall clock.
        steps: the number of decoding steps, without one that was started before the end of all answers was known.
    """

    tokens: list[list[int]]
    prompt_tokens: int
    seed: int | None = None
    truncated: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0

    def truncation_warning(self, context: int) -> str:
        """A warning about truncated answers; context: the model's max_position_embeddings."""
        tokens = counted(len(self.tokens[self.truncated[0]]), "token")
        return f"the answer ends after {tokens}, as the model's max_position_embeddings of {context} are reached"

    def summary(self, weights: Weights) -> str:
        """One line: tokens, tokens per second, seed, and the share of memory bandwidth that decoding reached."""
        prompt, tokens = counted(self.prompt_tokens, "prompt token"), len(self.tokens[0])
        parts = [
            f"{prompt} at {self.prompt_tokens / self.prefill_seconds:.1f} a second",
            f"{tokens} new at {self.steps / self.decode_seconds:.1f}" if self.steps else f"{tokens} new",
        ]
        if self.seed is not None:
            parts.append(f"seed {self.seed}")
        if self.steps and weights.nbytes >= BEYOND_CACHES:
            reached = weights.nbytes * self.steps / self.decode_seconds
            roof = read_bandwidth(weights)
            parts.append(f"{reached / 1e9:.1f} GB/s, {reached / roof:.0%} of the memory's {roof / 1e9:.1f}")
        return ", ".join(parts)


@dataclass
class StoppingCriteria:
    """The conditions that end an answer, whichever comes first.

    An answer also ends where prompt and answer reach the model's max_position_embeddings; a prompt of that length gets
    an answer of one token.

    Args:
        max_new_tokens: of the answer.
        stop_token_ids: each ends an answer, as its last token.
        max_length: of prompt and answer together; above the length of every prompt.
        on_token: called with the index of the prompt and each new token of its answer; true ends the answer.
    """

    max_new_tokens: int
    stop_token_ids: Collection[int]
    max_length: int | None = None
    on_token: Callable[[int, int], bool] = field(default=lambda row, token: False)


@with_lock
def generate(
    network: Network,
    prompts: Sequence[Sequence[int]],
    sampling_params: SamplingParams,
    stopping_criteria: StoppingCriteria,
    random_streams: Sequence[int] | None = None,
) -> Generated:
    """Generate an answer to each prompt. An answer does not depend on the other prompts.

    On a GPU, tokens are read one step late: the next step already runs, and its result is dropped where an answer ends.

    Args:
        network: the model.
        prompts: token ids, one or more each.
        sampling_params: how tokens are chosen.
        stopping_criteria: when answers end.
        random_streams: for each prompt, the index of the seed's stream of random numbers; by default its own index.

    Raises:
        ArcmergeError: for an empty prompt, a token id that is not in the vocabulary, or a prompt of more tokens than
            the model's max_position_embeddings.
    """
    check_token_ids(network, prompts)
    context = network.config.max_position_embeddings
    longest = max(map(len, prompts))
    if longest > context:
        raise ArcmergeError(
            f"'prompt' must have at most {context} tokens, the model's max_position_embeddings, got {longest}; "
            "shorten it"
        )
    if stopping_criteria.max_new_tokens < 1:
        raise ArcmergeError(f"'max_new_tokens' must be 1 or more, got {stopping_criteria.max_new_tokens}")
    max_length = stopping_criteria.max_length
    asked = [
        stopping_criteria.max_new_tokens
        if max_length is None
        else min(stopping_criteria.max_new_tokens, max_length - len(prompt))
        for prompt in prompts
    ]
    limits = [min(new, max(1, context - len(prompt))) for prompt, new in zip(prompts, asked, strict=True)]
    # The last token is not fed back.
    capacity = max(len(prompt) + new - 1 for prompt, new in zip(prompts, limits, strict=True))
    runner = Runner(network, len(prompts), capacity, decodes=True)
    sampling_params = sampling_params.seeded()
    streams = range(len(prompts)) if random_streams is None else random_streams
    sampler = Sampler(network, sampling_params, prompts, streams)
    seed = sampling_params.seed if sampling_params.draws else None
    result = Generated([[] for _ in prompts], sum(map(len, prompts)), seed)

    running = [True] * len(prompts)

    def append(chosen: Sequence[int]) -> None:
        for row, token in enumerate(chosen):
            if running[row]:
                result.tokens[row].append(token)
                ended = stopping_criteria.on_token(row, token) or token in stopping_criteria.stop_token_ids
                full = len(result.tokens[row]) == limits[row]
                running[row] = not (ended or full)
                if full and not ended and limits[row] < asked[row]:
                    result.truncated.append(row)

    def steps(tokens: Tensor) -> Iterator[Tensor]:
        decoder = runner.decoder()
        for number in itertools.count(1):
            going = [alive and number < limit for alive, limit in zip(running, limits, strict=True)]
            if not any(going):
                return
            network.pause_if_exiting()
            tokens = decoder(tokens, going, sampler)
            yield tokens

    started = perf_counter()
    first = sampler.choose(runner.feed_for_last(prompts))
    append(first.tolist())
    result.prefill_seconds = perf_counter() - started
    started = perf_counter()
    for chosen in read_late(steps(first), late=1 if first.is_cuda else 0):
        append(chosen)
        result.steps += 1
        if not any(running):
            break
    result.decode_seconds = perf_counter() - started
    network.weights.require_read()
    return result


def check_token_ids(network: Network, sequences: Sequence[Sequence[int]], name: str = "prompts") -> None:
    """Raise ArcmergeError unless there are sequences, of one or more token ids of the vocabulary each.

    name: of the argument, for messages.
    """
    if not sequences:
        raise ArcmergeError(f"'{name}' must have at least one sequence of token ids, got none")
    for index, tokens in enumerate(sequences):
        if not len(tokens):
            raise ArcmergeError(f"'{name}[{index}]' must have one token id or more, got none; begin with BOS")
        for token in tokens:
            if not 0 <= token < network.config.vocab_size:
                raise ArcmergeError(
                    f"'{name}[{index}]' must have token ids from 0 to {network.config.vocab_size - 1}, the vocabulary "
                    f"of the model, got {token!r:.80}"
                )
