"""The code that drives a GPU, executed on two fake ones in every order: results have the bits of the CPU's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import arcmerge
import host_paths
from arcmerge import ops
from arcmerge.gemma2.generation import loglikelihood
from arcmerge.gemma2.generation.sampler import GREEDY
from arcmerge.gemma2.runtime import kept_graphs
from arcmerge.gemma2.runtime.decode_graph import DecodeGraph
from arcmerge.gemma2.runtime.network import Network
from arcmerge.gemma2.runtime.runner import Runner
from arcmerge.merging.execution import memory
from emulation.cuda import Runtime, cuda
from fake_devices import needs_fake_devices
from host_paths import same

pytestmark = needs_fake_devices


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return host_paths.make_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def on_cpu(pair: Path) -> dict[str, Any]:
    """What runs the model, in the interpreter on CPU tensors: native kernels add in another order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARCMERGE_BACKEND", "triton")
        return {name: getattr(host_paths, name)(pair, "cpu") for name in ("generated", "scored")} | {
            "swept": host_paths.swept(pair, ["cpu"])[0]
        }


@pytest.mark.parametrize("method", host_paths.METHODS)
def test_a_merge_to_disk(pair: Path, tmp_path: Path, order: str, method: str) -> None:
    expected = host_paths.merged_to_disk(pair, tmp_path / "cpu", "cpu", method)
    with cuda(devices=2, order=order, seed=2):
        found = host_paths.merged_to_disk(pair, tmp_path / "gpu", "cuda:1", method, threads=3)
    assert same(found, expected)


def test_a_merge_on_the_current_device(pair: Path, tmp_path: Path, gpus: Runtime) -> None:
    """Its threads start with another current device."""
    torch.cuda.set_device(1)
    found = host_paths.merged_to_disk(pair, tmp_path / "gpu", "cuda", threads=2)
    assert same(found, host_paths.merged_to_disk(pair, tmp_path / "cpu", "cpu"))
    assert torch.cuda.memory_reserved(1) > torch.cuda.memory_reserved(0) == 0


def test_a_model_in_memory(pair: Path, gpus: Runtime) -> None:
    assert same(host_paths.remerged(pair, "cuda:1", threads=3), host_paths.remerged(pair, "cpu"))


def test_a_model_in_memory_in_inference_mode(pair: Path, gpus: Runtime) -> None:
    with torch.inference_mode():
        found = host_paths.remerged(pair, "cuda:1", threads=3)
    assert same(found, host_paths.remerged(pair, "cpu"))


