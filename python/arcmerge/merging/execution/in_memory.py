"""A merge in memory: the parents stay open, and new parameters re-merge only the tensors that they change."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from arcmerge.checkpoint.layout import OutputTensor
from arcmerge.merging.execution.memory import allocate, offsets_of
from arcmerge.merging.execution.processor import FillTask, Processor
from arcmerge.merging.execution.statistics_cache import StatisticsCache
from arcmerge.merging.execution.statistics_pass import StatisticsPass, measure_all
from arcmerge.merging.execution.work_units import Piece, cut
from arcmerge.merging.execution.workers import drain
from arcmerge.merging.methods.rule import Coefficients, Rule
from arcmerge.merging.options import Progress
from arcmerge.merging.plan.tensor_job import Job
from arcmerge.merging.prepare import Prepared
from arcmerge.merging.recipe.changes import changed_recipe
from arcmerge.merging.recipe.recipe import Recipe

if TYPE_CHECKING:
    import torch

# A t for which every tensor needs a Gram matrix.
_INTERIOR_T = 0.5


class InMemoryMerge:
    """The result of a merge in memory, at addresses that do not change when it is merged again.

    Args:
        prepared: the recipe, its checkpoints and its plan.
        progress: called with the bytes done and the bytes in total, once for each phase: loading the parents, the
            statistics pass, and merging.
        neighbours: given the names of all tensors of the result, returns groups of them that lie side by side in
            memory, without a gap.
        workspace: bytes of a GPU's memory that are left free for a model that runs.

    Raises:
        ArcmergeError: memory is too small, or weights have NaN or infinity.
    """

    def __init__(
        self,
        prepared: Prepared,
        progress: Progress = lambda done, total: None,
        neighbours: Callable[[Collection[str]], Sequence[tuple[str, ...]]] = lambda names: (),
        workspace: int = 0,
    ) -> None:
        self._configured = prepared.recipe
        self._prepared = prepared
        self._outputs = {job.output.name: job.output for job in prepared.plan.jobs}
        self._offsets, nbytes = _offsets(self._outputs, neighbours(self._outputs.keys()))
        # At t = 0 or 1 a tensor is a copy, which needs neither the other parent nor a matrix; the next t may need both.
        has_t = any(parameter.name == "t" for parameter in prepared.plan.method.parameters)
        interior = prepared.with_recipe(changed_recipe(prepared.recipe, {"t": _INTERIOR_T})) if has_t else prepared
        self._memory = allocate([interior, prepared], nbytes, progress, workspace)
        self._merged: dict[str, object] = {}
        checkpoints = prepared.checkpoints
        self._known = StatisticsCache(checkpoints.values(), checkpoints[prepared.plan.donor].folder)
        if has_t:
            self._rules(interior, self._memory.processor(interior), progress)
        self._merge(prepared, progress)

    @property
    def recipe(self) -> Recipe:
        """The recipe that is currently applied."""
        return self._prepared.recipe

    @property
    def prepared(self) -> Prepared:
        """The merge that is currently applied."""
        return self._prepared

    @property
    def outputs(self) -> Mapping[str, OutputTensor]:
        """The tensors of the result, by name."""
        return self._outputs

    def tensor(self, name: str) -> torch.Tensor:
        """The bytes of a tensor of the result, uint8 (nbytes,), not copied: they change with the parameters."""
        return self._memory.tensor(self._offsets[name], self._outputs[name].nbytes)

    def set_parameters(self, parameters: Mapping[str, Any], progress: Progress = lambda done, total: None) -> int:
        """Merge again with other parameters.

        Args:
            parameters: values as under `parameters:` in a recipe, by the keys of `changed_recipe`. They change the
                original recipe; values of an earlier call are dropped.
            progress: called with the bytes done and the bytes in total, for the statistics pass and for merging.

        Returns:
            The number of tensors that were merged again.

        Raises:
            ArcmergeError: as `changed_recipe` does; or the method refuses the values. Nothing has changed then.
        """
        return self._merge(self._prepared.with_recipe(changed_recipe(self._configured, parameters)), progress)

    def _merge(self, prepared: Prepared, progress: Progress) -> int:
        """Merge the tensors that differ from the current result; returns their number."""
        processor, jobs = self._memory.processor(prepared), prepared.plan.jobs
        rules = self._rules(prepared, processor, progress)
        wanted = {job.output.name: _origin(job, rules.get(index)) for index, job in enumerate(jobs)}
        changed = [
            index for index, job in enumerate(jobs) if self._merged.get(job.output.name) != wanted[job.output.name]
        ]
        for index in changed:  # after a failure their bytes may be old or new
            self._merged.pop(jobs[index].output.name, None)
        with prepared.unchanged():
            self._fill(prepared, processor, changed, rules, progress)
        for index in changed:
            self._merged[jobs[index].output.name] = wanted[jobs[index].output.name]
        self._prepared = prepared
        return len(changed)

    def _rules(self, prepared: Prepared, processor: Processor, progress: Progress) -> dict[int, Rule]:
        """The rules by job index; reads the inputs only of jobs whose statistics are not known."""
        jobs, options = prepared.plan.jobs, prepared.options
        work = StatisticsPass(jobs, processor, range(len(jobs)), options.allow_nonfinite, known=self._known)
        with prepared.unchanged():
            measure_all(work, jobs, options.thread_count, progress)
        self._known.save()
        return work.rules

    def _fill(
        self,
        prepared: Prepared,
        processor: Processor,
        changed: list[int],
        rules: Mapping[int, Rule],
        progress: Progress,
    ) -> None:
        jobs, options, batch_size = prepared.plan.jobs, prepared.options, self._memory.batch_size

        def check(job: int, not_finite: int) -> None:
            if not_finite and not options.allow_nonfinite and not jobs[job].setting:
                raise processor.not_finite(job)

        def task(piece: Piece) -> FillTask:
            return FillTask(piece, rules.get(piece.job), self._address(jobs[piece.job].output, piece.first))

        whole = [task(Piece(index, 0, jobs[index].count)) for index in changed]
        done = self._memory.fill_whole(processor, whole)
        for index, not_finite in done.items():
            check(index, not_finite)
        tasks = [task(piece) for index in changed if index not in done for piece in cut(index, jobs[index].count)]
        if tasks:
            self._memory.wait()

        def nbytes(some: Iterable[FillTask]) -> int:
            return sum(one.piece.count * jobs[one.piece.job].output.dtype.itemsize for one in some)

        before = nbytes(one for one in whole if one.piece.job in done)

        def fill(batch: list[FillTask]) -> None:
            for one, not_finite in zip(batch, processor.fill(batch), strict=True):
                check(one.piece.job, not_finite)

        drain(
            [tasks[first : first + batch_size] for first in range(0, len(tasks), batch_size)],
            fill,
            nbytes,
            options.thread_count,
            lambda count, total: progress(before + count, before + total),
        )

    def _address(self, output: OutputTensor, first: int) -> int:
        return self._memory.address + self._offsets[output.name] + first * output.dtype.itemsize


def _offsets(outputs: Mapping[str, OutputTensor], groups: Sequence[tuple[str, ...]]) -> tuple[dict[str, int], int]:
    """The offset of each tensor of the result, those of a group without gaps between them; and the end of the last."""
    grouped = {name: group for group in groups for name in group}
    starts, end = offsets_of(
        {
            group: sum(outputs[name].nbytes for name in group)
            for group in (grouped.get(name, (name,)) for name in outputs)
        }
    )
    offsets = {}
    for group, start in starts.items():
        for name in group:
            offsets[name] = start
            start += outputs[name].nbytes
    return offsets, end


def _origin(job: Job, rule: Rule | None) -> object:
    """The origin of a job's result: results of equal origin have equal bytes."""
    inputs = [(str(item.checkpoint.folder), item.info.name, item.dtype) for item in job.inputs]
    if isinstance(rule, Coefficients):
        return inputs, rule.values.astype(np.float32).tobytes()  # the arithmetic rounds them to float32
    return inputs, rule
