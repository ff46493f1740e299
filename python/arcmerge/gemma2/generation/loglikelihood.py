"""Log-probabilities of given tokens, with the head computed only where one is asked for.

What several sequences share, as the answers to a question share the question, goes through the network once. Then each
goes on in a lane of the cache of its own, to which the keys and values of what is shared are copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from arcmerge import ops
from arcmerge.gemma2.generation.generate import require_tokens
from arcmerge.gemma2.runtime.kv_cache import Batch
from arcmerge.gemma2.runtime.model_lock import with_lock
from arcmerge.gemma2.runtime.network import Network
from arcmerge.gemma2.runtime.runner import PASS_TOKENS, Runner

# Slots of a cache of all layers, which branches need: 55 MB of 2.6B. Of as many tokens arithmetic takes 16 s on two
# cores of an EPYC 7003, reading the weights once more 0.3 s.
BRANCH_SLOTS = 512


class Score(NamedTuple):
    """logprob: natural logarithm, of all scored tokens together. greedy: each was the most probable where it stood."""

    logprob: float
    greedy: bool


@dataclass
class _Lane:
    """Tokens that go through the network, and the tokens that are asked for after a position: (sequence, token)."""

    tokens: Sequence[int]
    asked: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def ask(self, position: int, sequence: int, token: int) -> None:
        self.asked.setdefault(position, []).append((sequence, token))


@dataclass
class _Family:
    """Sequences that begin alike: what is shared, and the lanes that go on from it, of no tokens but theirs."""

    shared: _Lane
    branches: list[_Lane]

    @property
    def lanes(self) -> int:
        return max(1, len(self.branches))

    @property
    def length(self) -> int:
        return len(self.shared.tokens) + max((len(branch.tokens) for branch in self.branches), default=0)


@with_lock
def score(network: Network, sequences: Sequence[tuple[Sequence[int], int]]) -> list[Score]:
    """Scores of the last tokens of each sequence: (tokens, how many of them, at most all but the first).

    Sequences of like length go through the network together, and none is padded: company changes a score by rounding
    alone.
    """
    require_tokens(network, [tokens for tokens, _ in sequences], "pair")
    scores = [Score(0.0, True)] * len(sequences)
    families = _families(sequences)
    alone = [family for family in families if not family.branches]
    for group in _groups(alone, PASS_TOKENS):
        lanes = [family.shared for family in group]
        total = sum(len(lane.tokens) for lane in lanes)
        # In a single pass, whose cache is then that of one layer.
        cached = Runner(network, len(lanes), max(family.length for family in group), transient=total <= PASS_TOKENS)
        _add(scores, network, lanes, cached.feed([lane.tokens for lane in lanes]))
    for group in _groups([family for family in families if family.branches], BRANCH_SLOTS):
        _score_branches(scores, network, group)
    network.weights.require_read()
    return scores


def _families(sequences: Sequence[tuple[Sequence[int], int]]) -> list[_Family]:
    """By what stands before the scored tokens. The last token predicts nothing, so it does not go through."""
    by_context: dict[tuple[int, ...], list[int]] = {}
    for number, (tokens, count) in enumerate(sequences):
        if count:
            by_context.setdefault(tuple(tokens[: len(tokens) - count]), []).append(number)
    families = []
    for context, numbers in by_context.items():
        if len(numbers) == 1:  # nothing to share: all of it in one go
            context = tuple(sequences[numbers[0]][0][:-1])
        family = _Family(_Lane(context), [])
        for number in numbers:
            tokens, count = sequences[number]
            branch = _Lane(tokens[len(context) : -1])
            for position in range(len(tokens) - count - 1, len(tokens) - 1):
                lane = family.shared if position < len(context) else branch
                lane.ask(position, number, tokens[position + 1])
            if branch.tokens:
                family.branches.append(branch)
        families.append(family)
    return families


def _groups(families: Iterable[_Family], most: int) -> list[list[_Family]]:
    """Those that go together, the longest first: at most so many slots of the cache, or one family."""
    groups: list[list[_Family]] = []
    room = 0
    for family in sorted(families, key=lambda family: -family.length):
        slots = family.lanes * family.length
        if not groups or slots > room:
            groups.append([])
            room = most
        groups[-1].append(family)
        room -= slots
    return groups


def _score_branches(scores: list[Score], network: Network, group: Sequence[_Family]) -> None:
    lanes = [branch for family in group for branch in family.branches]
    shared: list[_Lane] = []
    sources: list[int] = []
    for family in group:  # what is shared goes through the first lane of each
        sources += [len(sources)] * family.lanes
        shared += [family.shared, *[_Lane(())] * (family.lanes - 1)]
    cached = Runner(network, len(lanes), max(family.length for family in group))
    _add(scores, network, shared, cached.feed([lane.tokens for lane in shared]))
    cached.fork(sources)
    _add(scores, network, lanes, cached.feed([lane.tokens for lane in lanes]))


def _add(scores: list[Score], network: Network, lanes: Sequence[_Lane], passes: Iterator[tuple[Batch, Tensor]]) -> None:
    """Add to the scores what is asked for of these passes of the lanes."""
    device = network.weights.norm.device
    for batch, hidden in passes:
        rows, asked = [], []
        for row, (lane, position) in enumerate(zip(batch.sequences.tolist(), batch.positions.tolist(), strict=True)):
            for one in lanes[lane].asked.get(position, ()):
                rows.append(row)
                asked.append(one)
        if not rows:
            continue
        logprobs, best = ops.lm_head_logprob(
            hidden[torch.tensor(rows, device=device)],
            network.weights.head,
            torch.tensor([token for _, token in asked], device=device),
            softcap=network.config.final_logit_softcapping,
            stepwise=network.stepwise,
        )
        for (sequence, token), logprob, choice in zip(asked, logprobs.tolist(), best.tolist(), strict=True):
            before = scores[sequence]
            scores[sequence] = Score(before.logprob + logprob, before.greedy and choice == token)
