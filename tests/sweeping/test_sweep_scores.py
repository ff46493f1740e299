"""Sweeps with several seeds of a random method, and with several scores."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import yaml

import arcmerge
from arcmerge.cli import main
from arcmerge.merging.methods import registry
from arcmerge.merging.recipe.recipe import load_recipe
from arcmerge.sweeping.arguments import read_also
from arcmerge.sweeping.candidates import of_numbers
from arcmerge.sweeping.journal import Scored
from arcmerge.sweeping.optimizer import Optimize, Optimizer
from arcmerge.sweeping.results import front_of
from arcmerge.sweeping.scores import Scoring
from arcmerge.sweeping.sweep import score_candidates
from sweeps import Chance, LeastT, recipe, rows

# ---- seeds


def norm(model: Any) -> float:
    return float(model.network.weights.norm.float().norm())


@pytest.fixture
def chance(models: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe of a random method."""
    monkeypatch.setitem(registry.METHODS, "chance", Chance())  # type: ignore[arg-type]
    return {**recipe(models), "merge_method": "chance", "parameters": {"weight": 1, "normalize": False}, "seed": 5}


def test_a_candidate_is_scored_with_every_seed(chance: dict[str, Any], tmp_path: Path) -> None:
    """The seeds count up from that of the recipe; best.yml has the first of them."""
    result = arcmerge.sweep(chance, tmp_path / "out", function=norm, grid={"weight": [1, 2]}, seeds=3, device="cpu")
    found = {one.name: one for one in result.scored}
    for weight in (1, 2):
        scores = []
        for seed in (5, 6, 7):
            changed = {**chance, "seed": seed, "parameters": {"weight": weight, "normalize": False}}
            scores.append(norm(arcmerge.Gemma2.from_merge(changed, device="cpu")))
        assert len(set(scores)) == 3
        one = found[f"weight={weight}"]
        assert list(one.by_seed) == scores
        assert (one.score, one.deviation) == (fmean(scores), pytest.approx(stdev(scores)))
    assert result.best == found["weight=2"]
    assert f"weight=2, {result.best.score:.6g} (standard deviation {result.best.deviation:.2g})" in str(result)
    row = rows(tmp_path / "out")[1]
    assert list(row) == ["candidate", "weight", "score", "deviation", "seed 5", "seed 6", "seed 7", "seconds"]
    assert float(row["seed 6"]) == found["weight=2"].by_seed[1]
    best = yaml.safe_load((tmp_path / "out" / "best.yml").read_text())
    assert (best["seed"], best["parameters"]["weight"]) == (5, 2)
    with pytest.raises(arcmerge.ArcmergeError, match="got one with another seeds"):
        arcmerge.sweep(chance, tmp_path / "out", function=norm, grid={"weight": [1, 2]}, device="cpu")


