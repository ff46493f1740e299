"""Decoding by replayed steps gives the tokens of generate; on the CPU the steps are plain calls."""

from __future__ import annotations

import pytest
import torch

from arcmerge.errors import ArcmergeError
from arcmerge.gemma2.cache import Batch, Cache
from arcmerge.gemma2.generation import Limits, generate
from arcmerge.gemma2.graph import DecodeGraph
from arcmerge.gemma2.network import Network
from arcmerge.gemma2.sampling import Sampling
from random_network import TINY, config_of, random_network

CPU = torch.device("cpu")
PROMPTS = [[2, 17, 5, 250, 99], [2, 44, 3, 8]]
STEPS = 9  # past the window of 8


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCMERGE_BACKEND", "reference")


@pytest.fixture(scope="module")
def network() -> Network:
    return random_network(config_of(TINY, max_position_embeddings=64), CPU)


def started(network: Network, first: list[int], capacity: int) -> DecodeGraph:
    """Prompts in the cache, and the first token of each answer on its way."""
    cache = Cache(network.config, len(PROMPTS), capacity, 8, torch.bfloat16, CPU)
    lengths = [len(prompt) for prompt in PROMPTS]
    network(Batch.of(PROMPTS, [0, 0], CPU), cache)
    return DecodeGraph(network, cache, Batch.of([[token] for token in first], lengths, CPU))


def test_steps_are_those_of_generate(network: Network) -> None:
    answers = generate(network, PROMPTS, Sampling(), Limits(STEPS + 1, ends=())).tokens
    graph = started(network, [answer[0] for answer in answers], capacity=32)
    steps = [graph.step().tolist() for _ in range(STEPS)]
    assert [list(column) for column in zip(*steps, strict=True)] == [answer[1:] for answer in answers]
    assert len({tuple(step) for step in steps}) > 1


def test_a_full_cache_takes_no_step(network: Network) -> None:
    graph = started(network, [1, 1], capacity=len(PROMPTS[0]) + 2)
    graph.step()
    graph.step()
    with pytest.raises(ArcmergeError, match="made for 7 tokens"):
        graph.step()
