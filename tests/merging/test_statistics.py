"""The statistics pass and its cache: measures one after another, of tensors apart and together, each taken once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import tiny
from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution.cpu.native import measured
from arcmerge.merging.execution.processor import FillTask, Request
from arcmerge.merging.execution.statistics_cache import StatisticsCache
from arcmerge.merging.execution.statistics_pass import StatisticsPass, added_up, measure_all
from arcmerge.merging.execution.work_units import Piece
from arcmerge.merging.methods.measure import (
    NO_CUT,
    Counts,
    Divergences,
    Gram,
    Histogram,
    Measure,
    Norms,
    Selection,
    Statistic,
)
from arcmerge.merging.methods.method import Method
from arcmerge.merging.methods.rule import Coefficients
from arcmerge.merging.options import Options
from arcmerge.merging.plan.tensor_job import Job
from arcmerge.merging.prepare import Prepared, prepare
from operands import BF16, operand

SELECTION = Selection((NO_CUT,), (0,), ((1.0, 1.0),), rounded=True)


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    for name in ("gemma-a", "gemma-b"):
        tiny.make(name, tmp_path)
    listed = [{"model": str(tmp_path / name)} for name in ("gemma-a", "gemma-b")]
    recipe = {"merge_method": "slerp", "models": listed, "base_model": listed[0]["model"], "parameters": {"t": 0.3}}
    return prepare(recipe, Options(device="cpu", threads=1), lambda sentence: None)


class Counting:
    """A processor whose shares say which elements they are of, and that notes what is asked of it."""

    def __init__(self, total: Any = None) -> None:
        self.asked: list[tuple[int, int, int, Measure]] = []
        self._value = total

    def measure(self, requests: Sequence[Request]) -> list[NDArray[Any]]:
        self.asked += [(piece.job, piece.first, piece.count, measure) for piece, measure in requests]
        return [self._share(piece, measure) for piece, measure in requests]

    def _share(self, piece: Piece, measure: Measure) -> NDArray[Any]:
        if isinstance(measure, Histogram):
            counts = np.zeros((1, 2, 32768), np.int64)
            counts[0, 1, 5] = piece.count
            counts[0, 1, 0x7F80] = self._value or 0
            return counts
        if isinstance(measure, Divergences):
            return np.full(3, float(piece.first), np.float32)
        return np.full((2, 2), 1.0 if self._value is None else self._value)

    def fill(self, tasks: Sequence[FillTask]) -> list[int]:
        raise AssertionError

    def not_finite(self, job: int) -> ArcmergeError:
        return ArcmergeError(f"'job' must be finite, got {job}")


class Steps(Method):
    """Takes these measures; its rule is how much the last has found."""

    def __init__(self, *measures: Measure) -> None:
        self.measures = measures

    def measure(self, found: Sequence[Statistic], arguments: Any) -> Measure | None:
        assert [one.measure for one in found] == list(self.measures[: len(found)])
        return self.measures[len(found)] if len(found) < len(self.measures) else None

    def rule(self, found: Sequence[Statistic], arguments: Any) -> Coefficients:
        total = found[-1].total
        return Coefficients(np.array([float(total.dense().sum() if isinstance(total, Counts) else total.sum())]), "x")


def jobs_of(prepared: Prepared, *methods: Method) -> list[Job]:
    return [replace(job, method=method) for job, method in zip(prepared.plan.jobs, methods, strict=False)]


def run(work: StatisticsPass, jobs: Sequence[Job], threads: int = 1) -> list[float]:
    measure_all(work, jobs, threads, lambda done, total: None)
    return [float(rule.values[0]) for _, rule in sorted(work.rules.items()) if isinstance(rule, Coefficients)]


@pytest.mark.parametrize("threads", [1, 4])
def test_measures_are_taken_one_after_another(prepared: Prepared, threads: int) -> None:
    second = Histogram(SELECTION, ((5, 0),))
    processor, jobs = Counting(), jobs_of(prepared, Steps(Gram(), second), Steps(Gram()))
    work = StatisticsPass(jobs, processor, range(2), allow_nonfinite=False)
    assert not work.ready(0)
    assert run(work, jobs, threads) == [jobs[0].count, 4]
    assert [measure for job, _, _, measure in processor.asked if job == 0] == [Gram(), second]
    assert work.ready(0)
    assert sorted(work.grams) == [0, 1]


@pytest.mark.parametrize("threads", [1, 4])
def test_tensors_that_are_measured_together_wait_for_each_other(prepared: Prepared, threads: int) -> None:
    one, two = (Histogram(SELECTION, together=key) for key in ("one", "two"))
    alone, then = Histogram(SELECTION), Histogram(SELECTION, ((5, 0),), "one")
    methods = [Steps(one), Steps(two), Steps(one, then), Steps(alone), Steps(two), Steps(one, then)]
    processor, jobs = Counting(), jobs_of(prepared, *methods)
    work = StatisticsPass(jobs, processor, range(6), allow_nonfinite=False)
    counts = [job.count for job in jobs]
    found = run(work, jobs, threads)
    assert found[0] == counts[0] + counts[2] + counts[5]
    assert found[1] == found[4] == counts[1] + counts[4]
    assert found[2] == found[5] == counts[2] + counts[5]
    assert found[3] == counts[3]
    # No second measure starts before the first of all tensors has ended.
    seconds = [place for place, (*_, measure) in enumerate(processor.asked) if measure == then]
    assert min(seconds) == len(methods)


def test_counts_of_the_pieces_are_kept_where_their_order_matters(prepared: Prepared) -> None:
    (job,) = jobs_of(prepared, Steps(Histogram(SELECTION)))
    pieces = [Piece(0, 300, job.count - 300), Piece(0, 0, 100), Piece(0, 100, 200)]  # as files are filled, from the end
    found: list[Statistic] = []

    class Known:
        def get(self, job: Job, measure: Measure) -> None:
            return None

        def add(self, job: Job, statistic: Statistic) -> None:
            found.append(statistic)

    work = StatisticsPass([job], Counting(), range(1), False, pieces={0: pieces}, known=Known())
    run(work, [job])
    (statistic,) = found
    assert {first: counts.at(0, 1, 5) for first, counts in statistic.pieces.items()} == {
        0: 100,
        100: 200,
        300: job.count - 300,
    }
    assert statistic.total.at(0, 1, 5) == job.count


def test_rows_are_concatenated_in_their_order(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arcmerge.merging.execution.work_units.PIECE_ELEMENTS", 320)
    (job,) = jobs_of(prepared, Steps(Divergences()))
    work = StatisticsPass([job], processor := Counting(), range(1), allow_nonfinite=False)
    firsts = [first for batch in work.batches for first in (piece.first for piece in batch)]
    assert all(first % job.row == 0 for first in firsts)
    work.batches.reverse()
    totals = run(work, [job])
    assert totals == [3 * sum(first for _, first, _, _ in processor.asked)]


@pytest.mark.parametrize("measure", [Gram(), Histogram(SELECTION)], ids=["gram", "histogram"])
def test_what_is_not_finite_is_an_error_unless_allowed(prepared: Prepared, measure: Measure) -> None:
    bad = np.nan if isinstance(measure, Gram) else 1
    (job,) = jobs_of(prepared, Steps(measure))
    with pytest.raises(ArcmergeError, match="'job' must be finite, got 0"):
        run(StatisticsPass([job], Counting(bad), range(1), allow_nonfinite=False), [job])
    assert len(run(StatisticsPass([job], Counting(bad), range(1), allow_nonfinite=True), [job])) == 1


def test_an_error_of_the_rule_names_the_tensor(prepared: Prepared) -> None:
    class Failing(Steps):
        def rule(self, found: Sequence[Statistic], arguments: Any) -> Coefficients:
            raise ArcmergeError("'x' must work, got nothing")

    (job,) = jobs_of(prepared, Failing(Gram()))
    with pytest.raises(ArcmergeError, match=rf"^{job.output.name}: 'x' must work, got nothing$"):
        run(StatisticsPass([job], Counting(), range(1), allow_nonfinite=False), [job])


def test_sums_are_those_of_the_same_key_and_shape() -> None:
    def statistic(key: str, *shape: int) -> Statistic:
        return Statistic(Histogram(SELECTION, together=key), Counts.of(np.ones(shape, np.int64)))

    found = added_up({1: statistic("a", 2, 3), 2: statistic("b", 2, 3), 3: statistic("a", 4), 4: statistic("a", 2, 3)})
    assert {key: int(one.total.dense().sum()) for key, one in found.items()} == {1: 12, 2: 6, 3: 4, 4: 12}


def test_counts_keep_what_is_not_zero() -> None:
    dense = np.zeros((2, 3, 4), np.int64)
    dense[1, 0, 2], dense[1, 2, 3], dense[0, 0, 0] = 7, 5, 1
    counts = Counts.of(dense)
    assert len(counts.values) == 3
    np.testing.assert_array_equal(counts.dense(), dense)
    places, values = counts.line(1, 2)
    np.testing.assert_array_equal(places, dense[1, 2].nonzero()[0])
    np.testing.assert_array_equal(values, dense[1, 2][places])
    np.testing.assert_array_equal((counts + counts).dense(), 2 * dense)
    assert (counts.at(1, 0, 2), counts.at(1, 2, 3), counts.at(0, 1, 0)) == (7, 5, 0)


# ---- the cache


def cache_of(prepared: Prepared) -> StatisticsCache:
    checkpoints = {item.checkpoint.folder: item.checkpoint for job in prepared.plan.jobs for item in job.inputs}
    return StatisticsCache(list(checkpoints.values()), next(iter(checkpoints)))


def total_of(statistic: Statistic | None) -> Any:
    return None if statistic is None else statistic.total


def histogram(key: int = 0, probability: float = 1.0, **changes: Any) -> Histogram:
    selection = Selection((NO_CUT,), (key,), ((probability, probability),), rounded=changes.pop("rounded", True))
    return Histogram(selection, **changes)


def test_histograms_are_known_for_other_cuts_but_not_for_other_masks(prepared: Prepared) -> None:
    cache, (job, other, *_) = cache_of(prepared), prepared.plan.jobs
    one = Statistic(histogram(key=1, probability=0.5), Counts.of(np.ones((1, 2, 4), np.int64)))
    cache.add(job, one)
    cut = replace(one.measure.selection, cuts=((9, 0, 3, 1),))  # type: ignore[union-attr]
    assert total_of(cache.get(job, Histogram(cut))) is one.total
    assert cache.get(other, one.measure) is None
    for measure in (
        histogram(key=2, probability=0.5),
        histogram(key=1, probability=0.25),
        histogram(),
        histogram(key=1, probability=0.5, rounded=False),
        histogram(key=1, probability=0.5, prefixes=((1, 2),)),
    ):
        assert cache.get(job, measure) is None


def test_histograms_without_masks_are_known_for_any_key(prepared: Prepared) -> None:
    cache, job = cache_of(prepared), prepared.plan.jobs[0]
    one = Statistic(histogram(key=1), Counts.of(np.ones((1, 2, 4), np.int64)))
    cache.add(job, one)
    assert total_of(cache.get(job, histogram(key=5))) is one.total
    assert cache.get(job, histogram(together="x")) is None
    together = Statistic(histogram(together="x"), one.total)
    cache.add(job, together)
    # The key says which tensors are added up, not what is counted of each.
    known = cache.get(job, histogram(together="y"))
    assert total_of(known) is together.total
    assert known is not None
    assert known.measure.together == "y"


def test_norms_are_known_for_every_mask(prepared: Prepared) -> None:
    cache, (job, other, *_) = cache_of(prepared), prepared.plan.jobs
    masks = [(1, 0.5), (1, 0.25), (2, 0.5)]
    measures = [Norms(histogram(key=key, probability=probability).selection) for key, probability in masks]
    totals = [np.array([[2.0, 1.0 / number, 0.0]]) for number in (1, 2, 3)]
    for measure, total in zip(measures, totals, strict=True):
        cache.add(job, Statistic(measure, total))
    for measure, total in zip(measures, totals, strict=True):
        assert total_of(cache.get(job, measure)) is total
        assert cache.get(other, measure) is None
    assert cache.get(job, Norms(histogram(key=3, probability=0.5).selection)) is None


def test_prefixes_are_known_for_themselves_alone(prepared: Prepared) -> None:
    cache, job = cache_of(prepared), prepared.plan.jobs[0]
    one = Statistic(histogram(prefixes=((1, 2),)), Counts.of(np.ones((1, 2, 4), np.int64)))
    cache.add(job, one)
    assert total_of(cache.get(job, histogram(prefixes=((1, 2),)))) is one.total
    assert cache.get(job, histogram(prefixes=((1, 3),))) is None
    assert cache.get(job, histogram()) is None


def test_gram_matrices_alone_are_saved(prepared: Prepared) -> None:
    cache, job = cache_of(prepared), prepared.plan.jobs[0]
    gram = Statistic(Gram(), np.array([[1.5, 0.25], [0.25, 2.0]]))
    cache.add(job, gram)
    cache.add(job, Statistic(histogram(), Counts.of(np.ones((1, 2, 4), np.int64))))
    cache.add(prepared.plan.jobs[1], Statistic(Gram(), np.full((2, 2), np.nan)))
    cache.add(prepared.plan.jobs[2], Statistic(Gram(dim=1), np.ones((3, 2, 2))))
    cache.save()
    (file,) = prepared.plan.jobs[0].inputs[0].checkpoint.folder.glob(".arcmerge-grams-*.json")
    assert len(json.loads(file.read_bytes())["grams"]) == 1
    again = cache_of(prepared)
    known = again.get(job, Gram())
    assert known is not None
    np.testing.assert_array_equal(known.total, gram.total)
    assert again.get(job, histogram()) is None
    assert again.get(job, Gram(centered=True)) is None
    assert again.get(job, Divergences()) is None


def test_a_histogram_after_an_interrupted_one_starts_from_zero(monkeypatch):
    values, base = torch.ones(1000, dtype=BF16), torch.zeros(1000, dtype=BF16)
    measure = Histogram(Selection((NO_CUT,), (0,), ((1.0, 1.0),), rounded=True))

    def ones() -> int:
        counts = measured(measure, [operand(base), operand(values)], 0, 1000, 0, 1000)
        return counts.at(0, 1, 0x3F80)

    assert ones() == 1000
    with monkeypatch.context() as patch:
        patch.setattr(Counts, "of", lambda dense: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            ones()
    assert ones() == 1000
