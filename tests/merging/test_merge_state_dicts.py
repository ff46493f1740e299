"""arcmerge.merge_state_dicts against arcmerge.merge of the same tensors in files, for every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import arcmerge
import tiny
from arcmerge.merging.methods import registry
from arcmerge.merging.methods.registry import METHODS
from arcmerge.merging.recipe.parameters import Parameter

MODELS = ("gemma-a", "gemma-b", "gemma-b-f16")
# Method, number of models, index of the base, parameters; a tuple has a value for each model.
CASES: dict[str, tuple[str, int, int | None, dict[str, Any]]] = {
    "slerp": ("slerp", 2, 0, {"t": 0.3}),
    "slerp-from-b": ("slerp", 2, 1, {"t": 0.3}),
    "slerp-end": ("slerp", 2, 0, {"t": 1}),
    "slerp-normalized": ("slerp", 2, 0, {"t": 0.6, "slerp_normalize": True}),
    "nuslerp": ("nuslerp", 2, None, {"weight": (0.7, 0.6)}),
    "nuslerp-base": ("nuslerp", 3, 2, {"weight": (0.7, 0.6, None)}),
    "nuslerp-rows": ("nuslerp", 2, None, {"weight": (0.7, 0.6), "nuslerp_flatten": False}),
    "nuslerp-columns": (
        "nuslerp",
        2,
        None,
        {"weight": (0.7, 0.6), "nuslerp_flatten": False, "nuslerp_row_wise": True},
    ),
    "multislerp": ("multislerp", 3, None, {"weight": (0.2, 0.3, 0.4)}),
    "multislerp-base": ("multislerp", 3, 0, {"weight": (None, 0.3, 0.4)}),
    "karcher": ("karcher", 3, None, {}),
    "model_stock": ("model_stock", 3, 0, {}),
    "model_stock-rows": ("model_stock", 3, 0, {"filter_wise": True}),
    "delerp": ("delerp", 2, 1, {"t": 0.3}),
    "geometric_median": ("geometric_median", 3, None, {"weight": (1.0, 0.9, 1.2)}),
    "linear": ("linear", 3, None, {"weight": (0.2, 0.3, 0.0)}),
    "task_arithmetic": ("task_arithmetic", 3, 0, {"weight": (None, 0.9, 0.4), "lambda": 0.8}),
    "passthrough": ("passthrough", 1, None, {"scale": 0.5}),
    "nearswap": ("nearswap", 2, 0, {"t": 0.02}),
    "ties": ("ties", 3, 0, {"weight": (None, 0.9, 0.4), "density": (None, 0.3, 0.7)}),
    "ties-paper": ("ties", 3, 0, {"weight": (None, 0.9, 0.4), "density": 0.3, "variant": "paper", "rescale": True}),
    "dare_linear": ("dare_linear", 3, 1, {"weight": (0.9, None, -0.4), "density": 0.6}),
    "dare_linear-paper": ("dare_linear", 2, 0, {"weight": 0.9, "density": 0.6, "variant": "paper"}),
    "dare_ties": ("dare_ties", 3, 0, {"weight": (None, 0.9, 0.4), "density": (None, 0.3, 1), "normalize": True}),
    "breadcrumbs": ("breadcrumbs", 3, 0, {"weight": (None, 0.9, 0.4), "density": 0.8, "gamma": (None, 0.1, 0)}),
    "breadcrumbs_ties": ("breadcrumbs_ties", 3, 0, {"weight": 0.7, "density": 0.4, "rescale": True, "lambda": 1.5}),
    "della": ("della", 3, 0, {"weight": (None, 0.9, 0.4), "density": (None, 0.5, 0), "epsilon": 0.2}),
    "della_linear": ("della_linear", 3, 2, {"weight": (0.9, -0.4, None), "density": 0.5, "rescale": False}),
    "sce": ("sce", 3, 0, {}),
    "sce-selected": ("sce", 3, 1, {"select_topk": 0.3}),
    "sce-paper": ("sce", 3, 0, {"select_topk": 0.3, "variant": "paper"}),
    "ram": ("ram", 3, 0, {"epsilon": 0.01}),
    "ramplus_tl": ("ramplus_tl", 3, 0, {"epsilon": 0.01, "r": 0.2}),
    "arcee_fusion": ("arcee_fusion", 2, 0, {}),
    "magmax": ("magmax", 3, 2, {"lambda": 0.7}),
    "median": ("median", 3, None, {}),
    "median-even": ("median", 2, None, {}),
    "della_linear-paper": ("della_linear", 2, 0, {"weight": 1, "density": 0.5, "variant": "paper"}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in MODELS:
        tiny.make(name, folder)
    return folder


def state_dict(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def recipe(models: Path, method: str, count: int, base: int | None, parameters: dict[str, Any]) -> dict[str, Any]:
    per_model = {name: value for name, value in parameters.items() if isinstance(value, tuple)}
    return {
        "merge_method": method,
        "models": [
            {
                "model": str(models / name),
                "parameters": {key: value[i] for key, value in per_model.items() if value[i] is not None},
            }
            for i, name in enumerate(MODELS[:count])
        ],
        "parameters": {name: value for name, value in parameters.items() if name not in per_model},
        **({} if base is None else {"base_model": str(models / MODELS[base])}),
    }


def assert_equal_bits(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_every_method_has_a_case() -> None:
    assert {method for method, *_ in CASES.values()} == set(METHODS)


@pytest.mark.parametrize("case", CASES)
def test_bits_are_those_of_a_merge_of_files(models: Path, tmp_path: Path, case: str) -> None:
    method, count, base, parameters = CASES[case]
    arcmerge.merge(recipe(models, method, count, base, parameters), tmp_path / "out", device="cpu")
    inputs = [state_dict(models / name) for name in MODELS[:count]]
    merged = arcmerge.merge_state_dicts(
        inputs, method, base=None if base is None else inputs[base], parameters=parameters
    )
    assert_equal_bits(merged, state_dict(tmp_path / "out"))


def test_a_gram_matrix_is_summed_over_the_same_pieces(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arcmerge.merging.execution.work_units.PIECE_ELEMENTS", 100)
    test_bits_are_those_of_a_merge_of_files(models, tmp_path, "karcher")


@pytest.mark.parametrize("case", ["ties", "ties-paper", "dare_ties", "della", "sce-selected", "arcee_fusion"])
def test_counts_and_sums_are_the_same_for_any_pieces(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("arcmerge.merging.execution.work_units.PIECE_ELEMENTS", 100)
    test_bits_are_those_of_a_merge_of_files(models, tmp_path, case)


def test_a_base_that_is_not_among_the_models_is_added(models: Path) -> None:
    a, b, c = (state_dict(models / name) for name in MODELS)
    parameters: dict[str, Any] = {"weight": [1, 0.5], "lambda": 0.8}
    added = arcmerge.merge_state_dicts([a, b], "task_arithmetic", base=c, parameters=parameters)
    listed = arcmerge.merge_state_dicts(
        [a, b, c], "task_arithmetic", base=c, parameters={"weight": [1, 0.5, None], "lambda": 0.8}
    )
    assert_equal_bits(added, listed)


def test_a_parameter_can_be_a_function_of_the_name(models: Path) -> None:
    a, b, _ = (state_dict(models / name) for name in MODELS)
    merged = arcmerge.merge_state_dicts(
        [a, b], "slerp", base=a, parameters={"t": lambda name: 0.0 if "mlp" in name else 0.4}
    )
    assert_equal_bits(merged, arcmerge.slerp(a, b, lambda name: 0.0 if "mlp" in name else 0.4))
    assert torch.equal(merged["model.layers.0.mlp.up_proj.weight"], a["model.layers.0.mlp.up_proj.weight"])


def test_integers_and_empty_tensors_are_kept() -> None:
    a = {"positions": torch.arange(3), "empty": torch.ones(0, 4)}
    b = {"positions": torch.arange(3) + 1, "empty": torch.ones(0, 4)}
    merged = arcmerge.merge_state_dicts([a, b], "slerp", base=b, parameters={"t": 0.5})
    assert_equal_bits(merged, b)
    assert merged["positions"] is not b["positions"]


def test_values_out_of_range_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Bounded(type(METHODS["linear"])):  # type: ignore[misc]
        name = "bounded"
        parameters = (Parameter("weight", scope="input", low=0, high=1), METHODS["linear"].parameters[1])

    monkeypatch.setattr(registry, "METHODS", {"bounded": Bounded()})
    for weight in (2, [0.5, 2], lambda name: 2):
        with pytest.raises(arcmerge.ArcmergeError, match=r"^'weight' must be between 0 and 1, got 2$"):
            arcmerge.merge_state_dicts([X, X], "bounded", parameters={"weight": weight})
    assert torch.equal(arcmerge.merge_state_dicts([X, X], "bounded", parameters={"weight": [0, 1]})["x"], X["x"])


X = {"x": torch.ones(3)}


@pytest.mark.parametrize(
    ("models", "method", "parameters", "sentence"),
    [
        ([X, X], "slurp", {}, "'merge_method' must be one of .*, got 'slurp'; did you mean `slerp`"),
        ([X, X], "slerp", {"w": 1}, "'parameters' must be among t, slerp_normalize, got 'w'"),
        ([X, X], "slerp", {}, "'t' must have a value for x, got none"),
        ([X, X], "slerp", {"t": "half"}, "'t' must be a finite number, got 'half'"),
        ([X, X], "slerp", {"t": [0.1, 0.2]}, "'t' must have one value, got 2 values"),
        ([X, X], "linear", {"weight": [1]}, "'weight' must have one value for each of 2 models, got 1 values"),
        ([X, X, {"x": torch.ones(3)}], "slerp", {"t": 0.5}, "'x': 'slerp' must have exactly 1 model besides its base"),
        ([X, {"y": torch.ones(3)}], "slerp", {"t": 0.5}, "'models' must have the same names, got 'x' and 1 more in"),
        ([X, {"x": torch.ones(4)}], "slerp", {"t": 0.5}, "'x' must have the same shape in all models, got .3,. and"),
        ([X, {"x": torch.ones(3, device="meta")}], "slerp", {"t": 0.5}, "'x' must be on the same device"),
        ([], "slerp", {"t": 0.5}, "'models' must have 1 or more state dicts, got 0"),
    ],
)
def test_what_is_wrong_is_named(models: list[Any], method: str, parameters: dict[str, Any], sentence: str) -> None:
    with pytest.raises(arcmerge.ArcmergeError, match=sentence):
        arcmerge.merge_state_dicts(models, method, base=X, parameters=parameters)