@pytest.mark.parametrize(
    ("seeds", "sentence"),
    [
        (3, "'seeds' must be given for a random method alone, got 'slerp', which gives the same result for every seed"),
        (1, "'seeds' must be a number of seeds from 2 up, got 1; leave it out for one"),
        (2.5, "'seeds' must be a number of seeds from 2 up, got 2.5"),
    ],
)
def test_seeds_that_are_refused(models: Path, tmp_path: Path, seeds: Any, sentence: str) -> None:
    with pytest.raises(arcmerge.ArcmergeError, match=sentence):
        arcmerge.sweep(recipe(models), tmp_path / "out", function=norm, seeds=seeds, device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_model_in_memory_takes_a_seed(chance: dict[str, Any], models: Path) -> None:
    model = arcmerge.Gemma2.from_merge(chance, device="cpu")
    assert model.set_parameters(seed=6)
    assert yaml.safe_load(model.recipe)["seed"] == 6
    assert model.set_parameters(seed=6) == 0
    with pytest.raises(arcmerge.ArcmergeError, match="'seed' must be a whole number"):
        model.set_parameters(seed=-1)
    with pytest.raises(arcmerge.ArcmergeError, match="'seed' must be set for a random method alone, got 'slerp'"):
        arcmerge.Gemma2.from_merge(recipe(models), device="cpu").set_parameters(seed=1)


# ---- several scores


class High(LeastT):
    """The same distance from t = 0.62, and from t = 1, higher is better: 0.62 to 1 is the front of both."""

    title, minimize, identity = "high", False, "high"

    def __call__(self, model: Any) -> float:
        return -abs(1 - float(yaml.safe_load(model.recipe)["parameters"]["t"]))


def test_the_front_is_what_nothing_beats() -> None:
    scoring = Scoring([LeastT(), High()])
    points = [(1, 5), (2, 7), (2, 6), (3, 7), (0.5, 1), (math.nan, 9), (1, 5), (4, math.nan)]
    scored = [Scored(str(n), {}, score=first, also=[second]) for n, (first, second) in enumerate(points)]
    assert [one.name for one in front_of(scored, scoring)] == ["0", "1", "4", "6"]
    assert front_of([], scoring) == []


def test_the_front_is_in_tables_and_plot(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = score_candidates(
        recipe(models), of_numbers([0, 0.3, 0.6, 0.8, 1]), LeastT(), out, also=[High()], device="cpu"
    )
    assert [one.name for one in result.front] == ["t=0.6", "t=0.8", "t=1"]
    assert result.best is not None
    assert result.best.name == "t=0.6"
    assert "Pareto front: 3 candidates, whose recipes are in results.json" in str(result)
    table = rows(out)
    assert list(table[0]) == ["candidate", "t", "score", "high", "front", "seconds"]
    assert [row["front"] for row in table] == ["false", "false", "true", "true", "true"]
    entries = json.loads((out / "results.json").read_text())
    assert ["recipe" in entry for entry in entries] == [entry["front"] for entry in entries]
    assert yaml.safe_load(entries[3]["recipe"])["parameters"]["t"] == 0.8
    assert entries[3]["high"] == pytest.approx(-0.2)
    assert (out / "front.png").stat().st_size > 5000
    with pytest.raises(arcmerge.ArcmergeError, match="got one with another also"):
        score_candidates(recipe(models), [], LeastT(), out, device="cpu")


@pytest.mark.parametrize("sampler", [None, "tpe"])
def test_a_search_of_a_front_goes_on_from_its_journal(models: Path, tmp_path: Path, sampler: str | None) -> None:
    out, optimize = tmp_path / "out", Optimize(24, {"t": (0.0, 2.0)}, sampler)
    with pytest.raises(KeyboardInterrupt):
        score_candidates(recipe(models), [], LeastT(fails_at=10), out, also=[High()], optimize=optimize, device="cpu")
    score = LeastT()
    result = score_candidates(recipe(models), [], score, out, also=[High()], optimize=optimize, device="cpu")
    assert score.calls == 14
    assert len({one.varied["t"] for one in result.scored}) == 24
    inside = [one for one in result.scored if 0.55 <= one.varied["t"] <= 1.05]
    assert len(inside) >= 9  # a quarter by chance
    assert all(0.5 <= one.varied["t"] <= 1.1 for one in result.front)


def test_generations_are_those_of_a_search_that_was_not_ended(models: Path) -> None:
    """The proposals after a resumption are bred from those before it."""
    config, optimize = load_recipe(recipe(models, [0, 1])), Optimize(40)
    search = Optimizer(config, [True, True], optimize, [])
    told = []
    for _ in range(30):
        asked = search.ask()
        values = list(asked.varied.values())
        told.append(Scored.of(asked, values[0], 1.0, also=[values[1]]))
        search.tell(told[-1])
    resumed = Optimizer(config, [True, True], optimize, told)
    later = [list(resumed.ask().varied.values()) for _ in range(10)]
    assert fmean(sum(values) for values in later) < 0.7 * fmean(one.score + one.also[0] for one in told[:10])


def test_a_search_of_several_scores_has_no_cma(models: Path) -> None:
    with pytest.raises(arcmerge.ArcmergeError, match="'sampler' must be nsga2 or tpe for several scores, got cma"):
        Optimizer(load_recipe(recipe(models)), [True, False], Optimize(5, sampler="cma"), [])


def test_the_command_with_other_scores(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe(models)))
    (tmp_path / "other.txt").write_text("tok3 tok4 tok5")
    (tmp_path / "text.txt").write_text("tok5 tok6 tok7 tok8")
    (tmp_path / "also_scores.py").write_text("def norm(model):\n    return model.network.weights.norm.float().norm()\n")
    also = ["--also", "text:other.txt", "--also", "minimize:also_scores:norm"]
    call = ["sweep", "recipe.yml", "--text", "text.txt", "--window", "4", "--device", "cpu", *also]
    assert main([*call, "--t", "0.5"]) == 0
    assert list(rows(tmp_path / "sweep-recipe")[0])[3:6] == ["text:other.txt", "minimize:also_scores:norm", "front"]
    assert "front.png" in capsys.readouterr().out
    for text in ("other.txt", "text:", "perplexity:a", "text:other.txt"):
        assert main([*call, "--also", text, "--out", "new"]) == 1
        assert "'also' must be text:FILE, tasks:FILE, function:MODULE:NAME or minimize:" in capsys.readouterr().err
    assert main([*call, "--also", "text:none.txt", "--out", "new"]) == 1
    assert "'text' must be files in UTF-8 that can be read" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_other_scores_have_the_window_and_their_text_as_a_name(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words")
    (score,) = read_also(f"text:{tmp_path}/a.txt", 7)
    assert (score.title, score.window) == (f"text:{tmp_path}/a.txt", 7)  # type: ignore[attr-defined]
