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
from arcmerge.gemma2.model import Gemma2
from arcmerge.merging.methods import registry
from arcmerge.sweeping.candidates import Candidate, of_numbers, read_values
from arcmerge.sweeping.evaluators import EvaluationSpec, LocalEvaluator
from arcmerge.sweeping.journal import Scored
from arcmerge.sweeping.optimizer import Optimize
from arcmerge.sweeping.race import Race, from_the_middle, order_of
from arcmerge.sweeping.results import best_of
from arcmerge.sweeping.rival import PRIOR, Rival, controls_of, threshold_of
from arcmerge.sweeping.scores import Item, MeanScore, MultipleChoice, Perplexity, Question, Scoring
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
    scored = np.arange(count)
    differences = 0.3 + known[scored] @ np.arange(1, controls + 1) + generator.normal(size=count)
    base = generator.normal(size=total)
    predicted, evidence = Rival(base, known, 0.0, 0).compare(base[scored] + differences)
    assert evidence == pytest.approx(evidence_by_densities(differences, scored, known), rel=1e-9)
    if not controls:
        assert predicted == pytest.approx(total * differences.mean())


def is_stopped(differences: Any, order: Any, controls: Any, threshold: float) -> bool:
    """Whether a candidate is stopped at one of its looks."""
    rival, ordered = Rival(np.zeros(len(differences)), controls[order], threshold, 0), differences[order]
    for count in range(6, len(order)):
        predicted, evidence = rival.compare(ordered[:count])
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
        rival, ordered = Rival(np.zeros(100), controls[order], math.log(100), 0), differences[order]
        evidence = [rival.compare(ordered[:count])[1] for count in range(100)]
        looks.append(next(count for count, one in enumerate(evidence) if one >= rival.threshold))
    assert 10 <= looks[0] <= 12  # not before a tenth of the items
    assert looks[1] > 30
    assert not is_stopped(-np.abs(differences), order, known, math.log(100))


def test_nothing_is_said_of_no_numbers_and_no_differences() -> None:
    rival = Rival(np.arange(40.0), np.zeros((40, 0)), 1.0, 0)
    assert rival.compare(np.full(20, np.nan)) == (np.inf, -np.inf)
    assert rival.compare(np.arange(20.0)) == (0.0, -np.inf)
    assert rival.compare(np.arange(3.0) + 1)[1] == -np.inf
    predicted, evidence = rival.compare(np.arange(20.0) + 1)  # no noise at all
    assert predicted == pytest.approx(40)
    assert evidence > 50
    assert rival.stops(np.arange(20.0) + 1)
    assert not rival.stops(np.arange(20.0) - 1)
    partly = Rival(np.arange(10.0), np.zeros((40, 0)), 1.0, 0)  # scored on ten items itself
    assert partly.compare(np.arange(20.0) + 1) == rival.compare(np.arange(10.0) + 1)


def test_controls_are_what_sets_other_candidates_apart() -> None:
    losses, other = np.array([1.0, 0, 2]), np.array([2.0, 2, 2])
    assert controls_of(losses, []).shape == (3, 0)
    assert controls_of(losses, [losses, losses]).shape == (3, 0)
    (control,) = controls_of(losses, [other]).T
    assert np.abs(control) == pytest.approx(np.abs(np.array([0.0, 1, -1])) * math.sqrt(3 / 2))
    assert threshold_of(5) == pytest.approx(math.log(50))


# ---- the order


class Losses(MeanScore):
    """Losses that are given, (candidates, items); counts the merges of the model, which this is too."""

    title, minimize, identity, unit, block = "mean loss", True, "losses", "tokens", 1

    def __init__(self, losses: Any) -> None:
        self.known, self.merges, self.candidate = losses, 0, -1

    def set_parameters(self, candidate: int) -> None:
        self.merges, self.candidate = self.merges + 1, candidate

    def items(self, model: Any) -> list[Item]:
        return [Item(1, (), index) for index in range(self.known.shape[1])]

    def losses(self, model: Any, items: Any) -> list[float]:
        return [float(self.known[self.candidate, item.answer]) for item in items]

    def of_mean(self, loss: float) -> float:
        return loss


def raced(losses: Any, order: int, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Scored], Losses]:
    """What becomes of candidates with these losses at equal distances of t."""
    score = Losses(losses)
    monkeypatch.setattr(Gemma2, "from_merge", lambda *arguments: score)
    evaluator = LocalEvaluator(EvaluationSpec("", Scoring([score], (), order), "cpu", "default"))
    candidates = [Candidate(str(index), {"candidate": index}, {"t": index}) for index in range(len(losses))]
    run = Race(candidates, iter(()), [], score, len(losses), 0)
    done = [one for scored in evaluator.evaluate(run.next) for one in run.add(scored) if not one.begun]
    assert sorted(int(one.name) for one in done) == list(range(len(losses)))
    return done, score