def test_a_model_whose_parents_do_not_fit(pair: Path, order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    must_stream = memory.must_stream

    def ask(required: int, parents: int, device: torch.device) -> bool:
        asked.append((required, parents, must_stream(required, parents, device)))
        return asked[-1][2]

    monkeypatch.setattr(memory, "must_stream", ask)
    with cuda(devices=2, order=order):
        host_paths.model_of(pair, "cuda:1", threads=2)
    required, parents, _ = asked[-1]
    with cuda(devices=2, order=order, memory=required + parents - 1):
        found = host_paths.remerged(pair, "cuda:1", threads=2)
    assert [streamed for *_, streamed in asked] == [False, True]
    assert same(found, host_paths.remerged(pair, "cpu"))


def test_answers_by_a_captured_graph(pair: Path, gpus: Runtime, on_cpu: dict[str, Any]) -> None:
    assert same(host_paths.generated(pair, "cuda:1"), on_cpu["generated"])


HOW = {
    "greedy": {},
    "random": {"do_sample": True},
    "top_k": {"do_sample": True, "top_k": 7},
    "top_p": {"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("how", HOW)
def test_the_host_waits_once_a_step(pair: Path, one_thread: None, how: str) -> None:
    counts = []
    with cuda(order="latest") as runtime:
        model = host_paths.model_of(pair, "cuda:0")
        for tokens in (3, 5):
            runtime.counts.clear()
            model.generate(host_paths.PROMPTS, max_new_tokens=tokens, eos_token_id=[], seed=1, **HOW[how])
            counts.append((runtime.counts["launches"], runtime.counts["waits"]))
            model.free_memory()  # both calls capture a graph
    (few, waits), (more, more_waits) = counts
    assert more_waits - waits == 2
    assert more - few == 2  # the replay of a graph, whatever chooses the tokens


def test_a_step_is_launched_before_the_token_of_the_one_before_is_read(
    pair: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    replayed = DecodeGraph._replayed
    monkeypatch.setattr(DecodeGraph, "_replayed", lambda *args: (log.append("step"), replayed(*args))[1])
    with cuda(order="latest"):
        model = host_paths.model_of(pair, "cuda:0")
        model.generate(host_paths.PROMPTS[0], max_new_tokens=5, eos_token_id=[], stream=lambda _: log.append("token"))
    # The first token is read at once, and the first step is not replayed but captured.
    assert log == ["token", "step", "token", "step", "token", "step", "token", "token"]


def test_graphs_are_kept_for_later_calls(
    pair: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch, on_cpu: dict[str, Any]
) -> None:
    """Three sequences use a graph for four; a new merge changes the weights that a graph reads, not the graph."""
    captures: list[object] = []
    captured = DecodeGraph._captured
    monkeypatch.setattr(DecodeGraph, "_captured", lambda *args: (captures.append(args[1]), captured(*args))[1])
    prompts = [*host_paths.PROMPTS, [2, 7, 9]]
    with cuda(order="random", seed=3) as runtime:
        model = host_paths.model_of(pair, "cuda:0")
        model.set_t(0.6)
        asked = {3: prompts, 2: prompts[:2], 4: [*prompts, [2]]}
        for count in (3, 4, 2):
            model.generate(asked[count], max_new_tokens=3, eos_token_id=[])
        assert captures == [GREEDY, GREEDY]  # for four sequences, and for two
        model.set_t(0.3)
        assert model.generate(prompts, max_new_tokens=3, eos_token_id=[])[:2] == on_cpu["generated"][0][0]
        assert captures == [GREEDY, GREEDY]
        cache = model.config.num_hidden_layers * 2 * 128 * 2 * 2 * 8 * (2 + 4)
        graphs = list(model.network.graphs._graphs.values())
        assert model.network.graphs.nbytes == sum(graph.nbytes for graph in graphs)
        assert sum(graph.cache.nbytes for graph in graphs) == cache
        assert all(graph._pool_bytes > 0 for graph in graphs)
        held = runtime.allocators[0].allocated
        del graphs
        kept = model.free_memory()
        assert held - runtime.allocators[0].allocated >= kept > cache
        assert model.free_memory() == 0


def test_a_replay_is_right_after_one_that_was_interrupted(pair: Path, one_thread: None, on_cpu: dict[str, Any]) -> None:
    """Its programs have counted how many of them ended, and not all of them did."""
    from arcmerge.kernels import attention_decode

    attention_decode._counters.clear()  # those of GPUs that are gone
    with cuda(order="random", seed=4):
        model = host_paths.model_of(pair, "cuda:0")
        for _ in range(2):
            assert host_paths.answered(model) == on_cpu["generated"][0]
            counters = list(attention_decode._counters.values())
            assert counters
            for each in counters:
                each += 1


def test_a_graph_is_captured_anew_for_another_backend_of_an_op(
    pair: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cuda(order="latest"):
        model = host_paths.model_of(pair, "cuda:0")
        for backend in ("triton", "reference", "triton"):
            monkeypatch.setenv("ARCMERGE_BACKEND_RMSNORM", backend)
            model.generate([2, 7], max_new_tokens=3, eos_token_id=[])
        assert len(model.network.graphs._graphs) == 2


def test_the_graphs_used_last_are_kept_within_the_share_of_the_memory(
    pair: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = 2 << 30
    with cuda(order="latest", memory=memory):
        network = host_paths.model_of(pair, "cuda:0").network
        graphs = network.graphs
        one, two = (graphs.take(network, count, 128) for count in (1, 2))
        assert graphs.take(network, 1, 100) is one
        with torch.cuda.stream(torch.cuda.Stream()):  # work of the other stream may still use the cache
            assert graphs.take(network, 1, 100) is not one
        assert graphs.take(network, 1, 100) is one
        limit = 5 * one.nbytes
        monkeypatch.setattr(kept_graphs, "_SHARE", limit / memory)
        four = graphs.take(network, 3, 128)  # in place of that for two sequences, which was not used since
        assert graphs.nbytes == one.nbytes + four.nbytes <= limit
        assert graphs.take(network, 1, 128) is one
        assert graphs.take(network, 2, 128) is not two
        kept = graphs.nbytes
        large = graphs.take(network, 7, 50)  # of which no part is kept
        assert [states.shape[0] for states in large.cache.layers[0]] == [7, 7]
        assert graphs.nbytes == kept


def test_kept_graphs_make_room_for_other_work(pair: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_graphs, "_SHARE", 1)
    with cuda(order="latest", memory=2 << 30) as runtime:
        network = host_paths.model_of(pair, "cuda:0").network
        with torch.inference_mode():
            network.graphs.take(network, 4, 128)
            kept, cache = network.graphs.nbytes, Runner(network, 8, 128)._cache.nbytes
            torch.cuda.empty_cache()
            runtime.memory = torch.cuda.memory_reserved(0) + cache - 1
            Runner(network, 8, 128)
            assert kept > network.graphs.nbytes == 0
            runtime.memory = 0
            with pytest.raises(torch.OutOfMemoryError):
                Runner(network, 64, 128)


def test_answers_on_both_devices_at_once(pair: Path, gpus: Runtime, on_cpu: dict[str, Any]) -> None:
    models = [host_paths.model_of(pair, device) for device in ("cuda:0", "cuda:1")]
    found = host_paths.at_once(lambda index: host_paths.answered(models[int(index)]), ["0", "1"])
    assert found == [on_cpu["generated"][0]] * 2


def test_an_op_keeps_what_it_needs_for_each_device(one_thread: None) -> None:
    """The table of angles and the counters of attention."""
    states = torch.randn(2, 4 * 32, generator=torch.Generator().manual_seed(1))

    def attended(device: str) -> torch.Tensor:
        cache = torch.zeros(2, 1, 16, 32)
        lengths = torch.tensor([1, 1], dtype=torch.int32)
        moved = [tensor.to(device) for tensor in (states, cache, cache.clone(), lengths)]
        return ops.attention_decode(*moved, heads=2, scale=0.2, softcap=0.0, window=0).cpu()

    with cuda(devices=2, order="latest"):
        found = [attended(device) for device in ("cuda:0", "cuda:1", "cuda:0")]
    expected = states.view(2, 4, 32)[:, 3:].expand(2, 2, 32).flatten(1)  # of one key, its value
    assert all(torch.equal(tensor, expected) for tensor in found)


def test_scores(pair: Path, gpus: Runtime, on_cpu: dict[str, Any]) -> None:
    assert same(host_paths.scored(pair, "cuda:1"), on_cpu["scored"])


def test_a_model_from_disk(pair: Path, gpus: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    found = arcmerge.Gemma2.from_pretrained(pair / "a", device="cuda:1").score(host_paths.PAIRS)
    monkeypatch.setenv("ARCMERGE_BACKEND", "triton")
    assert found == arcmerge.Gemma2.from_pretrained(pair / "a", device="cpu").score(host_paths.PAIRS)


def test_many_rows_take_four_products_a_layer(pair: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v are one matrix, and gate and up: in a merge in memory too, whatever the sizes of its tensors."""
    pairs = [([2, 5, 7], 4 * list(range(9, 29)))]  # products of up to 64 rows have own kernels
    products, multiply = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **named: (products.append(args), multiply(*args, **named))[1])
    monkeypatch.setenv("ARCMERGE_BACKEND", "triton")
    expected = [model.score(pairs) for model in (host_paths.model_of(pair, "cpu"), opened(pair, "cpu"))]
    del products[:]
    with cuda(order="latest"):
        for model, scores in zip((host_paths.model_of(pair, "cuda:0"), opened(pair, "cuda:0")), expected, strict=True):
            assert same(model.score(pairs), scores)
            assert len(products) == model.config.num_hidden_layers * 4
            del products[:]


def opened(pair: Path, device: str) -> arcmerge.Gemma2:
    return arcmerge.Gemma2.from_pretrained(pair / "a", device)


def test_scores_are_waited_for_after_all_passes_are_launched(
    pair: Path, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []
    alone, with_a_prefix = [([2, token, 9], 1) for token in range(4)], [([2, 5, token, 9], 2) for token in range(2)]
    monkeypatch.setattr(loglikelihood, "PASS_TOKENS", 4)
    with cuda(order="latest") as runtime:
        network = host_paths.model_of(pair, "cuda:0").network
        run = Network.__call__
        monkeypatch.setattr(Network, "__call__", lambda *args: (waits.append(runtime.counts["waits"]), run(*args))[1])
        before = runtime.counts["waits"]
        with torch.inference_mode():
            loglikelihood.score_sequences(network, alone + with_a_prefix)
        assert waits == [before] * 4
        assert 1 <= runtime.counts["waits"] - before <= len(waits)


def test_the_actors_of_a_sweep(pair: Path, gpus: Runtime, on_cpu: dict[str, Any]) -> None:
    assert host_paths.swept(pair, ["cuda:0", "cuda:1"]) == [on_cpu["swept"]] * 2


def test_state_dicts(pair: Path, gpus: Runtime) -> None:
    parents = [load_file(pair / name / "model.safetensors") for name in ("a", "b")]
    expected = arcmerge.slerp(*parents, 0.3)
    found = arcmerge.slerp(*({name: tensor.to("cuda:1") for name, tensor in each.items()} for each in parents), 0.3)
    assert {str(tensor.device) for tensor in found.values()} == {"cuda:1"}
    assert same([tensor.cpu() for tensor in found.values()], list(expected.values()))


def test_the_bandwidth_of_a_device(pair: Path, gpus: Runtime) -> None:
    from arcmerge.gemma2.runtime.bandwidth import read_bandwidth

    assert read_bandwidth(host_paths.model_of(pair, "cuda:1").network.weights) > 0
