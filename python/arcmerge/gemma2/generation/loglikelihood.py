"""Log-probabilities of given tokens; the lm_head runs only where a token is scored.

A prefix that several sequences share, as the answers to one question share the question, goes through the network once.
Then every sequence continues in its own row of the cache, to which the keys and values of the prefix are copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from arcmerge import ops
from arcmerge.gemma2.generation.generate import check_token_ids
from arcmerge.gemma2.runtime.arrival import Arrival
from arcmerge.gemma2.runtime.kept_graphs import PASS_TOKENS
from arcmerge.gemma2.runtime.kv_cache import Batch
from arcmerge.gemma2.runtime.model_lock import with_lock
from arcmerge.gemma2.runtime.network import Network
from arcmerge.gemma2.runtime.runner import Runner

# Slots of a cache of all layers, which shared prefixes need: 55 MB of 2.6B. For this many tokens the arithmetic takes
# 16 s on two cores of an EPYC 7003, reading the weights once more 0.3 s.
PREFIX_SLOTS = 512


class Score(NamedTuple):
    """The score of one continuation.

    Attributes:
        logprob: natural logarithm of the probability of all its tokens together.
        is_greedy: whether each of them is the most probable one.
    """

    logprob: float
    is_greedy: bool


@dataclass
class _Segment:
    """Tokens that go through the network. scored: for a position, the (sequence, token) whose probability it gives."""

    tokens: Sequence[int]
    scored: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def score_at(self, position: int, sequence: int, token: int) -> None:
        self.scored.setdefault(position, []).append((sequence, token))


# The (sequence, token) pairs that a pass scores; their log-probabilities, and the most probable tokens.
_Found = tuple[list[tuple[int, int]], Arrival]


@dataclass
class _Group:
    """Sequences with a common prefix, and the rest of each."""

    prefix: _Segment
    suffixes: list[_Segment]

    @property
    def rows(self) -> int:
        return max(1, len(self.suffixes))

    @property
    def length(self) -> int:
        return len(self.prefix.tokens) + max((len(suffix.tokens) for suffix in self.suffixes), default=0)


@with_lock
def score_sequences(network: Network, sequences: Sequence[tuple[Sequence[int], int]]) -> list[Score]:
    """Score the last tokens of each sequence.

    Sequences of similar length go through the network together, without padding: a score depends on the other
    sequences only up to rounding.

    Args:
        network: the model.
        sequences: (token ids, how many of the last ones are scored: at most all but the first).

    Raises:
        ArcmergeError: if a sequence is empty or has a token id that is not in the vocabulary.
    """
    check_token_ids(network, [tokens for tokens, _ in sequences], "pairs")
    found: list[_Found] = []
    groups = _by_prefix(sequences)
    single = [group for group in groups if not group.suffixes]
    for batch in _batches(single, PASS_TOKENS):
        segments = [group.prefix for group in batch]
        total = sum(len(segment.tokens) for segment in segments)
        # A single pass needs the cache of one layer only.
        runner = Runner(network, len(segments), max(group.length for group in batch), transient=total <= PASS_TOKENS)
        found += _scored(network, segments, runner.feed([segment.tokens for segment in segments]))
    for batch in _batches([group for group in groups if group.suffixes], PREFIX_SLOTS):
        found += _scored_with_prefixes(network, batch)
    scores = [Score(0.0, True)] * len(sequences)
    for scored, arrival in found:  # the first one is waited for after everything is launched
        for (sequence, token), logprob, choice in zip(scored, *arrival.lists(), strict=True):
            before = scores[sequence]
            scores[sequence] = Score(before.logprob + logprob, before.is_greedy and choice == token)
    network.weights.require_read()
    return scores


def _by_prefix(sequences: Sequence[tuple[Sequence[int], int]]) -> list[_Group]:
    """Group sequences by the tokens before the scored ones. The last token predicts nothing and is left out."""
    by_context: dict[tuple[int, ...], list[int]] = {}
    for index, (tokens, count) in enumerate(sequences):
        if count:
            by_context.setdefault(tuple(tokens[: len(tokens) - count]), []).append(index)
    groups = []
    for context, indices in by_context.items():
        if len(indices) == 1:  # nothing to share: one segment
            context = tuple(sequences[indices[0]][0][:-1])
        group = _Group(_Segment(context), [])
        for index in indices:
            tokens, count = sequences[index]
            suffix = _Segment(tokens[len(context) : -1])
            for position in range(len(tokens) - count - 1, len(tokens) - 1):
                segment = group.prefix if position < len(context) else suffix
                segment.score_at(position, index, tokens[position + 1])
            if suffix.tokens:
                group.suffixes.append(suffix)
        groups.append(group)
    return groups


def _batches(groups: Iterable[_Group], max_slots: int) -> list[list[_Group]]:
    """Groups that go through the network together, the longest first: one group, or several in `max_slots` slots."""
    batches: list[list[_Group]] = []
    free = 0
    for group in sorted(groups, key=lambda group: -group.length):
        slots = group.rows * group.length
        if not batches or slots > free:
            batches.append([])
            free = max_slots
        batches[-1].append(group)
        free -= slots
    return batches


def _scored_with_prefixes(network: Network, batch: Sequence[_Group]) -> Iterator[_Found]:
    suffixes = [suffix for group in batch for suffix in group.suffixes]
    prefixes: list[_Segment] = []
    sources: list[int] = []
    for group in batch:  # the prefix goes through the first row of its group
        sources += [len(sources)] * group.rows
        prefixes += [group.prefix, *[_Segment(())] * (group.rows - 1)]
    runner = Runner(network, len(suffixes), max(group.length for group in batch))
    yield from _scored(network, prefixes, runner.feed([segment.tokens for segment in prefixes]))
    runner.copy_rows(sources)
    yield from _scored(network, suffixes, runner.feed([segment.tokens for segment in suffixes]))


def _scored(network: Network, segments: Sequence[_Segment], passes: Iterator[tuple[Batch, Tensor]]) -> Iterator[_Found]:
    """The log-probabilities that these passes of the segments give."""
    device = network.weights.norm.device
    for batch, hidden in passes:
        rows, scored = [], []
        for row, (segment, position) in enumerate(batch.places):
            for one in segments[segment].scored.get(position, ()):
                rows.append(row)
                scored.append(one)
        if not rows:
            continue
        # Copies from memory that is not pinned wait for all earlier work, unless they are allowed not to.
        logprobs, best = ops.lm_head_logprob(
            hidden.index_select(0, torch.tensor(rows).to(device, non_blocking=True)),
            network.weights.lm_head,
            torch.tensor([token for _, token in scored]).to(device, non_blocking=True),
            softcap=network.config.final_logit_softcapping,
            stepwise=network.stepwise,
        )
        yield scored, Arrival(logprobs, best)
