"""Sweeps whose candidates an optimiser proposes, or a cluster scores."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import arcmerge
from arcmerge.merging.methods import registry
from arcmerge.merging.methods.linear import Linear
from arcmerge.merging.recipe.parameters import Parameter
from arcmerge.merging.recipe.recipe import load_recipe
from arcmerge.sweeping.candidates import of_grid, of_numbers
from arcmerge.sweeping.journal import Scored
from arcmerge.sweeping.optimizer import Optimize, Optimizer
from arcmerge.sweeping.sweep import BEST, score_candidates
from paths import PYTHONPATH
from sweeps import KnownLosses, LeastT, recipe, rows


@pytest.mark.parametrize("sampler", ["cma", "tpe"])
def test_a_search_comes_near_and_goes_on_from_its_journal(models: Path, tmp_path: Path, sampler: str) -> None:
    config, out = recipe(models, [{"filter": "mlp", "value": [0, 1]}, {"value": 0}]), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        score_candidates(config, [], LeastT(fails_at=15), out, optimize=Optimize(40, sampler=sampler), device="cpu")
    score = LeastT()
    best = score_candidates(config, [], score, out, optimize=Optimize(40, sampler=sampler), device="cpu").best
    assert score.calls == 25
    found = rows(out)
    assert list(found[0]) == ["candidate", "t:mlp[0]", "t:mlp[1]", "t", "score", "seconds"]
    assert len({(row["t:mlp[0]"], row["t:mlp[1]"], row["t"]) for row in found}) == 40
    assert all(0 <= float(row[name]) <= 1 for row in found for name in ("t:mlp[0]", "t:mlp[1]", "t"))
    first = sorted(float(row["score"]) for row in found[:10])
    assert best is not None
    assert best.score < 0.5 * first[5]
    assert yaml.safe_load((out / BEST).read_text())["parameters"]["t"] == best.parameters["t"]


def test_a_search_is_the_same_each_time_and_keeps_to_its_bounds(models: Path) -> None:
    one, other = (
        Optimizer(load_recipe(recipe(models, [0, 1])), [True], Optimize(5, {"t": (-1, 0.2)}), []) for _ in range(2)
    )
    for number in range(5):
        asked = one.ask()
        assert asked == other.ask()
        assert all(-1 <= value <= 0.2 for value in asked.varied.values())
        assert asked.parameters["t"] == list(asked.varied.values())
        score = math.nan if number == 1 else float(number)
        one.tell(Scored.of(asked, score, 1.0))
        other.tell(Scored.of(asked, score, 1.0))
    scalar = Optimizer(load_recipe(recipe(models)), [True], Optimize(1), []).ask()
    assert scalar.parameters == {"t": scalar.varied["t"]}


def test_only_proposals_count_as_such(models: Path, tmp_path: Path) -> None:
    """What was listed comes first, and an optimiser over the same numbers learns from it."""
    options: dict[str, Any] = {"device": "cpu", "progress": lambda one, best, done, total: told.append((done, total))}
    told: list[tuple[int, int]] = []
    out, listed = tmp_path / "out", of_numbers([0.1, 0.9])
    score_candidates(recipe(models), listed, LeastT(), out, **options)
    score_candidates(recipe(models), listed[:1], LeastT(), out, optimize=Optimize(2), **options)
    score_candidates(recipe(models), listed[:1], LeastT(), out, optimize=Optimize(4), **options)
    assert told == [(1, 2), (2, 2), (2, 3), (3, 3), (4, 5), (5, 5)]
    assert [row["candidate"] for row in rows(out)] == [
        "t=0.1",
        "t=0.9",
        *(f"trial {number}" for number in (1, 2, 3, 4)),
    ]


def test_a_proposal_that_was_lost_leaves_no_name_twice(models: Path) -> None:
    """As where a cluster was killed with the third scored and the second not."""
    told = [Scored(f"trial {number}", {"t": 0.5}, {"t": 0.5}, proposed=True, score=1.0) for number in (1, 3)]
    asked = Optimizer(load_recipe(recipe(models)), [True], Optimize(5), told).ask()
    assert asked.name == "trial 4"


def test_a_search_varies_every_number_that_is_named(models: Path) -> None:
    """The numbers of a curve, of each model and of each filter; whole numbers stay whole."""
    config = {**recipe(models), "merge_method": "task_arithmetic"}
    config["models"][1]["parameters"] = {"weight": [0.1, 0.2]}
    config["parameters"] = {"lambda": [{"filter": "mlp", "value": [1, 2]}, {"value": 0.5}]}
    vary = {"weight": (0.25, 0.75), "lambda": (-2.0, -1.0), "weight[1]:norm": (3.0, 4.0)}
    asked = Optimizer(load_recipe(config), [True], Optimize(1, vary), []).ask()
    numbers = iter(asked.varied.values())
    assert list(asked.varied) == [
        *("weight[1][0]", "weight[1][1]", "lambda:mlp[0]", "lambda:mlp[1]", "lambda", "weight[1]:norm"),
    ]
    assert asked.parameters == {
        "weight[1]": [next(numbers), next(numbers)],
        "lambda": [{"filter": "mlp", "value": [next(numbers), next(numbers)]}, {"value": next(numbers)}],
        "weight[1]:norm": next(numbers),
    }
    assert 3 <= asked.varied["weight[1]:norm"] <= 4
    assert -2 <= asked.varied["lambda"] <= -1
    karcher = {**recipe(models), "merge_method": "karcher", "parameters": {}}
    whole = Optimizer(load_recipe(karcher), [True], Optimize(1, {"max_iter": (1, 9), "tol": (0, 1)}), []).ask()
    assert type(whole.parameters["max_iter"]) is int


def test_a_grid_of_the_same_numbers_teaches_the_search(models: Path) -> None:
    told = [Scored(f"t={t}", {"t": t}, {"t": t}, score=abs(t - 0.62)) for t in (0.1, 0.6, 0.9)]
    search = Optimizer(load_recipe(recipe(models)), [True], Optimize(5), told)
    assert [trial.params for trial in search._study.trials] == [{"t": 0.1}, {"t": 0.6}, {"t": 0.9}]


@pytest.mark.parametrize(
    ("vary", "sentence"),
    [
        ({"t[0]": (0, 1)}, r"'t\[0\]' must be a parameter of each model, got one that they share"),
        ({"t": (1, 1)}, "'bounds' must be low:high with low below high, got 1:1 for t"),
        ({"slerp_normalize": (0, 1)}, "'slerp_normalize' must be a number to be optimized, got a switch"),
    ],
)
def test_a_search_needs_numbers_and_bounds(models: Path, vary: dict[str, Any], sentence: str) -> None:
    with pytest.raises(arcmerge.ArcmergeError, match=sentence):
        Optimizer(load_recipe(recipe(models)), [True], Optimize(1, vary), [])


class Ranged(Linear):
    name = "ranged"
    parameters = (*Linear.parameters, Parameter("density", low=0.0, high=1.0, default=1.0))


def test_values_out_of_range_are_refused_before_the_first_score(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.METHODS, "ranged", Ranged())  # type: ignore[arg-type]
    config = {**recipe(models), "merge_method": "ranged", "parameters": {"weight": 1}}
    score, options = LeastT(), {"device": "cpu", "warn": lambda sentence: None}
    calls: list[tuple[Any, Any]] = [
        (of_grid({"density": [0.5, 2]}, load_recipe(config)), None),
        ([], Optimize(3, {"density": (0.5, 2.0), "weight[1]": (0.0, 1.0)})),
    ]
    for candidates, optimize in calls:
        with pytest.raises(arcmerge.ArcmergeError, match=r"'parameters\.density' must be between 0 and 1, got 2"):
            score_candidates(config, candidates, score, tmp_path / "out", optimize=optimize, **options)
    assert score.calls == 0


def test_a_search_is_refused_before_the_first_score(models: Path, tmp_path: Path) -> None:
    linear = {"merge_method": "linear", "models": recipe(models)["models"], "parameters": {"weight": 0.5}}
    score, sentence = LeastT(), r"'parameters' must be those of 'linear' \(.*\), got 't'"
    with pytest.raises(arcmerge.ArcmergeError, match=sentence):
        score_candidates(linear, [], score, tmp_path / "out", optimize=Optimize(2), device="cpu")
    slices = recipe(models)
    sources = [{**one, "layer_range": [0, 6]} for one in slices.pop("models")]
    slices["slices"] = [{"sources": sources, "parameters": {"t": 0.2}}]
    with pytest.raises(arcmerge.ArcmergeError, match="'t' must be set under the recipe's own 'parameters' to be optim"):
        score_candidates(slices, [], score, tmp_path / "out", optimize=Optimize(2), device="cpu")
    assert score.calls == 0


# ---- a cluster


class Mortal:
    """Kills the process that scores by it, the first time that it is called at t = 0.5."""

    title, minimize = "mortal", True

    def __init__(self, mark: Path, always: bool = False) -> None:
        self.mark, self.always, self.identity = mark, always, "mortal"

    def __call__(self, model: Any) -> float:
        t = float(yaml.safe_load(model.recipe)["parameters"]["t"])
        if t == 0.5 and (self.always or not self.mark.exists()):
            self.mark.touch()
            os._exit(1)
        if t == 0.75:
            raise arcmerge.ArcmergeError("0.75 cannot be scored")
        return abs(t - 0.6)


# The numbers of GPUs, which no machine has.
GPUS = (62, 63)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of this machine, with room for two actors of one thread, and two GPUs by name."""
    ray = pytest.importorskip("ray")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), PYTHONPATH]))
        patch.setenv("CUDA_VISIBLE_DEVICES", ",".join(map(str, GPUS)))
        ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)
        yield ray
        ray.shutdown()


