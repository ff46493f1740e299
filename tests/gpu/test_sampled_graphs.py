"""Sampling within captured decode steps, on fake GPUs in every order: the tokens of the CPU for the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import arcmerge
import host_paths
from arcmerge.gemma2.generation.sampler import Kind
from arcmerge.gemma2.runtime.decode_graph import DecodeGraph
from emulation.cuda import Runtime, cuda
from fake_devices import needs_fake_devices

pytestmark = needs_fake_devices

RANDOM, FILTERED, PENALISED, ALL = (
    Kind(draws=True, filters=False, penalises=False),
    Kind(draws=True, filters=True, penalises=False),
    Kind(draws=False, filters=False, penalises=True),
    Kind(draws=True, filters=True, penalises=True),
)
# Options and the kind of their graph. Calls of a kind follow one another and are mixed with those of others.
CALLS: list[tuple[Kind, dict[str, Any]]] = [
    (RANDOM, {"do_sample": True, "temperature": 1.3, "seed": 1}),
    (FILTERED, {"do_sample": True, "top_k": 5, "seed": 1}),
    (RANDOM, {"do_sample": True, "temperature": 0.6, "seed": 2**40 + 1}),
    (FILTERED, {"do_sample": True, "temperature": 2.0, "top_p": 0.8, "seed": 3}),
    (PENALISED, {"repetition_penalty": 3.0}),
    (ALL, {"do_sample": True, "temperature": 1.5, "top_k": 60, "repetition_penalty": 1.3, "seed": 4}),
    (FILTERED, {"do_sample": True, "temperature": 1.7, "top_k": 200, "top_p": 0.9, "min_p": 0.01, "seed": 4}),
    (PENALISED, {"repetition_penalty": 0.1}),
    (ALL, {"do_sample": True, "min_p": 0.02, "repetition_penalty": 2.0, "seed": 5}),
]
PROMPTS = [[2, 5, 9], [2]]


def answers(pair: Path, device: str) -> list[Any]:
    model = host_paths.model_of(pair, device)
    return [ask(model, options) for _, options in CALLS]


def ask(model: arcmerge.Gemma2, options: dict[str, Any]) -> Any:
    return model.generate(PROMPTS, max_new_tokens=4, eos_token_id=[], **options)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return host_paths.make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def on_cpu(pair: Path) -> list[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARCMERGE_BACKEND", "triton")
        return answers(pair, "cpu")


def test_one_graph_serves_all_numbers_of_a_kind(
    pair: Path, gpus: Runtime, on_cpu: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    captures: list[Kind] = []
    captured = DecodeGraph._captured
    monkeypatch.setattr(DecodeGraph, "_captured", lambda *args: (captures.append(args[1]), captured(*args))[1])
    assert answers(pair, "cuda:1") == on_cpu
    assert captures == [RANDOM, FILTERED, PENALISED, ALL]
    assert len({str(answer) for answer in on_cpu}) == len(CALLS)


def test_a_graph_of_more_rows_draws_the_same(pair: Path, one_thread: None, on_cpu: list[Any]) -> None:
    """Three sequences use the graph for four, in which a smaller call has left its state."""
    with cuda(order="random", seed=5):
        model = host_paths.model_of(pair, "cuda:0")
        _, options = CALLS[5]
        four = [*PROMPTS, [2, 3], [2, 4]]
        whole = model.generate(four, max_new_tokens=4, eos_token_id=[], **options)
        assert model.generate(four[:3], max_new_tokens=4, eos_token_id=[], **options) == whole[:3]
        assert whole[:2] == on_cpu[5]


def test_the_reference_draws_outside_of_graphs(
    pair: Path, one_thread: None, on_cpu: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the options on the host, which a capture forbids."""
    monkeypatch.setenv("ARCMERGE_BACKEND_LM_HEAD_DRAW", "reference")
    with cuda(order="latest"):
        model = host_paths.model_of(pair, "cuda:0")
        assert [ask(model, options) for _, options in CALLS[:2]] == on_cpu[:2]
        (graph,) = model.network.graphs._graphs.values()
        assert list(graph._graphs) == [None]
