"""The whole way from a configuration to a merged checkpoint on disk."""

from __future__ import annotations

import json
import time
import warnings as python_warnings
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from arcmerge.checkpoint.header import parse_object
from arcmerge.checkpoint.hub import locate
from arcmerge.checkpoint.layout import INDEX_NAME, index_json, parse_size, shard
from arcmerge.checkpoint.output_folder import OutputFolder
from arcmerge.checkpoint.reader import Checkpoint
from arcmerge.checkpoint.writer import ShardFile
from arcmerge.dtypes import promote
from arcmerge.errors import ArcmergeError
from arcmerge.merging import methods
from arcmerge.merging.alignment import RowAddresses, Table, align
from arcmerge.merging.card import model_card
from arcmerge.merging.chat_template import find_template, with_template
from arcmerge.merging.companions import donor_files
from arcmerge.merging.grams import GramPass, Processor, sum_grams
from arcmerge.merging.host import HostProcessor
from arcmerge.merging.job import Job
from arcmerge.merging.names import is_vocabulary
from arcmerge.merging.options import Options
from arcmerge.merging.output_config import output_config
from arcmerge.merging.plan import Plan, make_plan
from arcmerge.merging.recipe import ModelReference, Recipe, load_recipe
from arcmerge.merging.report import MergeReport
from arcmerge.merging.run import Merge
from arcmerge.merging.vocabulary import Vocabulary, build_vocabulary

Config = str | Path | Mapping[str, Any]


class Progress(Protocol):
    """Told how far the work is: `done` of `total`, in bytes."""

    def __call__(self, done: int, total: int) -> None: ...


Warn = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """A recipe with its checkpoints opened and its tensors planned: all that is known before a weight is read."""

    recipe: Recipe
    checkpoints: Mapping[ModelReference, Checkpoint]
    vocabulary: Vocabulary | None
    plan: Plan

    def processor(self, options: Options) -> Processor:
        """Where the arithmetic of the plan happens."""
        rows = aligned_rows(self.plan, self.vocabulary)
        if (device := options.resolved_device) == "cpu":
            return HostProcessor(self.plan.jobs, rows)
        from arcmerge.merging.device import DeviceProcessor

        # Four slots keep the bus busy both ways; each holds 64 MB of pinned memory and more.
        return DeviceProcessor(self.plan.jobs, rows, device, min(options.thread_count, 4))


def prepare(config: Config, options: Options, warn: Warn) -> Prepared:
    """Read the recipe, open its models (fetching them from the hub if need be) and plan every tensor."""
    recipe = load_recipe(config)
    method = methods.get(recipe.method)
    for sentence in (*recipe.warnings, *recipe.check_parameters(method.parameters)):
        warn(sentence)
    checkpoints = _open(recipe, options)
    vocabulary = _vocabulary(recipe, checkpoints, options)
    plan = make_plan(
        recipe,
        method,
        checkpoints,
        vocabulary_rows=vocabulary.size if vocabulary else None,
        truncate_embeddings=options.unsafe_truncate_embeddings,
        mix_architectures=options.allow_crimes,
    )
    for sentence in vocabulary.warnings if vocabulary else ():
        warn(sentence)
    return Prepared(recipe, checkpoints, vocabulary, plan)


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
    shards = shard([job.output for job in plan.jobs], shard_bytes)
    total = sum(one.nbytes for one in shards)
    small = _small_files(prepared, Path(out).name, chosen)
    if (index := index_json(shards)) is not None:
        small[INDEX_NAME] = index
    processor = prepared.processor(chosen)
    with ExitStack() as stack:
        folder = stack.enter_context(
            OutputFolder(Path(out), [one.folder for one in prepared.checkpoints.values()], total)
        )
        for name, content in small.items():
            (folder.path / name).write_bytes(content)
        files = [stack.enter_context(ShardFile(folder.path / one.file_name, one.nbytes)) for one in shards]
        work = Merge(
            plan.jobs, shards, files, processor, threads=chosen.thread_count, allow_nonfinite=chosen.allow_nonfinite
        )
        work.run(lambda done: progress(done, total) if progress else None)
        for checkpoint in prepared.checkpoints.values():
            checkpoint.require_unchanged()
        folder.commit()
    return MergeReport(
        out=Path(out),
        method=plan.method.name,
        nbytes=total,
        seconds=time.monotonic() - started,
        branches=Counter(branch(job, work.sums, number) for number, job in enumerate(plan.jobs)),
        warnings=tuple(sentences),
    )


