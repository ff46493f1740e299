"""Random recipes, planned by arcmerge and by mergekit 0.1.5, with every value compared.

Both planners resolve every parameter of every tensor before a weight is read. test_methods_mergekit.py compares the
results of the methods for equal values.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("mergekit")
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.merge_methods import api
from mergekit.merge_methods.registry import registered_methods
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

import tiny
from arcmerge.errors import ArcmergeError
from arcmerge.merging.methods.registry import METHODS
from arcmerge.merging.options import Options
from arcmerge.merging.prepare import prepare
from arcmerge.merging.recipe.parameters import REQUIRED
from vectors import assert_close, merge, random_tensors

THEIRS = {method.spec.name: method.spec for method in registered_methods()}
SHARED_METHODS = [name for name in THEIRS if name in METHODS]
# Every name that mergekit has for some method, and names in public recipes that no method has.
NAMES = sorted({parameter.name for spec in THEIRS.values() for parameter in spec.parameters} | {"random_seed", "tau"})
LAYERS = 3
RECIPES = 60
FILTERS = ["self_attn", "mlp", "norm", "embed_tokens", "lm_head", "layers.1.", "q_proj", "Norm", ".*", ""]
OPTIONS = Options(device="cpu", threads=1)
# Refused by arcmerge: mergekit divides by zero, takes densities above 1 for 1 and below 0 for 0, and fails amid a merge
# with other epsilons than these.
REFUSED = ("must not add up to 0", "must be between 0 and 1", "must be 0 or more", "'epsilon' must be less than")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    geometry = tiny.Geometry(8, 16, LAYERS, 2, 1, 4, 16)
    for seed, name in enumerate("ABC"):
        weights = tiny.weights(seed, "llama", geometry, head=True)
        model = tiny.Model(lambda weights=weights: weights, "llama", geometry, tied=False)
        tiny.write_checkpoint(folder / name, model)
    return folder


class Recipes:
    """Random recipes of one seed."""

    def __init__(self, seed: int, home: Path) -> None:
        self.random = random.Random(seed)
        self.home = home

    def recipe(self) -> dict[str, Any]:
        draw = self.random
        method = draw.choice(SHARED_METHODS)
        count = {"passthrough": 1, "model_stock": 3}.get(method, draw.choice([2, 2, 3]))
        models = [str(self.home / name) for name in draw.sample("ABC", count)]
        required = THEIRS[method].contract.base.value == "required"
        with_base = count == 3 if method == "nuslerp" else required or draw.random() < 0.5
        base = draw.choice(models) if with_base else None
        config: dict[str, Any] = {"merge_method": method, "base_model": base, "parameters": self.block(method, 0.95)}
        if draw.random() < 0.5:
            if draw.random() < 0.3 and count > 1:  # the base is then added
                models = [model for model in models if model != base]
            module = {"models": [{"model": model, "parameters": self.block(method, 0.3)} for model in models]}
        else:
            lengths = draw.choice([[3], [2, 1], [1, 1, 1], [2, 3]])
            module = {"slices": [self.slice(method, models, length) for length in lengths]}
        if draw.random() < 0.3:
            config["modules"] = {"default": {**module, "parameters": self.block(method, 0.3)}}
        else:
            config.update(module)
        return config

    def slice(self, method: str, models: list[str], length: int) -> dict[str, Any]:
        first = [self.random.randint(0, LAYERS - length) for _ in models]
        sources = [
            {"model": model, "layer_range": [start, start + length], "parameters": self.block(method, 0.2)}
            for model, start in zip(models, first, strict=True)
        ]
        base = {"base_model": self.random.choice(models)} if self.random.random() < 0.2 else {}
        return {"sources": sources, "parameters": self.block(method, 0.3), **base}

    def block(self, method: str, often: float) -> dict[str, Any]:
        """Parameters of the method, each with this probability, and parameters of other methods."""
        own = {parameter.name: parameter for parameter in THEIRS[method].parameters}
        block = {name: self.setting(one.value_type) for name, one in own.items() if self.random.random() < often}
        for name in self.random.sample(NAMES, self.random.choice([0, 0, 1, 2])):
            block.setdefault(name, self.setting(own[name].value_type if name in own else float))
        return block

    def setting(self, kind: Any) -> Any:
        if self.random.random() < 0.5:
            return self.values(kind)
        rules = [{"filter": one, "value": self.values(kind)} for one in self.random.sample(FILTERS, 2)]
        rules = rules[: self.random.randint(0, 2)]
        if not rules or self.random.random() < 0.8:
            rules.append({**self.random.choice([{}, {"filter": "*"}, {"filter": None}]), "value": self.values(kind)})
        return rules[0] if len(rules) == 1 and self.random.random() < 0.5 else rules

    def values(self, kind: Any) -> Any:
        """A value or a gradient, rarely an empty one."""
        count = self.random.choice([1, 1, 1, 2, 2, 3, 3, 4])
        return (
            [self.scalar(kind) for _ in range(0 if self.random.random() < 0.05 else count)]
            if self.random.random() < 0.5
            else self.scalar(kind)
        )

    def scalar(self, kind: Any) -> Any:
        draw = self.random
        if kind is bool:
            return draw.choice([True, False, "true", "False", "yes", "off", 1, 0, 1.0])
        if kind is int:
            return draw.choice([4, 8, 12, "4", 8.0])
        return draw.choice([0, 1, 0.5, 0.25, 1.5, -0.5, "0.3", "1e-3", True, round(draw.random(), 3)])


def planned(config: dict[str, Any]) -> dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]:
    """mergekit's parameters of every tensor: the shared ones, and those of each input."""
    parsed, options = MergeConfiguration.model_validate(config), MergeOptions()
    architecture, result = get_architecture_info(parsed, options), parsed.referenced_models()[0].config()
    planner = MergePlanner(parsed, architecture, options, result)
    planner._plan()
    return {
        weight.name: (
            dict(task.parameters.items()),
            [dict(task.input_parameters[model].items()) for model in task.model_order],
        )
        for weight, task in planner._tensors
    }


