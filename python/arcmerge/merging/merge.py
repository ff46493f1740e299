"""The public function `merge`: from a configuration to a merged checkpoint on disk."""

from __future__ import annotations

import time
import warnings as python_warnings
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from arcmerge.checkpoint.layout import INDEX_NAME, index_json, parse_size, shard
from arcmerge.checkpoint.output_folder import OutputFolder
from arcmerge.checkpoint.writer import ShardFile
from arcmerge.interrupts import check, held, say
from arcmerge.merging.execution.choose import processor_for
from arcmerge.merging.execution.statistics_pass import StatisticsPass
from arcmerge.merging.execution.to_disk import DiskMerge
from arcmerge.merging.options import Options, Progress, Warn
from arcmerge.merging.output.files import small_files
from arcmerge.merging.plan.tensor_job import Job
from arcmerge.merging.prepare import prepare
from arcmerge.merging.recipe.recipe import MergeConfig
from arcmerge.merging.report import MergeReport


def merge(
    config: MergeConfig,
    out: str | Path,
    *,
    device: str = "auto",
    threads: int | None = None,
    out_shard_size: str | int = "5B",
    copy_tokenizer: bool = True,
    write_model_card: bool = True,
    allow_nonfinite: bool = False,
    allow_crimes: bool = False,
    unsafe_truncate_embeddings: bool = False,
    transformers_cache: str | None = None,
    random_seed: int | None = None,
    progress: Progress | None = None,
    warn: Warn = python_warnings.warn,
) -> MergeReport:
    """Merge the models of a mergekit configuration into a checkpoint folder.

    The folder `out` appears complete and durable, or not at all. An older result there is replaced only then.

    Args:
        config: path of a YAML file, YAML text, or the configuration as a mapping.
        out: the folder of the result.
        device: "cpu", "cuda", "cuda:N", or "auto" for the CPU. The bits of the result do not depend on the number of
            threads.
        threads: number of compute threads. Default: `arcmerge.get_num_threads()`.
        out_shard_size: maximum bytes of a file of weights, as a number or as text such as "5B" or "500M".
        copy_tokenizer: copy the tokenizer files of the base model.
        write_model_card: write README.md and mergekit_config.yml.
        allow_nonfinite: accept NaN and infinity in the weights.
        allow_crimes: accept models of different architectures.
        unsafe_truncate_embeddings: truncate vocabularies of different sizes to the smallest one.
        transformers_cache: cache folder for models from the hub. Default: the cache of huggingface_hub.
        random_seed: seed of methods that draw random numbers. Default: `seed` of the configuration, or else 0.
        progress: called with the bytes that are done and the bytes in total.
        warn: called with a sentence for each part of the configuration that has no effect and for each difference
            between the models. Default: `warnings.warn`.

    Returns:
        What was merged, how many bytes were written, and how long it took.

    Raises:
        ArcmergeError: with one sentence for each problem. Everything that can be known without the weights is checked
            before anything is written.

    Example:
        >>> recipe = {
        ...     "merge_method": "slerp",
        ...     "base_model": "base/",
        ...     "models": [{"model": "base/"}, {"model": "tuned/"}],
        ...     "parameters": {"t": 0.3},
        ... }
        >>> report = arcmerge.merge(recipe, "merged/")
        >>> report.method
        'slerp'
    """
    started = time.monotonic()
    options = Options(
        device=device,
        threads=threads,
        out_shard_size=out_shard_size,
        copy_tokenizer=copy_tokenizer,
        write_model_card=write_model_card,
        allow_nonfinite=allow_nonfinite,
        allow_crimes=allow_crimes,
        unsafe_truncate_embeddings=unsafe_truncate_embeddings,
        transformers_cache=transformers_cache,
        random_seed=random_seed,
    )
    shard_bytes = parse_size(options.out_shard_size)
    warnings: list[str] = []

    def noted(sentence: str) -> None:
        warnings.append(sentence)
        warn(sentence)

    prepared = prepare(config, options, noted)
    plan = prepared.plan
    small = small_files(prepared, Path(out).name)
    shards = shard([job.output for job in plan.jobs], shard_bytes, {*small, INDEX_NAME})
    total = sum(one.nbytes for one in shards)
    if (index := index_json(shards)) is not None:
        small[INDEX_NAME] = index
    processor = processor_for(prepared)
    say("an older output is as it was")
    with held(), ExitStack() as stack:
        folder = stack.enter_context(
            OutputFolder(Path(out), [one.folder for one in prepared.checkpoints.values()], total)
        )
        for name, content in small.items():
            (folder.path / name).write_bytes(content)
        files = [stack.enter_context(ShardFile(folder.path / one.file_name, one.nbytes)) for one in shards]
        work = DiskMerge(
            plan.jobs, shards, files, processor, threads=options.thread_count, allow_nonfinite=options.allow_nonfinite
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
        branches=Counter(branch(job, work.statistics, index) for index, job in enumerate(plan.jobs)),
        warnings=tuple(warnings),
        notes=plan.notes,
        seed=plan.seed,
    )


def branch(job: Job, statistics: StatisticsPass, index: int) -> str:
    """How the tensor of jobs[index] is computed: "copy", "linear", or the name of the method."""
    if job.copied:
        return "copy"
    return statistics.rules[index].branch if index in statistics.rules else job.method.name
