"""Races: the test that stops a candidate has its error rate, and a race finds what the whole sweep finds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import arcmerge
from arcmerge.merging.methods import registry
from arcmerge.sweeping.candidates import Candidate, of_numbers, read_values
from arcmerge.sweeping.journal import Scored
from arcmerge.sweeping.optimizer import Optimize
from arcmerge.sweeping.race import PRIOR, Rival, from_the_middle, order_of, rival_of
from arcmerge.sweeping.scores import MultipleChoice, Perplexity, Question
from arcmerge.sweeping.sweep import BEST, SweepResult, score_candidates
from sweeps import Chance, KnownLosses, LeastT, recipe, rows

TS = of_numbers(read_values("0:1:0.1", "t"))

# ---- the test


def evidence_by_densities(differences: Any, scored: Any, controls: Any) -> float:
    """log E from the densities themselves: given the total N mu, the differences have mean mu + controls b and the
    covariance s^2 (1 - 1/N); b and log s are flat, and mu is 0 or has the variance g s^2."""
    count, total = len(scored), len(controls)
    centred = (controls - controls.mean(axis=0))[scored]

    def density(variance: float) -> float:
        covariance = np.eye(count) - 1 / total + variance
        inverse = np.linalg.inv(covariance)
        information = centred.T @ inverse @ centred
        rest = differences - centred @ np.linalg.solve(information, centred.T @ inverse @ differences)
        square = rest @ inverse @ rest
        freedom = count - controls.shape[1]
        logs = np.linalg.slogdet(covariance)[1] + np.linalg.slogdet(information)[1]
        return float(-0.5 * logs - 0.5 * freedom * math.log(square))

    return density(PRIOR) - density(0.0)


@pytest.mark.parametrize("controls", [0, 1, 2])
@pytest.mark.parametrize("count", [8, 20, 39])
def test_the_evidence_is_the_ratio_of_two_densities(controls: int, count: int) -> None:
    generator = np.random.default_rng(count + controls)
    known, total = generator.normal(size=(40, controls)), 40
    scored = generator.permutation(total)[:count]
    differences = 0.3 + known[scored] @ np.arange(1, controls + 1) + generator.normal(size=count)
    base = generator.normal(size=total)
    predicted, evidence = Rival(base, known, 0.0).compare(base[scored] + differences, list(scored))
    assert evidence == pytest.approx(evidence_by_densities(differences, scored, known), rel=1e-9)
    if not controls:
        assert predicted == pytest.approx(total * differences.mean())


def is_stopped(differences: Any, order: Any, controls: Any, threshold: float) -> bool:
    """Whether a candidate is stopped at one of its looks."""
    rival = Rival(np.zeros(len(differences)), controls, threshold)
    for count in range(6, len(order)):
        predicted, evidence = rival.compare(differences[order[:count]], list(order[:count]))
        if evidence >= threshold:
            return predicted > 0
    return False


@pytest.mark.parametrize("kind", ["normal", "t3", "questions"])
def test_candidates_that_are_as_good_as_the_best_are_hardly_ever_stopped(kind: str) -> None:
    """Totals of 0, looks after every item: at most 5 % of the runs, up to the noise of 100 of them."""
    generator, stopped, runs, count = np.random.default_rng(3), 0, 100, 30
    for _ in range(runs):
        if kind == "questions":
            differences = np.repeat([-1.0, 0.0, 1.0], [count // 5, count - 2 * (count // 5), count // 5])
        else:
            differences = generator.standard_t(3, count) if kind == "t3" else generator.normal(size=count)
        differences -= differences.mean()
        controls = generator.normal(size=(count, 1))
        stopped += is_stopped(differences, generator.permutation(count), controls, math.log(1 / (2 * 0.05)))
    assert stopped <= runs * 0.05 + 2 * math.sqrt(runs * 0.05)


def test_a_candidate_that_is_worse_is_stopped_and_sooner_with_controls() -> None:
    generator, looks = np.random.default_rng(4), []
    known = generator.normal(size=(100, 1))
    differences = 0.5 + 2 * known[:, 0] + 0.2 * generator.normal(size=100)
    order = list(generator.permutation(100))
    for controls in (known, known[:, :0]):
        rival = Rival(np.zeros(100), controls, math.log(100))
        evidence = [rival.compare(differences[order[:count]], order[:count])[1] for count in range(100)]
        looks.append(next(count for count, one in enumerate(evidence) if one >= rival.threshold))
    assert 10 <= looks[0] <= 12  # not before a tenth of the items
    assert looks[1] > 30
    assert not is_stopped(-np.abs(differences), order, known, math.log(100))


def test_nothing_is_said_of_no_numbers_and_no_differences() -> None:
    rival = Rival(np.arange(40.0), np.zeros((40, 0)), 1.0)
    assert rival.compare(np.full(20, np.nan), list(range(20))) == (0.0, -np.inf)
    assert rival.compare(np.arange(20.0), list(range(20))) == (0.0, -np.inf)
    assert rival.compare(np.arange(3.0) + 1, [0, 1, 2])[1] == -np.inf
    predicted, evidence = rival.compare(np.arange(20.0) + 1, list(range(20)))  # no noise at all
    assert predicted == pytest.approx(40)
    assert evidence > 50


def test_a_rival_is_the_best_of_the_complete_candidates() -> None:
    scored = [
        Scored("stopped", {}, score=0.5, stopped=True),
        Scored("nan", {}, score=math.nan, losses=[math.nan, 1, 2]),
        Scored("one", {}, score=2.0, losses=[2, 2, 2]),
    ]
    assert rival_of(scored, True, 5) is None
    scored.append(Scored("two", {}, score=1.0, losses=[1, 0, 2]))
    found = rival_of(scored, True, 5)
    assert found is not None
    assert found.losses.tolist() == [1, 0, 2]
    assert found.controls.shape == (3, 1)
    assert found.threshold == pytest.approx(math.log(50))


def test_the_middle_is_scored_first() -> None:
    grid = [Candidate(f"{a} {b}", {}, {"a": a, "b": b}) for a in (0, 1, 2) for b in (10, 20, 30)]
    assert [one.name for one in from_the_middle(grid)] == [
        *("1 20", "0 20", "1 10", "1 30", "2 20", "0 10", "0 30", "2 10", "2 30"),
    ]
    assert from_the_middle([Candidate("v", {"t": [0, 1]})])[0].name == "v"


def test_the_order_is_that_of_its_seed() -> None:
    assert sorted(order_of(20, 1)) == list(range(20))
    assert order_of(20, 1) == order_of(20, 1) != order_of(20, 2)
    with pytest.raises(arcmerge.ArcmergeError, match="'race' must have 12 windows or questions at least, got 11; give"):
        order_of(11, 1)


# ---- the sweep


def race(models: Path, out: Path, score: Any, order: int | None = 0, **options: Any) -> SweepResult:
    return score_candidates(recipe(models), TS, score, out, race=order, device="cpu", **options)


def test_a_race_finds_the_same_with_less(models: Path, tmp_path: Path) -> None:
    whole, score = KnownLosses(), KnownLosses()
    expected = race(models, tmp_path / "whole", whole, None)
    result = race(models, tmp_path / "race", score)
    assert result.best is not None
    assert expected.best is not None
    assert (result.best.name, result.best.score) == ("t=0.6", pytest.approx(expected.best.score, rel=1e-12))
    assert not result.best.stopped
    assert score.scored < 0.5 * whole.scored
    exact = {one.name: one.score for one in expected.scored}
    for one in result.scored:
        assert one.score == pytest.approx(exact[one.name], abs=0.1), one.name
        assert one.stopped == (one.amount < 600)
    table = rows(tmp_path / "race")
    assert list(table[0]) == ["candidate", "t", "score", "tokens", "stopped", "seconds"]
    assert sum(int(row["tokens"]) for row in table) == 10 * score.scored
    assert [row["stopped"] for row in table][:2] == ["false", "false"]
    assert "losses" not in json.loads((tmp_path / "race" / "results.json").read_text())[0]
    assert yaml.safe_load((tmp_path / "race" / BEST).read_text())["parameters"]["t"] == 0.6
    stopped = sum(one.stopped for one in result.scored)
    assert f"stopped early: {stopped} of 11 candidates" in str(result)
    with pytest.raises(arcmerge.ArcmergeError, match="'race' must have 12 windows or questions at least, got 5"):
        race(models, tmp_path / "few", KnownLosses(count=5))


def test_a_race_that_was_ended_goes_on(models: Path, tmp_path: Path) -> None:
    expected = race(models, tmp_path / "once", KnownLosses())
    with pytest.raises(KeyboardInterrupt):
        race(models, tmp_path / "twice", KnownLosses(fails_at=6))
    result = race(models, tmp_path / "twice", KnownLosses())
    assert [(one.name, one.score, one.amount, one.losses) for one in result.scored] == [
        (one.name, one.score, one.amount, one.losses) for one in expected.scored
    ]
    for order in (None, 1):
        with pytest.raises(arcmerge.ArcmergeError, match="the journal of this sweep, got one with another race"):
            race(models, tmp_path / "twice", KnownLosses(), order)


def test_an_optimizer_learns_the_estimates(models: Path, tmp_path: Path) -> None:
    result = race(models, tmp_path / "out", KnownLosses(), optimize=Optimize(12))
    proposed = [one for one in result.scored if one.proposed]
    assert len(proposed) == 12
    assert any(one.stopped for one in proposed)
    assert result.best is not None
    assert abs(float(result.best.parameters["t"]) - 0.62) < 0.05


def test_a_race_with_seeds_compares_their_means(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.METHODS, "chance", Chance())  # type: ignore[arg-type]
    config = {**recipe(models), "merge_method": "chance", "parameters": {"weight": 1}, "seed": 7}
    weights = [Candidate(f"weight={t}", {"weight": t}, {"weight": t}) for t in (0.4, 0.6, 0.8, 1.0, 2.0)]
    score = KnownLosses(block=100)
    result = score_candidates(config, weights, score, tmp_path / "out", race=0, seeds=3, device="cpu")
    assert result.best is not None
    assert result.best.name == "weight=0.6"
    assert result.best.amount == 3 * 600
    assert result.best.by_seed == pytest.approx([result.best.score + 0.01 * n for n in (-1, 0, 1)])
    assert result.best.deviation == pytest.approx(0.01)
    last = rows(tmp_path / "out")[-1]
    assert (last["candidate"], last["stopped"], last["seed 8"], last["deviation"]) == (
        "weight=2.0",
        "true",
        "nan",
        "nan",
    )
    assert int(last["tokens"]) == 300


@pytest.mark.parametrize("kind", ["text", "tasks"])
def test_a_race_of_texts_and_questions(models: Path, tmp_path: Path, kind: str) -> None:
    """A complete candidate has the score that it has without a race, up to the rounding of other batches."""
    words = [f"tok{number % 30 + 1}" for number in range(40)]
    questions = [Question(words[n], (f" {words[n + 6]}", f" {words[n + 9]}"), n % 2) for n in range(20)]
    texts = Perplexity([" ".join(words), " ".join(words[20:])], 20)
    score: Any = MultipleChoice(questions) if kind == "tasks" else texts
    options: dict[str, Any] = {"device": "cpu"}
    expected = score_candidates(recipe(models), TS[4:7], score, tmp_path / "whole", **options)
    result = score_candidates(recipe(models), TS[4:7], score, tmp_path / "race", race=0, **options)
    exact = {one.name: one.score for one in expected.scored}
    complete = [one for one in result.scored if not one.stopped]
    assert len(complete) >= 2
    assert len({one.amount for one in complete}) == 1
    for one in complete:
        assert one.score == pytest.approx(exact[one.name], rel=1e-5)
    assert {"tasks": "questions", "text": "tokens"}[kind] in rows(tmp_path / "race")[0]


def test_what_cannot_race(models: Path, tmp_path: Path) -> None:
    with pytest.raises(arcmerge.ArcmergeError, match="'race' must be given with text or tasks, got 'distance'"):
        race(models, tmp_path / "out", LeastT())
    with pytest.raises(arcmerge.ArcmergeError, match="'race' must be given with one score alone, got several"):
        race(models, tmp_path / "out", KnownLosses(), also=[LeastT()])
    with pytest.raises(arcmerge.ArcmergeError, match=r"'race_seed' must be a whole number from 0 to 2\^63 - 1, got -1"):
        arcmerge.sweep(recipe(models), tmp_path / "out", function="math:cos", race=True, race_seed=-1)
