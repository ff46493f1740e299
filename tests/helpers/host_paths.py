"""What the product does with a device, for a tiny pair of Gemma-2 models: merges, models in memory, answers, scores."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import arcmerge
import tiny
from arcmerge.checkpoint.writer import BLOCK
from arcmerge.merging.execution import to_disk, work_units

_GEOMETRY = replace(tiny.GEOMETRY, num_hidden_layers=1, intermediate_size=32, vocab_size=264)
# Tensors of the first parent, of the second, and of both.
_PARTS = [{"filter": "mlp", "value": 0}, {"filter": "self_attn", "value": 1}, {"value": 0.4}]
VALUES_OF_T: tuple[Any, ...] = (_PARTS, 0.25, 1)
PROMPTS = [[2, 5], [2]]
PAIRS = [([2, 5], [9, 11]), ([2], [8])]
METHODS: dict[str, dict[str, Any]] = {
    "slerp": {"parameters": {"t": 0.3}},
    "slerp with copies": {"parameters": {"t": _PARTS}},
    "dare_ties": {"merge_method": "dare_ties", "parameters": {"weight": 0.5, "density": 0.4}},
    "ties": {"merge_method": "ties", "parameters": {"weight": 0.5, "density": 0.4}},
    "nuslerp by rows, on the CPU": {"merge_method": "nuslerp", "parameters": {"weight": 0.5, "nuslerp_flatten": False}},
}


def make_pair(folder: Path) -> Path:
    """Write the models a and b."""
    for number, name in enumerate(("a", "b"), 1):
        tiny.write_checkpoint(folder / name, tiny.Model(partial(_weights, number), geometry=_GEOMETRY))
    return folder


def _weights(seed: int) -> tiny.Weights:
    """Weights of a model whose answers change from token to token: what the layer adds outweighs the embedding."""
    weights = tiny.weights(seed, geometry=_GEOMETRY)
    return {name: tensor + 8 * ("layers.0.post_" in name) for name, tensor in weights.items()}


def recipe(pair: Path, method: str = "slerp") -> dict[str, Any]:
    config = {
        "merge_method": "slerp",
        "dtype": "bfloat16",
        "base_model": str(pair / "a"),
        "models": [{"model": str(pair / name)} for name in ("a", "b")],
        **METHODS[method],
    }
    if config["merge_method"] == "nuslerp":
        del config["base_model"]
    return config


def merged_to_disk(pair: Path, out: Path, device: str, method: str = "slerp", threads: int = 1) -> list[Tensor]:
    """The tensors of the file that a merge writes."""
    arcmerge.merge(recipe(pair, method), out, device=device, threads=threads)
    return [tensor for _, tensor in sorted(load_file(out / "model.safetensors").items())]


def cut_small(patch: pytest.MonkeyPatch, elements: int) -> None:
    """Measure pieces of so many elements, and write files by blocks."""
    patch.setattr(work_units, "PIECE_ELEMENTS", elements)
    for module in (work_units, to_disk):
        patch.setattr(module, "CHUNK_BYTES", BLOCK)


def model_of(pair: Path, device: str, threads: int = 1) -> arcmerge.Gemma2:
    return arcmerge.Gemma2.from_merge(recipe(pair), device, threads=threads)


def remerged(pair: Path, device: str, threads: int = 1) -> list[Tensor]:
    """The weights of a model in memory, at first and after each value of t."""
    model = model_of(pair, device, threads)
    found = weights_of(model)
    for t in VALUES_OF_T:
        model.set_t(t)
        found += weights_of(model)
    return found


def weights_of(model: arcmerge.Gemma2) -> list[Tensor]:
    return [tensor.cpu().clone() for tensor in model.network.weights.tensors]


def answered(model: arcmerge.Gemma2) -> Any:
    """Answers of three tokens: after the prompt, of a step that is captured, and of a replay. Then one ends early."""
    whole = model.generate(PROMPTS, max_new_tokens=3, eos_token_id=[])
    return whole, model.generate(PROMPTS, max_new_tokens=4, eos_token_id=[whole[0][len(PROMPTS[0])]])


def generated(pair: Path, device: str) -> list[Any]:
    """Answers: the most probable, and after a new merge random ones to as many prompts."""
    model = model_of(pair, device)
    found = [answered(model)]
    model.set_t(0.5)
    return [*found, model.generate(PROMPTS, max_new_tokens=3, do_sample=True, top_k=20, seed=1, eos_token_id=[])]


def scored(pair: Path, device: str) -> list[Any]:
    """Log-probabilities of continuations, before and after a new merge."""
    model = model_of(pair, device)
    found = model.score(PAIRS)
    model.set_t(0.5)
    return [*found, *model.score(PAIRS)]


class LogProbability:
    """A score for sweeps: the log-probability of the first continuation."""

    title, minimize, identity = "log-probability", False, "log-probability"

    def __call__(self, model: arcmerge.Gemma2) -> float:
        return float(model.score(PAIRS[:1])[0].logprob)


def swept(pair: Path, devices: Iterable[str]) -> list[list[float]]:
    """The scores that the actors of a sweep find, one actor a device, all at once."""
    from arcmerge.sweeping.candidates import Candidate
    from arcmerge.sweeping.evaluators import EvaluationSpec, _Worker
    from arcmerge.sweeping.scores import Scoring

    def act(device: str) -> list[float]:
        worker = _Worker(
            EvaluationSpec(yaml.safe_dump(recipe(pair)), Scoring((LogProbability(),)), device, "default"), 1
        )
        return [worker.score(Candidate(str(t), {"t": t})).score for t in (0.2, 0.7)]

    return at_once(act, devices)


def at_once(function: Callable[[str], Any], devices: Iterable[str]) -> list[Any]:
    """The results of a function for each device, on a thread each."""
    found: dict[str, Any] = {}

    def run(device: str) -> None:
        try:
            found[device] = function(device)
        except BaseException as error:
            found[device] = error

    threads = [threading.Thread(target=run, args=(device,)) for device in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in found.values():
        if isinstance(result, BaseException):
            raise result
    return [found[device] for device in devices]


def same(found: Any, expected: Any) -> bool:
    """Whether results are equal, tensors bit for bit."""
    if isinstance(expected, Tensor):
        bits = torch.int16 if expected.element_size() == 2 else torch.int32
        return found.dtype == expected.dtype and torch.equal(found.view(bits), expected.view(bits))
    if isinstance(expected, list | tuple):
        return len(found) == len(expected) and all(map(same, found, expected))
    return bool(found == expected)
