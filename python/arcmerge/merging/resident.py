"""A merge in memory: the parents stay mapped, and other parameters cost one pass over the tensors that they change."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from arcmerge.checkpoint.layout import OutputTensor
from arcmerge.checkpoint.writer import address_of, aligned_buffer
from arcmerge.errors import ArcmergeError
from arcmerge.merging import methods
from arcmerge.merging.gram_cache import GramCache
from arcmerge.merging.grams import Filling, Processor, coefficients_of, needs_gram, sum_grams
from arcmerge.merging.job import Job
from arcmerge.merging.method import Coefficients
from arcmerge.merging.pieces import GRAM_ELEMENTS, Piece
from arcmerge.merging.prepared import Prepared
from arcmerge.merging.recipe import Recipe, with_parameters
from arcmerge.merging.team import Team

Tick = Callable[[int, int], None]
# Tensors begin at multiples of as many bytes: a line of any cache.
ALIGNMENT = 256
# A t between the ends, for which every tensor has a Gram matrix.
_BETWEEN = 0.5


class ResidentMerge:
    """The result of a merge, in memory at addresses that stay, and made again where parameters change.

    prepared: on the CPU. tick: told now and then of the bytes that are done, and of all, of measuring and of merging.
    Raises ArcmergeError where memory is too small or weights are not finite.
    """

    def __init__(self, prepared: Prepared, tick: Tick = lambda done, total: None) -> None:
        self._prepared = prepared
        self._outputs = {job.output.name: job.output for job in prepared.plan.jobs}
        self._offsets: dict[str, int] = {}
        end = 0
        for output in self._outputs.values():
            self._offsets[output.name] = end
            end += -(-output.nbytes // ALIGNMENT) * ALIGNMENT
        _require_memory(end)
        self._memory = aligned_buffer(end)
        self._made: dict[str, object] = {}
        checkpoints = prepared.checkpoints
        self._grams = GramCache(checkpoints.values(), checkpoints[prepared.plan.donor].folder)
        if any(parameter.name == "t" for parameter in prepared.plan.method.parameters):
            # At t = 0 or 1 a tensor is a copy, which needs no matrix; the next t may need it.
            between = prepared.with_recipe(with_parameters(prepared.recipe, {"t": _BETWEEN}))
            self._coefficients(between, between.processor(), tick)
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

    def tensor_bytes(self, name: str) -> memoryview:
        """The bytes of a tensor of the result, not copied: they change with the parameters."""
        offset = self._offsets[name]
        return self._memory[offset : offset + self._outputs[name].nbytes]

    def set_parameters(self, parameters: Mapping[str, Any], tick: Tick = lambda done, total: None) -> int:
        """Merge again with these parameters, as under `parameters:`, in place of those of their names in the recipe.

        Returns how many tensors were merged again. Raises ArcmergeError, and leaves all as it is, for parameters that
        the method has not or that are wrong.
        """
        return self._make(self._prepared.with_recipe(changed_recipe(self.recipe, parameters)), tick)

    def _make(self, prepared: Prepared, tick: Tick) -> int:
        """Merge what is not yet as `prepared` says; returns the number of tensors."""
        for checkpoint in prepared.checkpoints.values():
            checkpoint.require_unchanged()
        processor, jobs = prepared.processor(), prepared.plan.jobs
        coefficients = self._coefficients(prepared, processor, tick)
        wanted = {job.output.name: _origin(job, coefficients.get(number)) for number, job in enumerate(jobs)}
        changed = [
            number for number, job in enumerate(jobs) if self._made.get(job.output.name) != wanted[job.output.name]
        ]
        for number in changed:  # what fails half way is neither the one nor the other
            self._made.pop(jobs[number].output.name, None)
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
        start = address_of(self._memory)
        tasks: deque[Filling] = deque()
        for number in changed:
            output, count = jobs[number].output, jobs[number].count
            for first in range(0, count, GRAM_ELEMENTS):
                piece = Piece(number, first, min(GRAM_ELEMENTS, count - first))
                address = start + self._offsets[output.name] + first * output.dtype.itemsize
                tasks.append(Filling(piece, coefficients.get(number), address))
        total, done = sum(jobs[number].output.nbytes for number in changed), 0
        team = Team()

        def work() -> None:
            nonlocal done
            while team.failure is None:
                try:
                    task = tasks.popleft()
                except IndexError:
                    return
                (not_finite,) = processor.fill([task])
                if not_finite and not prepared.options.allow_nonfinite:
                    raise processor.not_finite(task.piece.job)
                with team.changed:
                    done += task.piece.count * jobs[task.piece.job].output.dtype.itemsize

        team.start(work, prepared.options.thread_count)
        team.join(lambda: tick(done, total))


def changed_recipe(recipe: Recipe, parameters: Mapping[str, Any]) -> Recipe:
    """The recipe with other parameters for all of the model; ArcmergeError for those that its method has not."""
    method = methods.get(recipe.method)
    names = [parameter.name for parameter in method.parameters]
    if strange := [name for name in parameters if name not in names]:
        known = ", ".join(f"`{name}`" for name in names) or "none"
        raise ArcmergeError(f"`{method.name}` has no parameter `{strange[0]}`; it has {known}")
    changed = with_parameters(recipe, parameters)
    changed.check_parameters(method.parameters)
    return changed


def _origin(job: Job, coefficients: Coefficients | None) -> object:
    """What decides the bytes of a job's result: two that are equal give the same."""
    inputs = [(str(item.checkpoint.folder), item.info.name, item.dtype) for item in job.inputs]
    if coefficients is None:
        return inputs, dict(job.values.shared)
    # In float32, in which they enter the arithmetic.
    return inputs, coefficients.values.astype(np.float32).tobytes()


def _require_memory(nbytes: int) -> None:
    """Raises ArcmergeError unless the machine has that much memory to give."""
    if nbytes > (available := available_memory()):
        raise ArcmergeError(
            f"the merged weights take {nbytes / 1e9:.1f} GB of memory and {available / 1e9:.1f} GB are free: "
            f"{(nbytes - available) / 1e9:.1f} GB are missing; end other programs, or merge to disk"
        )


def available_memory() -> int:
    """Bytes that can be had without pushing others out, as Linux estimates it."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
