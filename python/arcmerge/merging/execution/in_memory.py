"""A merge in memory: the parents stay, and other parameters cost one pass over the tensors that they change."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from arcmerge.checkpoint.layout import OutputTensor
from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution.gram_cache import GramCache
from arcmerge.merging.execution.gram_pass import Filling, Processor, coefficients_of, needs_gram, sum_grams
from arcmerge.merging.execution.memory import Tick, places, residence_of
from arcmerge.merging.execution.work_units import GRAM_ELEMENTS, Piece
from arcmerge.merging.execution.workers import Workers
from arcmerge.merging.methods import registry
from arcmerge.merging.methods.method import Coefficients
from arcmerge.merging.plan.tensor_job import Job
from arcmerge.merging.prepare import Prepared
from arcmerge.merging.recipe.recipe import Recipe, with_parameters

if TYPE_CHECKING:
    import torch

# A t between the ends, for which every tensor has a Gram matrix.
_BETWEEN = 0.5


class InMemoryMerge:
    """The result of a merge, in memory at addresses that stay, and made again where parameters change.

    tick: told now and then of the bytes that are done, and of all: of reading, of measuring and of merging.
    Raises ArcmergeError where memory is too small or weights are not finite.
    """

    def __init__(self, prepared: Prepared, tick: Tick = lambda done, total: None) -> None:
        self._configured = prepared.recipe
        self._prepared = prepared
        self._outputs = {job.output.name: job.output for job in prepared.plan.jobs}
        self._offsets, end = places({name: output.nbytes for name, output in self._outputs.items()})
        # At t = 0 or 1 a tensor is a copy, which needs neither the other model nor a matrix; the next t may need them.
        has_t = any(parameter.name == "t" for parameter in prepared.plan.method.parameters)
        between = prepared.with_recipe(with_parameters(prepared.recipe, {"t": _BETWEEN})) if has_t else prepared
        self._residence = residence_of([between, prepared], end, tick)
        self._made: dict[str, object] = {}
        checkpoints = prepared.checkpoints
        self._grams = GramCache(checkpoints.values(), checkpoints[prepared.plan.donor].folder)
        if has_t:
            self._coefficients(between, self._residence.processor(between), tick)
        self._make(prepared, tick)

    @property
    def recipe(self) -> Recipe:
        """By which the result is merged now."""
        return self._prepared.recipe

    @property
    def prepared(self) -> Prepared:
        return self._prepared

    @property
    def outputs(self) -> Mapping[str, OutputTensor]:
        """The tensors of the result, by name."""
        return self._outputs

    def tensor(self, name: str) -> torch.Tensor:
        """The bytes of a tensor of the result, not copied: they change with the parameters."""
        return self._residence.tensor(self._offsets[name], self._outputs[name].nbytes)

    def set_parameters(self, parameters: Mapping[str, Any], tick: Tick = lambda done, total: None) -> int:
        """Merge again with these parameters, as under `parameters:`, in place of those of their names that the
        configuration has. What an earlier call has set is forgotten.

        Returns how many tensors were merged again. Raises ArcmergeError, and leaves all as it is, for parameters that
        the method has not or that are wrong.
        """
        return self._make(self._prepared.with_recipe(changed_recipe(self._configured, parameters)), tick)

    def _make(self, prepared: Prepared, tick: Tick) -> int:
        """Merge what is not yet as `prepared` says; returns the number of tensors."""
        processor, jobs = self._residence.processor(prepared), prepared.plan.jobs
        coefficients = self._coefficients(prepared, processor, tick)
        wanted = {job.output.name: _origin(job, coefficients.get(number)) for number, job in enumerate(jobs)}
        changed = [
            number for number, job in enumerate(jobs) if self._made.get(job.output.name) != wanted[job.output.name]
        ]
        for number in changed:  # what fails half way is neither the one nor the other
            self._made.pop(jobs[number].output.name, None)
        with prepared.unchanged():
            self._fill(jobs, changed, coefficients, prepared, processor, tick)
        for number in changed:
            self._made[jobs[number].output.name] = wanted[jobs[number].output.name]
        self._prepared = prepared
        return len(changed)

    def _coefficients(self, prepared: Prepared, processor: Processor, tick: Tick) -> dict[int, Coefficients]:
        """Of every job that has some; reads the inputs of those alone whose Gram matrix is not known."""
        jobs, options = prepared.plan.jobs, prepared.options
        known = {
            number: gram
            for number, job in enumerate(jobs)
            if needs_gram(job) and (gram := self._grams.get(job)) is not None
        }
        unknown = [number for number, job in enumerate(jobs) if needs_gram(job) and number not in known]
        with prepared.unchanged():
            summed = sum_grams(
                jobs,
                processor,
                unknown,
                threads=options.thread_count,
                allow_nonfinite=options.allow_nonfinite,
                tick=tick,
            )
        for number, gram in summed.grams.items():
            self._grams.add(jobs[number], gram)
        if summed.grams:
            self._grams.save()
        return {
            **summed.coefficients,
            **{number: coefficients_of(jobs[number], gram) for number, gram in known.items()},
        }

    def _fill(
        self,
        jobs: tuple[Job, ...],
        changed: list[int],
        coefficients: Mapping[int, Coefficients],
        prepared: Prepared,
        processor: Processor,
        tick: Tick,
    ) -> None:
        start, at_once = self._residence.address, self._residence.pieces_at_once
        self._residence.wait()
        tasks: list[Filling] = []
        for number in changed:
            output, count = jobs[number].output, jobs[number].count
            for first in range(0, count, GRAM_ELEMENTS):
                piece = Piece(number, first, min(GRAM_ELEMENTS, count - first))
                address = start + self._offsets[output.name] + first * output.dtype.itemsize
                tasks.append(Filling(piece, coefficients.get(number), address))
        batches = deque(tasks[first : first + at_once] for first in range(0, len(tasks), at_once))
        total, done = sum(jobs[number].output.nbytes for number in changed), 0
        team = Workers()

        def work() -> None:
            nonlocal done
            while team.failure is None:
                try:
                    batch = batches.popleft()
                except IndexError:
                    return
                for task, not_finite in zip(batch, processor.fill(batch), strict=True):
                    may_be = prepared.options.allow_nonfinite or jobs[task.piece.job].setting
                    if not_finite and not may_be:
                        raise processor.not_finite(task.piece.job)
                with team.changed:
                    done += sum(task.piece.count * jobs[task.piece.job].output.dtype.itemsize for task in batch)

        team.run(lambda: tick(done, total), (work, prepared.options.thread_count))


def changed_recipe(recipe: Recipe, parameters: Mapping[str, Any]) -> Recipe:
    """The recipe with other parameters for all of the model; ArcmergeError for those that its method has not."""
    method = registry.get(recipe.method)
    names = [parameter.name for parameter in method.parameters]
    if strange := [name for name in parameters if name not in names]:
        known = ", ".join(f"`{name}`" for name in names) or "none"
        raise ArcmergeError(f"`{method.name}` has no parameter `{strange[0]}`; it has {known}")
    changed = with_parameters(recipe, parameters)
    for name in parameters:
        if not all(rule.values for rule in changed.parameters.rules[name]):
            raise ArcmergeError(f"parameters.{name}: must have a value, got an empty list; give it a number")
    changed.check_parameters(method.parameters)
    return changed


def _origin(job: Job, coefficients: Coefficients | None) -> object:
    """What decides the bytes of a job's result: two that are equal give the same."""
    inputs = [(str(item.checkpoint.folder), item.info.name, item.dtype) for item in job.inputs]
    if coefficients is None:
        return inputs, dict(job.values.shared)
    # In float32, in which they enter the arithmetic.
    return inputs, coefficients.values.astype(np.float32).tobytes()