def test_a_cluster_scores_as_one_process_does_though_actors_die(models: Path, tmp_path: Path, cluster: Any) -> None:
    candidates = of_numbers([0.0, 0.25, 0.5, 1.0])
    options: dict[str, Any] = {"device": "cpu", "threads": 1}
    mortal, config = Mortal(tmp_path / "mark"), recipe(models)
    best = score_candidates(config, candidates, mortal, tmp_path / "many", ray=True, **options).best
    assert (tmp_path / "mark").exists()
    alone = score_candidates(config, candidates, mortal, tmp_path / "one", **options).best
    assert best is not None
    assert alone is not None
    assert (best.name, best.score) == (alone.name, alone.score) == ("t=0.5", pytest.approx(0.1))
    scores = [{row["candidate"]: row["score"] for row in rows(tmp_path / name)} for name in ("many", "one")]
    assert scores[0] == scores[1]
    options["optimize"] = Optimize(5)
    assert score_candidates(config, [], mortal, tmp_path / "search", ray=True, **options).best is not None
    assert len(rows(tmp_path / "search")) == 5


def test_a_cluster_passes_on_what_is_wrong(models: Path, tmp_path: Path, cluster: Any) -> None:
    options: dict[str, Any] = {"device": "cpu", "threads": 2, "ray": True}
    with pytest.raises(arcmerge.ArcmergeError, match=r"0\.75 cannot be scored"):
        score_candidates(recipe(models), of_numbers([0.75]), Mortal(tmp_path / "mark"), tmp_path / "one", **options)
    with pytest.raises(arcmerge.ArcmergeError, match=r"'t=0\.5' must be scored by a worker that lives, got 3 deaths"):
        score_candidates(
            recipe(models), of_numbers([0.5]), Mortal(tmp_path / "mark", always=True), tmp_path / "two", **options
        )


