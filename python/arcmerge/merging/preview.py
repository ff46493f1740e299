"""The public functions `plan` and `inspect`: a merge and its models examined without writing anything."""

from __future__ import annotations

import warnings

from arcmerge.merging.execution.choose import processor_for
from arcmerge.merging.execution.statistics_pass import StatisticsPass, measure_all, needs_gram
from arcmerge.merging.inspect.relations import Pair, pairs_of
from arcmerge.merging.inspect.tables import pair_recipe
from arcmerge.merging.options import Options, Progress, Warn
from arcmerge.merging.plan.plan import Plan
from arcmerge.merging.prepare import Prepared, prepare
from arcmerge.merging.recipe.recipe import MergeConfig


def plan(
    config: MergeConfig,
    *,
    allow_crimes: bool = False,
    unsafe_truncate_embeddings: bool = False,
    transformers_cache: str | None = None,
    random_seed: int | None = None,
    warn: Warn = warnings.warn,
) -> Plan:
    """Plan a merge: check its configuration and its models, and decide every tensor. No weight is read.

    Args:
        config: path of a YAML file, YAML text, or the configuration as a mapping.
        allow_crimes: accept models of different architectures.
        unsafe_truncate_embeddings: truncate vocabularies of different sizes to the smallest one.
        transformers_cache: cache folder for models from the hub. Default: the cache of huggingface_hub.
        random_seed: seed of methods that draw random numbers. Default: `seed` of the configuration, or else 0.
        warn: called with a sentence for each warning, as in `merge`. Default: `warnings.warn`.

    Returns:
        The plan. `plan.jobs` has one job for each tensor of the result: its name, dtype and shape (`job.output`), the
        tensors it is made of (`job.inputs`) and the values of its parameters (`job.values`).

    Raises:
        ArcmergeError: with one sentence for each problem, exactly where `merge` would raise it.

    Example:
        >>> job = arcmerge.plan("recipe.yml").jobs[0]
        >>> job.output.name, job.values.shared["t"]
        ('model.embed_tokens.weight', 0.5)
    """
    options = Options(
        device="cpu",
        allow_crimes=allow_crimes,
        unsafe_truncate_embeddings=unsafe_truncate_embeddings,
        transformers_cache=transformers_cache,
        random_seed=random_seed,
    )
    return prepare(config, options, warn).plan


def inspect(
    a: str,
    b: str,
    *,
    device: str = "auto",
    threads: int | None = None,
    allow_crimes: bool = False,
    unsafe_truncate_embeddings: bool = False,
    transformers_cache: str | None = None,
    progress: Progress | None = None,
) -> list[Pair]:
    """Compare two models: how each tensor of `b` relates to the same tensor of `a`.

    Args:
        a: folder of a model or its name on the hub.
        b: folder of another model or its name on the hub.
        device: "cpu", "cuda", "cuda:N", or "auto" for the CPU.
        threads: number of compute threads. Default: `arcmerge.get_num_threads()`.
        allow_crimes: accept models of different architectures.
        unsafe_truncate_embeddings: truncate vocabularies of different sizes to the smallest one.
        transformers_cache: cache folder for models from the hub. Default: the cache of huggingface_hub.
        progress: called with the bytes that are read and the bytes in total.

    Returns:
        One pair for each tensor of floating point, in the order of the network, with its 2 x 2 Gram matrix.
        `arcmerge.merging.inspect.relations.relation(pairs)` gives the angle in degrees, the ratio of the lengths and
        the near-collinear share of any selection of them.

    Raises:
        ArcmergeError: with one sentence for each problem: the models are the same, or do not match.

    Example:
        >>> from arcmerge.merging.inspect.relations import relation
        >>> pairs = arcmerge.inspect("base/", "tuned/")
        >>> 0 < relation(pair for pair in pairs if pair.layer == 0).angle < 180  # degrees
        True
    """
    options = Options(
        device=device,
        threads=threads,
        allow_nonfinite=True,
        allow_crimes=allow_crimes,
        unsafe_truncate_embeddings=unsafe_truncate_embeddings,
        transformers_cache=transformers_cache,
    )
    prepared, statistics = preview(pair_recipe(a, b), options, progress=progress, warn=lambda sentence: None)
    return pairs_of(prepared.plan, statistics)


def preview(
    config: MergeConfig, options: Options, *, progress: Progress | None = None, warn: Warn = warnings.warn
) -> tuple[Prepared, StatisticsPass]:
    """Plan a merge and compute the Gram matrices and coefficients of its tensors, without merging."""
    prepared = prepare(config, options, warn)
    jobs = prepared.plan.jobs
    with prepared.unchanged():
        order = [index for index, job in enumerate(jobs) if needs_gram(job)]
        statistics = StatisticsPass(jobs, processor_for(prepared), order, options.allow_nonfinite)
        measure_all(statistics, jobs, options.thread_count, progress or (lambda done, total: None))
    return prepared, statistics
