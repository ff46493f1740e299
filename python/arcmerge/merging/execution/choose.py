"""The choice of the processor, and the row addresses that it needs for tensors that are aligned by token."""

from __future__ import annotations

from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution.cpu.masks import MaskStore
from arcmerge.merging.execution.cpu.processor import CpuProcessor
from arcmerge.merging.execution.processor import Processor
from arcmerge.merging.plan.plan import Plan
from arcmerge.merging.prepare import Prepared
from arcmerge.merging.vocabulary.embedding_rows import RowAddresses, Table, align
from arcmerge.merging.vocabulary.vocabulary import Vocabulary


def processor_for(prepared: Prepared, masks: MaskStore | None = None) -> Processor:
    """The processor of a merge to disk, or of a comparison.

    Args:
        prepared: the merge.
        masks: keeps random masks from one merge to the next on the CPU; None to keep them during this one.

    Raises:
        ArcmergeError: the device does not exist.
    """
    options, rows = prepared.options, aligned_rows(prepared.plan, prepared.vocabulary)
    if (device := options.merge_device) == "cpu":
        return CpuProcessor(prepared.plan.jobs, rows, masks if masks is not None else MaskStore())
    from arcmerge.merging.execution.gpu.processor import GpuProcessor

    return GpuProcessor(prepared.plan.jobs, rows, device, options.thread_count)


def aligned_rows(plan: Plan, vocabulary: Vocabulary | None) -> dict[tuple[int, int], RowAddresses]:
    """The row addresses of the inputs of vocabulary tensors, by the index of the job and the index of the input."""
    if vocabulary is None:
        return {}
    rows = {}
    for index, job in enumerate(plan.jobs):
        if not job.vocabulary:
            continue
        if len(job.output.shape) != 2:
            raise ArcmergeError(
                f"'{job.output.name}' must be a matrix with one row for each token to be aligned by token, "
                f"got shape {list(job.inputs[0].info.shape)}; leave the tokenizer settings out"
            )
        tables = {
            item.model: Table(
                item.checkpoint.address(item.info.name), item.info.dtype, item.info.shape[0], job.matrix[1]
            )
            for item in job.inputs
        }
        base = job.inputs[job.base].model if job.base is not None else None
        aligned = align(vocabulary, job.output.name, tables, base=base, cast=plan.recipe.dtype)
        rows.update({(index, position): aligned[item.model] for position, item in enumerate(job.inputs)})
    return rows
