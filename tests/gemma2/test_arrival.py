"""Tokens are chosen where the network is, and read by the host later."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from arcmerge import ops
from arcmerge.gemma2.generation.sampler import Sampler, SamplingParams
from arcmerge.gemma2.runtime.arrival import read_late
from operands import normal
from random_network import TINY, config_of, random_network


@pytest.mark.parametrize(("late", "order"), [(0, "0a1b2c"), (1, "01a2bc"), (2, "012abc"), (9, "012abc")])
def test_values_are_read_after_later_ones_have_been_produced(late: int, order: str) -> None:
    log = []

    def produced() -> Iterator[Tensor]:
        for number in range(3):
            log.append(str(number))
            yield torch.tensor([number])

    for [value] in read_late(produced(), late):
        log.append("abc"[value])
    assert "".join(log) == order


def test_every_chosen_token_is_marked_as_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    network = random_network(config_of(TINY, max_position_embeddings=64), torch.device("cpu"))
    chosen = iter([torch.tensor([31, 64]), torch.tensor([0, 95]), torch.tensor([63, 1])])
    seen: list[Tensor] = []

    def sample(*_: Tensor, **named: Tensor) -> Tensor:
        seen.append(named["seen"].clone())
        return next(chosen)

    monkeypatch.setattr(ops, "lm_head_draw", sample)
    sampler = Sampler(network, SamplingParams(repetition_penalty=1.5), [[2, 31], [33]], range(2))
    for _ in range(3):
        sampler.choose(normal(2, network.config.hidden_size))
    marked = [
        [[word * 32 + bit for word, bits in enumerate(row) for bit in range(32) if bits >> bit & 1] for row in step]
        for step in (each.tolist() for each in seen)
    ]
    assert marked == [[[2, 31], [33]], [[2, 31], [33, 64]], [[0, 2, 31], [33, 64, 95]]]
