"""New parameters for a merge in memory: what does not depend on them is computed once, with the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution import statistics_pass
from arcmerge.merging.execution.in_memory import InMemoryMerge
from arcmerge.merging.execution.statistics_cache import StatisticsCache
from arcmerge.merging.methods.measure import Gram
from arcmerge.merging.methods.registry import get
from arcmerge.merging.methods.spherical import MultiSlerp, Slerp
from arcmerge.merging.options import Options
from arcmerge.merging.plan.plan import Planner
from arcmerge.merging.prepare import Prepared, prepare
from arcmerge.merging.recipe.changes import changed_recipe
from vectors import arguments_of

# Parameters of each method whose rule is a formula of the Gram matrix of a pair.
FORMULAS: dict[str, dict[str, Any]] = {
    "slerp": {"t": 0.3},
    "slerp, normalized": {"t": 0.3, "slerp_normalize": True},
    "nuslerp": {"weight": [0.4, 0.7]},
    "multislerp": {"weight": [0.4, 0.7]},
    "karcher": {},
    "geometric_median": {"weight": [0.4, 0.7]},
    "delerp": {"t": 0.3},
}
T: dict[str, Any] = {
    "a number": 0.7,
    "ends": [0, 0.4, 1],
    "a gradient": [0.1, 0.9, 0.3],
    "filters": [{"filter": "self_attn", "value": [0.2, 0.8]}, {"filter": "mlp", "value": 1}, {"value": 0.5}],
}


def opened(folder: Path, **changes: Any) -> Prepared:
    names = [str(folder / "gemma-a"), str(folder / "gemma-b")]
    config = {
        "merge_method": "slerp",
        "base_model": names[0],
        "models": [{"model": name} for name in names],
        "parameters": {"t": 0.3},
        **changes,
    }
    if "slices" in changes:
        del config["models"]
    return prepare(config, Options(device="cpu", threads=1), lambda sentence: None)


def sliced(folder: Path, *ranges: tuple[int, int]) -> list[dict[str, Any]]:
    """Slices of the pair with a parameter of their own each."""
    return [
        {
            "sources": [{"model": str(folder / name), "layer_range": [*layers]} for name in ("gemma-a", "gemma-b")],
            "parameters": {"t": [0.1 * (index + 1), 0.5]},
        }
        for index, layers in enumerate(ranges)
    ]


@pytest.mark.parametrize("case", FORMULAS)
def test_many_matrices_at_once_have_the_bits_of_each_alone(case: str) -> None:
    name = case.partition(",")[0]
    method = get(name)
    arguments = arguments_of(name, 2, 0 if method.base == "required" else None, FORMULAS[case])
    inputs = np.random.default_rng(1).standard_normal((60, 2, 7))
    inputs[1, 1], inputs[2, 1], inputs[3, 1], inputs[4, 0, 0] = inputs[1, 0], 0, -inputs[3, 0], np.nan
    inputs[20:40, 1] = inputs[20:40, 0] + 0.01 * inputs[20:40, 1]
    grams = np.einsum("nif,njf->nij", inputs, inputs)
    together = method.all_coefficients(grams, arguments)
    alone = [method.coefficients(gram, arguments) for gram in grams]
    assert [each.branch for each in together] == [each.branch for each in alone]
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_array_equal(ours.values.view(np.int64), theirs.values.view(np.int64))


@pytest.mark.parametrize("t", T)
@pytest.mark.parametrize("ranges", [(), ((0, 6),), ((0, 3), (3, 6))], ids=["models", "a slice", "slices"])
def test_a_plan_with_another_t_is_that_of_its_recipe(models: Path, t: str, ranges: tuple[tuple[int, int], ...]) -> None:
    prepared = opened(models, slices=sliced(models, *ranges)) if ranges else opened(models)
    recipe = changed_recipe(prepared.recipe, {"t": T[t]})
    ours = prepared.with_recipe(recipe).plan
    theirs = Planner(recipe, get("slerp"), prepared.checkpoints).plan()
    assert [shown(job) for job in ours.jobs] == [shown(job) for job in theirs.jobs]
    assert (ours.source_layers, ours.tied, ours.vocab_size) == (theirs.source_layers, theirs.tied, theirs.vocab_size)
    assert [shown(job) for job in ours.jobs] != [shown(job) for job in prepared.plan.jobs]


def shown(job: Any) -> object:
    constant = None if job.constant is None else (job.constant.values.tolist(), job.constant.branch)
    inputs = [(str(item.model), item.info.name, item.cast) for item in job.inputs]
    return job.output, inputs, job.values, job.result, constant, job.vocabulary, job.setting


def test_a_new_t_neither_plans_again_nor_takes_a_formula_a_tensor(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise AssertionError("the models were planned again")

    merge = InMemoryMerge(opened(models))
    calls: list[tuple[int, ...]] = []
    formula = Slerp.formula

    def counted(method: Slerp, gram: Any, arguments: Any) -> Any:
        calls.append(gram.shape)
        return formula(method, gram, arguments)

    monkeypatch.setattr(Planner, "plan", refused)
    monkeypatch.setattr(Slerp, "formula", counted)
    tensors = merge.set_parameters({"t": 0.7})
    assert calls == [(tensors, 2, 2)]
    calls.clear()
    merge.set_parameters({"t": [0, 0.5, 0.9]})  # the first layer is a copy, and so are the tensors around the layers
    assert [shape[0] for shape in calls] == [11] * 5


def test_an_error_of_one_tensor_of_many_names_it(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = opened(models, merge_method="multislerp", parameters={"weight": 1}, base_model=None)
    grams = [np.eye(2) * (index + 1) for index, _ in enumerate(prepared.plan.jobs)]

    def formula(method: object, gram: Any, arguments: Any) -> Any:
        if (gram[:, 0, 0] == 3).any():
            raise ArcmergeError("'weight' must be another, got this")
        return gram[..., 0], np.zeros(gram.shape[:-2], bool)

    monkeypatch.setattr(MultiSlerp, "formula", formula)
    jobs = prepared.plan.jobs
    found = {index: [statistics_pass.Statistic(Gram(), gram)] for index, gram in enumerate(grams)}
    with pytest.raises(ArcmergeError, match=f"^{jobs[2].output.name}: 'weight' must be another"):
        statistics_pass.rules_of(jobs, found)
    del found[2]
    assert [*statistics_pass.rules_of(jobs, found)] == [*found]


def test_kept_matrices_have_the_keys_of_the_file(models: Path) -> None:
    import json

    prepared = opened(models)
    cache = StatisticsCache(prepared.checkpoints.values(), models)
    job = prepared.plan.jobs[3]
    folders = [str(item.checkpoint.folder.resolve()) for item in job.inputs]
    inputs = [[folder, item.info.name, "bfloat16"] for folder, item in zip(folders, job.inputs, strict=True)]
    for centered in (False, True):
        key = json.dumps([inputs, 0 if centered else None, False])
        assert cache._key(job, Gram(centered)) == key
