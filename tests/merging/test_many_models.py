"""Merges of more models than the operands of one Triton launch, 8: seventeen, as published recipes have them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

import arcmerge
import tiny
from arcmerge.merging.methods.registry import METHODS
from golden import task_vectors
from vectors import exponential_map_mean, karcher_mean, unit

Array = NDArray[np.float64]
Dicts = list[dict[str, Tensor]]
COUNT = 17
BASE = 3
SMALL = tiny.Geometry(16, 32, 2, 2, 1, 8, 288)
WEIGHTS = [0.1 * (1 + index % 5) for index in range(COUNT)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seventeen fine-tunes of one model."""
    folder, parent = tmp_path_factory.mktemp("models"), tiny.weights(50, "llama", SMALL)
    for index in range(COUNT):
        make = partial(tiny.perturbed, parent, 51 + index, 0.3)
        tiny.write_checkpoint(folder / str(index), tiny.Model(make, "llama", SMALL))
    return folder


@pytest.fixture(scope="module")
def state_dicts(models: Path) -> Dicts:
    return [load_file(models / str(index) / "model.safetensors") for index in range(COUNT)]


def recipe(models: Path, method: str, parameters: dict[str, Any], base: int | None) -> dict[str, Any]:
    """A recipe whose weights are on the models, all other parameters on the whole recipe."""
    own = [{} if index == base else {"weight": weight} for index, weight in enumerate(WEIGHTS)]
    return {
        "merge_method": method,
        "models": [
            {"model": str(models / str(index)), "parameters": own[index] if "weight" in parameters else {}}
            for index in range(COUNT)
        ],
        "parameters": {name: value for name, value in parameters.items() if name != "weight"},
        "dtype": "float32",
        **({} if base is None else {"base_model": str(models / str(base))}),
    }


def linear(tensors: list[Array]) -> Array:
    return np.average(tensors, axis=0, weights=WEIGHTS)


def multislerp(tensors: list[Array]) -> Array:
    return exponential_map_mean(tensors, np.array(WEIGHTS) / sum(WEIGHTS))


def task_arithmetic(tensors: list[Array]) -> Array:
    base = tensors[BASE]
    return base + 0.8 * sum(weight * (x - base) for weight, x in zip(WEIGHTS, tensors, strict=True))


def model_stock(tensors: list[Array]) -> Array:
    """The published ratio, of each row of a matrix."""
    base, rows = tensors[BASE], []
    for row in range(len(base)) if base.ndim > 1 else [slice(None)]:
        others = [x[row] for index, x in enumerate(tensors) if index != BASE]
        directions = np.stack([unit(x - base[row]) for x in others])
        cosine = (np.sum(directions @ directions.T) - 16) / (16 * 15)
        ratio = 16 * cosine / (1 + 15 * cosine)
        rows.append(ratio * np.mean(others, axis=0) + (1 - ratio) * base[row])
    return np.stack(rows).reshape(base.shape)


CASES: dict[str, tuple[Any, dict[str, Any], int | None]] = {
    "karcher": (karcher_mean, {"max_iter": 999, "tol": 1e-10}, None),
    "linear": (linear, {"weight": WEIGHTS}, None),
    "multislerp": (multislerp, {"weight": WEIGHTS}, None),
    "model_stock": (model_stock, {"filter_wise": True}, BASE),
    "task_arithmetic": (task_arithmetic, {"weight": WEIGHTS, "lambda": 0.8}, BASE),
}


@pytest.mark.parametrize("method", CASES)
def test_seventeen_models_give_the_formula_in_files_and_in_memory(
    models: Path, state_dicts: Dicts, tmp_path: Path, method: str
) -> None:
    formula, parameters, base = CASES[method]
    arcmerge.merge(recipe(models, method, parameters, base), tmp_path / "out", device="cpu")
    merged = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in merged.items():
        inputs = [model[name].double().numpy() for model in state_dicts]
        # Two roundings of float32 for each of 17 terms, most of them larger than the result by their coefficients.
        bound = 17 * 2**-23 * max(np.linalg.norm(x) for x in inputs)
        assert np.linalg.norm(tensor.double().numpy() - formula(inputs)) <= bound, name

    in_memory = [{name: tensor.float() for name, tensor in model.items()} for model in state_dicts]
    again = arcmerge.merge_state_dicts(
        in_memory, method, base=None if base is None else in_memory[base], parameters=parameters
    )
    assert again.keys() == merged.keys()
    assert [name for name in merged if not torch.equal(again[name], merged[name])] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("method", task_vectors.METHODS)
def test_seventeen_models_are_trimmed_and_masked(models: Path, state_dicts: Dicts, method: str, dtype: str) -> None:
    states = [{name: tensor.to(getattr(torch, dtype)) for name, tensor in model.items()} for model in state_dicts]
    values = {"density": 0.4, "gamma": 0.1, "epsilon": 0.2}
    own = {name: value for name, value in values.items() if name in {one.name for one in METHODS[method].parameters}}
    shared = {"normalize": True, "rescale": True, "lambda": 0.8}
    weights: list[float | None] = [None if index == BASE else weight for index, weight in enumerate(WEIGHTS)]
    parameters = {"weight": weights, **own, **shared}
    merged = arcmerge.merge_state_dicts(states, method, base=states[BASE], parameters=parameters)
    listed = {name: [value] * COUNT for name, value in own.items()}
    for name, tensor in merged.items():
        inputs, settings = [model[name] for model in states], {"weight": weights, **listed, **shared, "base": BASE}
        exact = task_vectors.merged(method, inputs, settings, name, rounded=dtype == "bfloat16")
        clear = exact.margin > 1e-5
        # Two roundings of float32 for each of 17 terms, and the one of the result.
        bound = 17 * 2.0**-23 * exact.size + torch.finfo(tensor.dtype).eps / 2 * exact.exact.abs()
        assert bool(((tensor.double() - exact.exact).abs() <= bound)[clear].all()), name
        assert float(clear.double().mean()) > 0.99


def test_slices_of_many_models_give_the_same(models: Path, tmp_path: Path) -> None:
    whole = recipe(models, "karcher", {}, None)
    halves = [
        {"sources": [{**model, "layer_range": [layer, layer + 1]} for model in whole["models"]]} for layer in range(2)
    ]
    arcmerge.merge(whole, tmp_path / "whole", device="cpu")
    arcmerge.merge({**whole, "models": None, "slices": halves}, tmp_path / "halves", device="cpu")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "halves"))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_rows_of_many_models_are_matched_by_token(tmp_path: Path) -> None:
    """Each of two models eight times is a mean of the two: the coefficients 1/16 and their sums are exact enough."""
    names = ["gemma-a", "gemma-b-vocabulary"]
    for name in names:
        tiny.make(name, tmp_path)

    def merged(times: int) -> dict[str, Tensor]:
        config = {
            "merge_method": "linear",
            "models": [{"model": str(tmp_path / name), "parameters": {"weight": 1}} for name in names * times],
            "tokenizer_source": "union",
            "dtype": "float32",
        }
        arcmerge.merge(config, tmp_path / f"{times}", device="cpu")
        return load_file(tmp_path / f"{times}" / "model.safetensors")

    twice, often = merged(1), merged(8)
    assert len(often[tiny.EMBEDDING]) == 336
    for name, tensor in twice.items():
        torch.testing.assert_close(often[name], tensor, rtol=0, atol=16 * 2**-24 * float(tensor.abs().max()))
