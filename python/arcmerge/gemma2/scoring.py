"""Log-probabilities of given tokens, with the head computed only where one is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from arcmerge import ops
from arcmerge.gemma2.generation import require_tokens
from arcmerge.gemma2.network import Network
from arcmerge.gemma2.sequences import PASS_TOKENS, Sequences


class Score(NamedTuple):
    """logprob: natural logarithm, of all scored tokens together. greedy: each was the most probable where it stood."""

    logprob: float
    greedy: bool


def score(network: Network, sequences: Sequence[tuple[Sequence[int], int]]) -> list[Score]:
    """Scores of the last tokens of each sequence: (tokens, how many of them, at most all but the first).

    Sequences of like length go through the network together; none is padded, and company changes no score.
    """
    require_tokens(network, [tokens for tokens, _ in sequences])
    scores: list[Score] = [Score(0.0, True)] * len(sequences)
    for group in _groups([len(tokens) for tokens, _ in sequences]):
        found = _score_group(network, [sequences[number] for number in group])
        for number, one in zip(group, found, strict=True):
            scores[number] = one
    return scores


def _groups(lengths: Sequence[int]) -> list[list[int]]:
    """Numbers of sequences that go together, the longest first: at most PASS_TOKENS tokens, or one sequence."""
    groups: list[list[int]] = []
    room = 0
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        if not groups or lengths[number] > room:
            groups.append([])
            room = PASS_TOKENS
        groups[-1].append(number)
        room -= lengths[number]
    return groups


def _score_group(network: Network, group: Sequence[tuple[Sequence[int], int]]) -> list[Score]:
    # The last token predicts nothing that is asked for.
    inputs = [tokens[:-1] for tokens, _ in group]
    total = sum(map(len, inputs))
    scores = [Score(0.0, True)] * len(group)
    if not total:
        return scores
    # In a single pass, whose cache is then that of one layer.
    sequences = Sequences(network, len(group), max(map(len, inputs)), transient=total <= PASS_TOKENS)
    device = network.weights.norm.device
    for batch, hidden in sequences.feed(inputs):
        owners, positions = batch.sequences.tolist(), batch.positions.tolist()
        rows, targets, scored_owners = [], [], []
        for row, (owner, position) in enumerate(zip(owners, positions, strict=True)):
            tokens, count = group[owner]
            if position + 1 >= len(tokens) - count:
                rows.append(row)
                targets.append(tokens[position + 1])
                scored_owners.append(owner)
        if not rows:
            continue
        logprobs, best = ops.head_logprob(
            hidden[torch.tensor(rows, device=device)],
            network.weights.embed_tokens,
            torch.tensor(targets, device=device),
            network.config.final_logit_softcapping,
            network.stepwise,
        )
        for owner, logprob, choice, target in zip(
            scored_owners, logprobs.tolist(), best.tolist(), targets, strict=True
        ):
            so_far = scores[owner]
            scores[owner] = Score(so_far.logprob + logprob, so_far.greedy and choice == target)
    return scores
