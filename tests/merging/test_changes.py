"""Changes of a recipe's parameters: each key writes to its own place, and everything else stays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import yaml

import arcmerge
from arcmerge.gemma2.model import Gemma2
from arcmerge.merging.recipe.changes import Key, changed_recipe, models_with, own_rules
from arcmerge.merging.recipe.recipe import load_recipe

TWO = {
    "merge_method": "task_arithmetic",
    "base_model": "org/base",
    "models": [{"model": "org/one", "parameters": {"weight": 0.25}}, {"model": "other/two@main"}],
    "parameters": {"weight": 1, "lambda": 0.5},
}
SLICES = {
    "merge_method": "linear",
    "slices": [
        {"sources": [{"model": "org/one", "layer_range": [0, 2]}, {"model": "org/two", "layer_range": [0, 2]}]},
        {"sources": [{"model": "org/two", "layer_range": [2, 4], "parameters": {"weight": 3}}]},
    ],
    "parameters": {"weight": [{"filter": "norm", "value": 2}, {"value": [0, 1]}]},
}


def changed(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    recipe = changed_recipe(load_recipe(config), changes)
    assert yaml.safe_load(recipe.text) == recipe.document
    return dict(recipe.document)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("weight", Key("weight")),
        ("weight[1]", Key("weight", "1")),
        ("weight[org/name@main]", Key("weight", "org/name@main")),
        ("t:layers.2.", Key("t", None, "layers.2.")),
        ("weight[0]:a:b[c]", Key("weight", "0", "a:b[c]")),
    ],
)
def test_keys(text: str, key: Key) -> None:
    assert Key.read(text) == key
    assert str(key) == text


@pytest.mark.parametrize("text", ["", "[1]", "weight[]", "weight[1", "weight:", ":mlp", "weight[1]mlp"])
def test_keys_that_are_none(text: str) -> None:
    with pytest.raises(arcmerge.ArcmergeError, match=r"must be a parameter as weight, weight\[1\] or weight:mlp, got"):
        Key.read(text)


def test_a_parameter_replaces_all_values() -> None:
    found = changed(TWO, weight=0.75)
    assert found["parameters"] == {"weight": 0.75, "lambda": 0.5}
    assert found["models"][0]["parameters"] == {}
    module = {"merge_method": "linear", "modules": {"default": {"models": TWO["models"], "parameters": {"weight": 3}}}}
    assert "weight" not in str(changed(module, normalize=False, weight=[0, 1])["modules"])


def test_the_value_of_a_model_is_written_into_the_model() -> None:
    by_index, by_name = changed(TWO, **{"weight[1]": 0.5}), changed(TWO, **{"weight[two@main]": np.float64(0.5)})
    assert by_index == by_name
    assert [model.get("parameters") for model in by_index["models"]] == [{"weight": 0.25}, {"weight": 0.5}]
    assert by_index["parameters"] == TWO["parameters"]
    slices = changed(SLICES, **{"weight[org/two]": 5, "weight[0]": 7})["slices"]
    assert [[one.get("parameters") for one in part["sources"]] for part in slices] == [
        [{"weight": 7}, {"weight": 5}],
        [{"weight": 5}],  # of equally specific keys the first decides
    ]


def test_a_filter_leaves_other_tensors_as_they_are() -> None:
    found = changed(SLICES, **{"weight:mlp": 4, "weight:q_proj": [0, 2]})
    ahead = [{"filter": "mlp", "value": 4}, {"filter": "q_proj", "value": [0, 2]}]
    assert found["parameters"]["weight"] == [*ahead, {"filter": "norm", "value": 2}, {"value": [0, 1]}]
    assert found["slices"][1]["sources"][0]["parameters"]["weight"] == [*ahead, {"value": 3}]
    assert "parameters" not in found["slices"][0]["sources"][0]


def test_the_more_specific_key_decides_whatever_the_order() -> None:
    changes = {"weight[1]:mlp": 1, "weight[1]": 2, "weight:mlp": 3, "weight": 4}
    one, other = changed(TWO, **changes), changed(TWO, **dict(reversed(changes.items())))
    assert one == other
    assert one["models"][1]["parameters"]["weight"] == [
        {"filter": "mlp", "value": 1},
        {"filter": "mlp", "value": 3},
        {"value": 2},
    ]
    assert one["parameters"]["weight"] == [{"filter": "mlp", "value": 3}, {"value": 4}]


def test_blocks_that_an_alias_shares_are_changed_one_by_one() -> None:
    text = "merge_method: linear\nmodels: [{model: a, parameters: &p {weight: 1}}, {model: b, parameters: *p}]\n"
    found = changed_recipe(load_recipe(text), {"weight[1]": 2}).document
    assert [model["parameters"] for model in found["models"]] == [{"weight": 1}, {"weight": 2}]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"wieght": 1},
            r"'parameters' must be those of 'task_arithmetic' \('weight', .*\), got 'wieght'; did you mean",
        ),
        ({"weight[3]": 1}, r"'weight\[3\]' must have the index or the name of one model \(org/one, other/two@main, "),
        ({"weight[tw]": 1}, r"'weight\[tw\]' must have the index or the name of one model"),
        ({"lambda[0]": 1}, r"'lambda\[0\]' must be a parameter of each model, got one that they share"),
        ({"weight[2]": 1}, r"'weight\[2\]' must be of another model than the base, got the base"),
        ({"weight[0]": []}, r"'weight\[0\]' must have a value, got an empty list"),
        ({"weight:mlp": []}, r"'weight:mlp' must have a value, got an empty list"),
        ({"weight": [{"filter": "a", "value": []}]}, r"'weight' must have a value, got an empty list"),
        ({"weight[0]": "much"}, r"'models\[0\]\.parameters\.weight' must be a finite number, got"),
        ({"weight:mlp": [{"value": 1}]}, r"must be a number, a list of numbers only"),
    ],
)
def test_wrong_changes(changes: dict[str, Any], sentence: str) -> None:
    config = {**TWO, "models": [*TWO["models"], {"model": "org/base"}]}
    with pytest.raises(arcmerge.ArcmergeError, match=sentence):
        changed_recipe(load_recipe(config), changes)


def test_a_base_that_is_not_listed_has_no_index() -> None:
    with pytest.raises(arcmerge.ArcmergeError, match="must have the index or the name of one model"):
        changed_recipe(load_recipe(TWO), {"weight[2]": 1})


def test_the_values_of_a_recipe_are_found() -> None:
    recipe = load_recipe(SLICES)
    assert own_rules(recipe, Key("weight")) == [{"filter": "norm", "value": [2]}, {"value": [0, 1]}]
    assert own_rules(recipe, Key("weight", filter="norm")) == [{"filter": "norm", "value": [2]}]
    assert own_rules(recipe, Key("weight", "org/one")) == own_rules(recipe, Key("normalize")) == []
    assert models_with(recipe, "weight") == [0]
    assert own_rules(load_recipe(TWO), Key("weight", "0")) == [{"value": [0.25]}]


def test_a_model_in_memory_takes_the_same_keys(models: Any, tmp_path: Any) -> None:
    """Merged in memory, with the bits that the changed recipe gives on disk."""
    names = [str(models / name) for name in ("gemma-a", "gemma-b")]
    config = {
        "merge_method": "linear",
        "dtype": "bfloat16",
        "models": [{"model": name} for name in names],
        "parameters": {"weight": 1},
    }
    model = Gemma2.from_merge(config, device="cpu")
    assert model.set_parameters(**{"weight[1]": 0.5, "weight[gemma-a]:mlp": [0, 2]})
    model.save(tmp_path / "saved")
    arcmerge.merge(model.recipe, tmp_path / "merged", device="cpu")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("saved", "merged")]
    assert files[0] == files[1]
    assert yaml.safe_load(model.recipe)["models"][1] == {"model": names[1], "parameters": {"weight": 0.5}}
    assert model.set_parameters(**{"weight[1]": 0.5, "weight[gemma-a]:mlp": [0, 2]}) == 0


def test_a_base_of_one_slice_may_be_merged_in_another() -> None:
    """The value of a model is written wherever it is a source; only where it is no base it has an effect."""
    sources = [{"model": "org/one", "layer_range": [0, 2]}, {"model": "org/two", "layer_range": [0, 2]}]
    config = {
        "merge_method": "task_arithmetic",
        "slices": [{"sources": sources, "base_model": base} for base in ("org/one", "org/two")],
        "parameters": {"weight": 1},
    }
    found = changed(config, **{"weight[one]": 0.5})["slices"]
    assert [part["sources"][0]["parameters"] for part in found] == [{"weight": 0.5}] * 2