def set_names(config: Any) -> set[str]:
    """Every name under a `parameters:` of a recipe."""
    if isinstance(config, list):
        return {name for entry in config for name in set_names(entry)}
    if not isinstance(config, dict):
        return set()
    within = {name for key, entry in config.items() if key != "parameters" for name in set_names(entry)}
    return within | set(config.get("parameters") or {})


@pytest.mark.parametrize("first", range(0, RECIPES, RECIPES // 5))
def test_every_tensor_has_the_parameters_of_mergekit(home: Path, first: int) -> None:
    compared = 0
    for seed in range(first, first + RECIPES // 5):
        config = Recipes(seed, home).recipe()
        try:
            expected = planned(config)
        except Exception:  # mergekit refuses recipes with exceptions of many types
            continue
        warnings: list[str] = []
        try:
            plan = prepare(config, OPTIONS, warnings.append).plan
        except ArcmergeError as error:
            assert all(any(rule in problem for rule in REFUSED) for problem in error.problems), yaml.safe_dump(config)  # noqa: PT017
            continue
        own = {parameter.name for parameter in THEIRS[plan.method.name].parameters}
        extensions = {parameter.name for parameter in plan.method.parameters if parameter.extension}
        without_effect = own - {parameter.name for parameter in plan.method.parameters}
        for name in set_names(config) - own | set_names(config) & without_effect:
            assert any(f".{name}: " in f".{warning}" for warning in warnings), (name, yaml.safe_dump(config))
        assert {job.output.name for job in plan.jobs} == set(expected)
        for job in plan.jobs:
            shared, inputs = expected[job.output.name]
            theirs = {key: value for key, value in shared.items() if key not in without_effect}
            assert {key: value for key, value in job.values.shared.items() if key not in extensions} == theirs
            for name, values in job.values.per_input.items():
                default = {"scale": 1.0}.get(name)  # mergekit's None: not scaled
                given = [default if one.get(name) is None else one[name] for one in inputs]
                assert list(values) == given, (job.output.name, name, yaml.safe_dump(config))
        compared += 1
    assert compared >= RECIPES // 15


@pytest.mark.parametrize("name", SHARED_METHODS)
def test_unknown_parameters_have_no_effect_and_give_a_warning(home: Path, name: str) -> None:
    # A density of 1 gives a warning of its own; task_arithmetic has none.
    given = {"weight", "t", "density"} & {parameter.name for parameter in METHODS[name].parameters}
    known = dict.fromkeys(given, 0.5)
    unknown = dict.fromkeys(set(NAMES) - {parameter.name for parameter in THEIRS[name].parameters}, True)
    models = [str(home / letter) for letter in {"passthrough": "A", "model_stock": "ABC"}.get(name, "AB")]

    def planned_with(extra: dict[str, Any]) -> tuple[list[Any], list[str]]:
        sources = [{"model": model, "layer_range": [0, LAYERS], "parameters": extra} for model in models]
        base = models[0] if THEIRS[name].contract.base.value == "required" else None
        config = {"merge_method": name, "base_model": base, "parameters": {**known, **extra}}
        warnings: list[str] = []
        slices = [{"sources": sources, "parameters": extra}]
        jobs = prepare({**config, "slices": slices}, OPTIONS, warnings.append).plan.jobs
        return [(job.values, None if job.constant is None else job.constant.values.tolist()) for job in jobs], warnings

    plain, silence = planned_with({})
    loaded, warnings = planned_with(unknown)
    assert loaded == plain
    assert silence == []
    places = ["parameters", "slices[0].parameters", *(f"slices[0].sources[{i}].parameters" for i in range(len(models)))]
    assert {warning.split(": ")[0] for warning in warnings} == {f"{place}.{key}" for place in places for key in unknown}
    assert all(f"`{name}` has no such parameter" in warning for warning in warnings)


@pytest.mark.parametrize("name", SHARED_METHODS)
def test_parameters_have_its_types_and_defaults(name: str) -> None:
    theirs = {parameter.name: parameter for parameter in THEIRS[name].parameters}
    for parameter in METHODS[name].parameters:
        if parameter.extension:
            continue
        other = theirs[parameter.name]
        assert (parameter.default is REQUIRED) == other.required
        if (name, parameter.name) == ("passthrough", "scale"):
            assert (other.default, parameter.default) == (None, 1.0)  # not scaled
            continue
        assert other.value_type is parameter.kind
        assert other.required or (parameter.default == other.default and type(parameter.default) is parameter.kind)


@pytest.mark.parametrize(
    "extra",
    [{"int8_mask": True}, {"rescale": True}, {"rescale": False}, {"density": 0.3}, {"density": 0.3, "rescale": True}],
)
def test_parameters_of_task_arithmetic_that_have_no_effect_in_mergekit(extra: dict[str, Any]) -> None:
    """mergekit's schema has them and related methods read them, but its arithmetic does not."""
    tensors = random_tensors(4, 3)
    theirs = api.merge_tensors(
        [torch.tensor(tensor) for tensor in tensors],
        "task_arithmetic",
        base_index=0,
        parameters={"weight": [0.4, 0.9], **{k: [v, v] if k == "density" else v for k, v in extra.items()}},
    )
    ours = merge("task_arithmetic", tensors, 0, weight=(None, 0.4, 0.9))
    assert_close(ours, theirs.numpy(), tensors, relative=1e-12)
    assert not extra.keys() & {parameter.name for parameter in METHODS["task_arithmetic"].parameters}
