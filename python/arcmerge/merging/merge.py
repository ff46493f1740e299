"""The whole way from a configuration to a merged checkpoint on disk."""

from __future__ import annotations

import time
import warnings as python_warnings
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from arcmerge.checkpoint.layout import INDEX_NAME, index_json, parse_size, shard
from arcmerge.checkpoint.output_folder import OutputFolder
from arcmerge.checkpoint.writer import ShardFile
from arcmerge.interrupts import check, held, say
from arcmerge.merging.execution.gram_pass import GramPass, sum_grams
from arcmerge.merging.execution.to_disk import DiskMerge
from arcmerge.merging.options import Options
from arcmerge.merging.plan.tensor_job import Job
from arcmerge.merging.prepared import Config, Prepared, Warn, prepare, small_files
from arcmerge.merging.report import MergeReport


class Progress(Protocol):
    """Told how far the work is: `done` of `total`, in bytes."""

    def __call__(self, done: int, total: int) -> None: ...


def merge(
    config: Config,
    out: str | Path,
    *,
    progress: Progress | None = None,
    warn: Warn = python_warnings.warn,
    **options: Any,
) -> MergeReport:
    """Merge the models of a mergekit configuration into the checkpoint folder `out`.

    config: path of a YAML file, YAML text, or the configuration as a mapping. progress: see Progress.
    warn: told of whatever the configuration says without effect. options: the fields of `Options`, by name.

    Returns when the result is durable. `out` appears complete or not at all; an older result there is replaced only
    then. Raises ArcmergeError with one sentence per problem.
    """
    started = time.monotonic()
    chosen = Options.of(options)
    shard_bytes = parse_size(chosen.out_shard_size)
    sentences: list[str] = []

    def noted(sentence: str) -> None:
        sentences.append(sentence)
        warn(sentence)

    prepared = prepare(config, chosen, noted)
    plan = prepared.plan
    small = small_files(prepared, Path(out).name)
    shards = shard([job.output for job in plan.jobs], shard_bytes, {*small, INDEX_NAME})
    total = sum(one.nbytes for one in shards)
    if (index := index_json(shards)) is not None:
        small[INDEX_NAME] = index
    processor = prepared.processor()
    say("an older output is as it was")
    with held(), ExitStack() as stack:
        folder = stack.enter_context(
            OutputFolder(Path(out), [one.folder for one in prepared.checkpoints.values()], total)
        )
        for name, content in small.items():
            (folder.path / name).write_bytes(content)
        files = [stack.enter_context(ShardFile(folder.path / one.file_name, one.nbytes)) for one in shards]
        work = DiskMerge(
            plan.jobs, shards, files, processor, threads=chosen.thread_count, allow_nonfinite=chosen.allow_nonfinite
        )
        with prepared.unchanged():
            work.run(lambda done: progress(done, total) if progress else None)
        check()
        folder.commit()
        say("the output is complete")
    return MergeReport(
        out=Path(out),
        method=plan.method.name,
        nbytes=total,
        seconds=time.monotonic() - started,
        branches=Counter(branch(job, work.sums, number) for number, job in enumerate(plan.jobs)),
        warnings=tuple(sentences),
        notes=plan.notes,
    )


def preview(
    config: Config, options: Options, *, progress: Progress | None = None, warn: Warn = python_warnings.warn
) -> tuple[Prepared, GramPass]:
    """The plan of a merge with every tensor's coefficients: its Gram pass, without the mixing."""
    prepared = prepare(config, options, warn)
    jobs = prepared.plan.jobs
    with prepared.unchanged():
        grams = sum_grams(
            jobs,
            prepared.processor(),
            range(len(jobs)),
            threads=options.thread_count,
            allow_nonfinite=options.allow_nonfinite,
            tick=progress or (lambda done, total: None),
        )
    return prepared, grams


def branch(job: Job, grams: GramPass, number: int) -> str:
    """How a tensor comes about: "copy", "linear", or the name of the method."""
    if job.copied:
        return "copy"
    return grams.coefficients[number].branch if number in grams.coefficients else job.method.name