def curve(count: int, best: float, slope: float, items: int = 100, seed: int = 0) -> Any:
    """Losses over t in 0..1: (t - best)^2, what makes an item easier at one end, its curvature, and noise."""
    generator = np.random.default_rng(seed)
    away = np.linspace(0, 1, count)[:, None] - best
    sides, bends, own = (generator.normal(size=size) for size in (items, items, (count, items)))
    noise = slope * (sides * away + bends * away**2) + 0.02 * own
    return 5 + generator.normal(size=items) + away**2 + noise - noise.mean(axis=1, keepdims=True)


@pytest.mark.parametrize("best", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("count", [5, 9, 11])
def test_the_best_wins_in_two_fifths_of_the_work_wherever_it_is(
    count: int, best: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    winner, shares = round(best * (count - 1)), []
    losses = curve(count, winner / (count - 1), 0.15)
    for order in range(10):
        done, score = raced(losses, order, monkeypatch)
        found = min(done, key=lambda one: one.score)
        assert (found.name, found.stopped) == (str(winner), False)
        shares.append(sum(one.amount for one in done) / losses.size)
        assert score.merges <= 2 * count
    assert np.mean(shares) <= 0.4


def test_a_race_takes_no_more_than_two_complete_candidates_if_items_differ_much(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Then a candidate can be stopped with controls alone, which need two candidates."""
    losses = curve(11, 0.5, 1.0)
    for order in range(10):
        done, _ = raced(losses, order, monkeypatch)
        assert min(done, key=lambda one: one.score).name == "5"
        assert sum(one.amount for one in done) <= 0.6 * losses.size


def test_candidates_that_cannot_be_told_apart_are_scored_on_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """The best one, by a hair, is lost in 5 % of the races at most, up to the noise of 60 of them."""
    generator, lost, work, runs = np.random.default_rng(6), 0, 0.0, 60
    for order in range(runs):
        losses = curve(5, 0.5, 1.0, 40, order)
        losses -= losses.mean(axis=1, keepdims=True)
        winner = generator.integers(5)
        losses[winner] -= 1e-6
        done, _ = raced(losses, order, monkeypatch)
        lost += done[[one.name for one in done].index(str(winner))].stopped
        work += sum(one.amount for one in done) / losses.size / runs
    assert lost <= runs * 0.05 + 2 * math.sqrt(runs * 0.05)
    assert work > 0.9


def test_a_candidate_without_a_number_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = curve(5, 0.5, 0.15)
    losses[2] = np.nan
    done, _ = raced(losses, 0, monkeypatch)
    best = best_of(done, True)
    assert best is not None
    assert best.name in "13"
    last = [one for one in done if not one.stopped][-1]
    assert (last.name, last.amount) == ("2", 100)
    assert math.isnan(last.score)


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
    assert [row["stopped"] for row in table].count("false") == 2
    assert "losses" not in json.loads((tmp_path / "race" / "results.json").read_text())[0]
    assert yaml.safe_load((tmp_path / "race" / BEST).read_text())["parameters"]["t"] == 0.6
    stopped = sum(one.stopped for one in result.scored)
    assert f"stopped early: {stopped} of 11 candidates" in str(result)
    with pytest.raises(arcmerge.ArcmergeError, match="'race' must have 12 windows or questions at least, got 5"):
        race(models, tmp_path / "few", KnownLosses(count=5))


@pytest.mark.parametrize("fails_at", [6, 11, 13])
def test_a_race_that_was_ended_goes_on(models: Path, tmp_path: Path, fails_at: int) -> None:
    """In the first looks, before a candidate is complete, and after that. What one candidate was scored on is lost."""
    once, first, second = KnownLosses(), KnownLosses(fails_at=fails_at), KnownLosses()
    expected = race(models, tmp_path / "once", once)
    with pytest.raises(KeyboardInterrupt):
        race(models, tmp_path / "twice", first)
    if fails_at < 13:
        assert not (tmp_path / "twice" / BEST).exists()
    result = race(models, tmp_path / "twice", second)
    assert once.scored <= first.scored + second.scored < once.scored + 60
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


@pytest.mark.parametrize("fails_at", [21, 22, 23, 24])
def test_a_proposal_that_was_begun_goes_on(models: Path, tmp_path: Path, fails_at: int) -> None:
    """Wherever a race is ended, it makes as many proposals as it would have made, and begins none of them again."""
    settings: dict[str, Any] = {"race": 0, "device": "cpu", "optimize": Optimize(4)}
    first, second = KnownLosses(fails_at=fails_at), KnownLosses()
    with pytest.raises(KeyboardInterrupt):
        score_candidates(recipe(models), TS[4:8], first, tmp_path / "out", **settings)
    result = score_candidates(recipe(models), TS[4:8], second, tmp_path / "out", **settings)
    assert sorted(one.name for one in result.scored if one.proposed) == [f"trial {index}" for index in range(1, 5)]
    assert len(result.scored) == 8
    assert sum(one.amount for one in result.scored) <= 10 * (first.scored + second.scored)


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
    (last,) = [row for row in rows(tmp_path / "out") if row["candidate"] == "weight=2.0"]
    assert (last["stopped"], last["seed 8"], last["deviation"]) == ("true", "nan", "nan")
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