def _refuse() -> None:
    raise arcmerge.ArcmergeError("the models are not on this machine")


class Stationary:
    """Cannot be had in another process."""

    title, minimize, identity = "stationary", True, "stationary"

    def __reduce__(self) -> Any:
        return _refuse, ()

    def __call__(self, model: Any) -> float:
        return 0.0


def test_a_worker_that_cannot_start_says_why(models: Path, tmp_path: Path, cluster: Any) -> None:
    sentence = r"^'--ray' must be able to start workers, got an error: the models are not on this machine$"
    with pytest.raises(arcmerge.ArcmergeError, match=sentence):
        score_candidates(recipe(models), of_numbers([0.5]), Stationary(), tmp_path / "out", device="cpu", ray=True)


class OwnGpu:
    """The number of the GPU that Ray gave the process."""

    title, minimize, identity = "GPU", True, "GPU"

    def __call__(self, model: Any) -> float:
        import ray

        (gpu,) = ray.get_gpu_ids()
        time.sleep(0.5)  # so that the other has its turn
        return float(gpu)


def test_every_gpu_of_a_cluster_has_an_actor(models: Path, tmp_path: Path, cluster: Any) -> None:
    """GPUs that Ray is told of; the models are merged on the CPU, as there are none."""
    options: dict[str, Any] = {"device": "auto", "ray": True}
    score_candidates(recipe(models), of_numbers([0.0, 0.25, 0.5, 1.0]), OwnGpu(), tmp_path / "out", **options)
    assert {float(row["score"]) for row in rows(tmp_path / "out")} == set(GPUS)


@pytest.mark.parametrize(
    ("processors", "device", "sentence"),
    [
        (8.0, "cuda:1", "'device' must be one that the cluster has, got cuda:1 and no GPU; use --device cpu"),
        (0.0, "cpu", "must find a processor or a GPU"),
    ],
)
def test_a_cluster_that_has_nothing_to_give(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processors: float, device: str, sentence: str
) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": processors}}])
    with pytest.raises(arcmerge.ArcmergeError, match=sentence):
        score_candidates(recipe(models), of_numbers([0.5]), OwnGpu(), tmp_path / "out", device=device, ray=True)


def test_a_cluster_races(models: Path, tmp_path: Path, cluster: Any) -> None:
    """All candidates have the first look. Then every actor takes one, and later ones race against the best of them."""
    candidates = of_numbers([0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.9, 1.0])
    options: dict[str, Any] = {"device": "cpu", "threads": 1, "race": 0}
    result = score_candidates(recipe(models), candidates, KnownLosses(), tmp_path / "out", ray=True, **options)
    assert result.best is not None
    assert result.best.name == "t=0.6"
    assert 0 < sum(one.stopped for one in result.scored) <= 6