def preview(
    config: Config, options: Options, *, progress: Progress | None = None, warn: Warn = python_warnings.warn
) -> tuple[Prepared, GramPass]:
    """The plan of a merge with every tensor's coefficients: its Gram pass, without the mixing."""
    prepared = prepare(config, options, warn)
    grams = sum_grams(
        prepared.plan.jobs,
        prepared.processor(options),
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


def _open(recipe: Recipe, options: Options) -> dict[ModelReference, Checkpoint]:
    """The checkpoints of all models, after all that is wrong with any of them has been collected."""
    checkpoints: dict[ModelReference, Checkpoint] = {}
    problems: list[str] = []
    for model in recipe.models:
        try:
            checkpoints[model] = Checkpoint(_folder(model, options))
        except ArcmergeError as error:
            problems += error.problems
    if problems:
        raise ArcmergeError(problems)
    return checkpoints


def _folder(model: ModelReference, options: Options) -> Path:
    cache = options.transformers_cache
    return locate(model.path, model.revision, Path(cache) if cache else None)


def _vocabulary(
    recipe: Recipe, checkpoints: Mapping[ModelReference, Checkpoint], options: Options
) -> Vocabulary | None:
    if recipe.tokenizer is None:
        return None
    source = recipe.tokenizer.source
    elsewhere = isinstance(source, ModelReference) and source not in checkpoints
    return build_vocabulary(
        recipe.tokenizer,
        {model: checkpoint.folder for model, checkpoint in checkpoints.items()},
        recipe.base_model or recipe.models[0],
        _folder(source, options) if elsewhere and isinstance(source, ModelReference) else None,
    )


def aligned_rows(plan: Plan, vocabulary: Vocabulary | None) -> dict[tuple[int, int], RowAddresses]:
    """Where the rows of the inputs of vocabulary tensors lie, by (job, position of the input)."""
    if vocabulary is None:
        return {}
    rows = {}
    for number, job in enumerate(plan.jobs):
        if job.vocabulary:
            if len(job.output.shape) != 2:
                raise ArcmergeError(
                    f"{job.output.name}: to be matched by token a tensor must be a matrix of one row a token, "
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
            rows.update({(number, place): aligned[item.model] for place, item in enumerate(job.inputs)})
    return rows


def _small_files(prepared: Prepared, name: str, options: Options) -> dict[str, bytes]:
    """Everything beside the weights, by file name."""
    recipe, plan, vocabulary = prepared.recipe, prepared.plan, prepared.vocabulary
    donor = prepared.checkpoints[plan.donor]
    files = donor_files(donor.folder, tokenizer=options.copy_tokenizer and vocabulary is None)
    config = donor.config
    if vocabulary is not None:
        files.update(vocabulary.files)
        config = vocabulary.renumbered(config)
        if "generation_config.json" in files:
            path = donor.folder / "generation_config.json"
            generation = vocabulary.renumbered(parse_object(files[path.name], path))
            files["generation_config.json"] = _json(generation)
    if recipe.chat_template:
        folders = [checkpoint.folder for checkpoint in prepared.checkpoints.values()]
        if template := find_template(recipe.chat_template, folders):
            files = with_template(files, template)
    embedding = next((job for job in plan.jobs if is_vocabulary(job.output.name)), None)
    files["config.json"] = _json(
        output_config(
            config,
            [layer for _, layer in plan.source_layers],
            dtype=promote(job.output.dtype for job in plan.jobs if job.output.dtype.mergeable),
            models=[prepared.checkpoints[model].config for model, _ in plan.source_layers],
            vocab_size=embedding.output.shape[0] if embedding else None,
            tied=plan.tied,
        )
    )
    if options.write_model_card:
        card = model_card(name, plan.method.title, recipe.models, recipe.base_model, recipe.text)
        files["README.md"] = card.encode()
        files["mergekit_config.yml"] = recipe.text.encode()
    return files


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
