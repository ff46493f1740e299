"""Replayed decoding steps give the hidden states of plain calls."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import pytest
import torch

from arcmerge import ops
from arcmerge.dispatch.recording import recorded
from arcmerge.gemma2.generation.sampler import Sampler, SamplingParams
from arcmerge.gemma2.runtime.decode_graph import DecodeGraph
from arcmerge.gemma2.runtime.kept_graphs import rounded
from arcmerge.gemma2.runtime.kv_cache import Batch, KVCache
from arcmerge.gemma2.runtime.network import Network
from operands import BF16, F32, normal, same_bits
from random_network import TINY, config_of, random_network

CPU = torch.device("cpu")
PROMPTS = [[2, 17, 5, 250, 99], [2, 44, 3, 8]]
STEPS = [[7, 9], [250, 3], [11, 12], [44, 2], [1, 5]]


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Network:
    monkeypatch.delenv("ARCMERGE_BACKEND", raising=False)
    return random_network(config_of(TINY, max_position_embeddings=64), CPU)


def filled(network: Network, repeats: int = 1) -> KVCache:
    prompts = PROMPTS * repeats
    cache = KVCache(network.config, len(prompts), 32, 8, BF16, CPU)
    network(Batch.of(prompts, [0] * len(prompts), CPU), cache)
    return cache


def plain_and_replayed(
    network: Network, repeats: int = 1
) -> tuple[list[torch.Tensor], list[torch.Tensor], DecodeGraph]:
    """Hidden states of the steps, each by a call of the network, and by a DecodeGraph."""
    caches = filled(network, repeats), filled(network, repeats)
    lengths = [len(prompt) for prompt in PROMPTS * repeats]
    step, plain, replayed = DecodeGraph(network, caches[1], len(lengths)), [], []
    step.start(lengths)
    for number, tokens in enumerate(STEPS):
        batch = Batch.of([[token] for token in tokens * repeats], [length + number for length in lengths], CPU)
        plain.append(network(batch, caches[0]))
        replayed.append(step(batch.tokens, [True] * len(lengths)).clone())
    return plain, replayed, step


def test_replayed_steps_have_the_bits_of_plain_calls(network: Network) -> None:
    plain, replayed, step = plain_and_replayed(network)
    assert step._replay is not None
    assert all(same_bits(one, other) for one, other in zip(replayed, plain, strict=True))
    assert not same_bits(plain[0], plain[1])


def test_no_op_is_called_in_a_replayed_step(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    _, replayed, step = plain_and_replayed(network)
    monkeypatch.setattr(network, "layers", None)
    step.start([len(prompt) + len(STEPS) - 1 for prompt in PROMPTS])
    again = step(torch.tensor(STEPS[-1]), [True, True])
    assert same_bits(again, replayed[-1])


@pytest.mark.parametrize("why", ["reference", "stepwise", "torch.mm"])
def test_steps_that_call_torch_are_not_replayed(why: str, network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    if why == "reference":
        monkeypatch.setenv("ARCMERGE_BACKEND", "reference")
    network.stepwise = why == "stepwise"
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    plain, replayed, step = plain_and_replayed(network, repeats=9 if why == "torch.mm" else 1)
    assert step._replay is None
    assert all(same_bits(one, other) for one, other in zip(replayed, plain, strict=True))


def test_a_sequence_may_be_skipped(network: Network) -> None:
    found = []
    for second in (False, True):
        cache = filled(network)
        before = [states.clone() for layer in cache.layers for states in layer]
        step = DecodeGraph(network, cache, 2)
        step.start([5, 4])
        found += [[step(torch.tensor([token, 9]), [True, second])[0].clone() for token in (7, 8)]]
        after = [states for layer in cache.layers for states in layer]
        assert all(same_bits(one[1], other[1]) for one, other in zip(before, after, strict=True)) is not second
    assert all(same_bits(one, other) for one, other in zip(*found, strict=True))


def test_greedy_steps_take_their_tokens_from_the_steps_before(network: Network) -> None:
    caches = filled(network), filled(network)
    fed, plain = torch.tensor(STEPS[0]), []
    step = DecodeGraph(network, caches[0], 2)
    step.start([len(prompt) for prompt in PROMPTS])
    for number in range(3):
        batch = Batch.of(fed[:, None].tolist(), [len(prompt) + number for prompt in PROMPTS], CPU)
        fed = network.most_probable(network(batch, caches[1]))
        plain.append(fed.tolist())
    tokens, found = torch.tensor(STEPS[0]), []
    sampler = Sampler(network, SamplingParams(), PROMPTS, range(2))
    for _ in range(3):
        tokens = step(tokens, [True, True], sampler)
        found.append(tokens.tolist())
    assert found == plain


def test_a_graph_does_not_keep_its_model(network: Network) -> None:
    gone = random_network(config_of(TINY, max_position_embeddings=64), CPU)
    reference = weakref.ref(gone)
    with torch.inference_mode():
        gone.graphs._graphs["key",] = gone.graphs.take(gone, 1, 8)
    del gone
    assert reference() is None


def test_sizes_are_rounded_up_to_few() -> None:
    assert [rounded(count, 16) for count in (1, 2, 3, 5, 9, 16, 17, 33)] == [1, 2, 4, 8, 16, 16, 32, 48]


def test_a_replay_reads_the_current_values_of_its_arguments() -> None:
    x, weight = normal(3, 70), normal(9, 70, seed=1)
    with recorded() as recording:
        out = ops.linear(x, [weight])
        _, normed = ops.rmsnorm_add_rmsnorm(out, normal(3, 9, dtype=F32), weight[0, :9], weight[1, :9], eps=1e-6)
    assert recording.whole
    x.copy_(normal(3, 70, seed=2))
    expected = ops.linear(x, [weight])
    assert not same_bits(out, expected)
    recording.replay()
    assert same_bits(out, expected)
    assert normed.isfinite().all()


@pytest.mark.parametrize("strided", ["x", "weight"])
def test_a_recording_of_a_copy_is_not_whole(strided: str) -> None:
    x, weight = normal(3, 70), normal(9, 70, seed=1)
    x, weight = (x[:, ::2], weight[:, :35].contiguous()) if strided == "x" else (x[:, :35].contiguous(), weight[:, ::2])
    with recorded() as recording:
        ops.linear(x, [weight])
    assert not recording.whole


class Recorded:
    """torch.cuda's part in a capture: a log of what is called, in order, and the current stream of each device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[object, ...]] = []
        self.stream = "default"
        monkeypatch.setattr(torch.cuda, "device", lambda device: self._within("device", device))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device=None: FakeStream(f"side of {device}", self))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: FakeStream(self.stream, self))
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: self._within("stream", stream.name))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(self))
        monkeypatch.setattr(torch.cuda, "graph", self._capture)

    @contextmanager
    def _within(self, kind: str, name: object) -> Iterator[None]:
        before = self.stream
        self.stream = str(name) if kind == "stream" else before
        self.log.append((kind, str(name)))
        yield
        self.stream = before

    def _capture(
        self, graph: FakeGraph, stream: FakeStream | None = None, capture_error_mode: str = "global"
    ) -> AbstractContextManager[None]:
        self.log.append(("capture", capture_error_mode))
        return self._within("stream", stream.name if stream else "shared by all devices")


class FakeStream(NamedTuple):
    name: str
    recorded: Recorded

    def wait_stream(self, other: FakeStream) -> None:
        self.recorded.log.append(("wait", self.name, other.name))


class FakeGraph(NamedTuple):
    recorded: Recorded

    def replay(self) -> None:
        self.recorded.log.append(("replay", self.recorded.stream))


def test_a_graph_is_captured_on_a_stream_of_its_own_and_replayed(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = DecodeGraph(network, filled(network), 2)
    recorded = Recorded(monkeypatch)
    layers = network.layers
    monkeypatch.setattr(
        network, "layers", lambda *args: (recorded.log.append(("layers", recorded.stream)), layers(*args))[1]
    )
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: recorded.log.append(("used", recorded.stream)))
    with torch.inference_mode():
        step._captured(None, None)
    side = "side of cpu"
    assert recorded.log == [
        ("device", "cpu"),
        ("wait", side, "default"),
        ("stream", side),
        ("layers", side),
        ("wait", "default", side),
        ("used", "default"),
        ("capture", "thread_local"),
        ("stream", side),
        ("layers", side),
    ]
    del recorded.log[:]
    step._replayed(None)
    assert recorded.log == [("replay", "default")]
