"""A merge before its arithmetic: the recipe read, its models opened, every tensor planned, the small files made."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from arcmerge.checkpoint.header import parse_object
from arcmerge.checkpoint.hub import locate
from arcmerge.checkpoint.reader import Checkpoint
from arcmerge.dtypes import F32, DType
from arcmerge.errors import ArcmergeError
from arcmerge.merging.execution.cpu import CpuProcessor
from arcmerge.merging.execution.gram_pass import Processor
from arcmerge.merging.methods import registry
from arcmerge.merging.options import Options
from arcmerge.merging.output.chat_template import find_template, with_template
from arcmerge.merging.output.config_json import output_config
from arcmerge.merging.output.donor_files import code_files, donor_files
from arcmerge.merging.output.model_card import model_card
from arcmerge.merging.plan.agreement import disagreements
from arcmerge.merging.plan.plan import Plan, make_plan
from arcmerge.merging.recipe.recipe import ModelReference, Recipe, load_recipe
from arcmerge.merging.vocabulary.embedding_rows import RowAddresses, Table, align
from arcmerge.merging.vocabulary.vocabulary import Vocabulary, build_vocabulary

Config = str | Path | Mapping[str, Any]
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """A recipe with its checkpoints opened and its tensors planned: all that is known before a weight is read.

    code: Python files of the donor's that travel with the weights.
    """

    recipe: Recipe
    checkpoints: Mapping[ModelReference, Checkpoint]
    vocabulary: Vocabulary | None
    plan: Plan
    code: Mapping[str, bytes]
    options: Options

    def with_recipe(self, recipe: Recipe) -> Prepared:
        """The same models merged otherwise: by a recipe that differs in its parameters alone."""
        plan = _plan(recipe, self.checkpoints, self.vocabulary, self.options)
        return replace(self, recipe=recipe, plan=plan)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Raises ArcmergeError if a model's weights change, or cannot be read, before the block ends: that is then the
        cause of whatever else went wrong in it."""
        self._require_unchanged()
        try:
            yield
        except ArcmergeError:
            self._require_unchanged()
            raise
        self._require_unchanged()

    def _require_unchanged(self) -> None:
        for checkpoint in self.checkpoints.values():
            checkpoint.require_unchanged()

    def processor(self) -> Processor:
        """Where the arithmetic of the plan happens."""
        options, rows = self.options, aligned_rows(self.plan, self.vocabulary)
        if (device := options.resolved_device) == "cpu":
            return CpuProcessor(self.plan.jobs, rows)
        from arcmerge.merging.execution.gpu import GpuProcessor

        # Four slots keep the bus busy both ways; each holds 64 MB of pinned memory and more.
        return GpuProcessor(self.plan.jobs, rows, device, min(options.thread_count, 4))


def prepare(config: Config, options: Options, warn: Warn) -> Prepared:
    """Read the recipe, open its models (fetching them from the hub if need be) and plan every tensor."""
    recipe = load_recipe(config)
    for sentence in (*recipe.warnings, *recipe.check_parameters(registry.get(recipe.method).parameters)):
        warn(sentence)
    checkpoints = _open(recipe, options)
    vocabulary = _vocabulary(recipe, checkpoints, options)
    plan = _plan(recipe, checkpoints, vocabulary, options)
    code, code_warnings = code_files(checkpoints[plan.donor].folder, tokenizer=options.copy_tokenizer)
    configs = {model: checkpoint.config for model, checkpoint in checkpoints.items()}
    for sentence in (
        *(vocabulary.warnings if vocabulary else ()),
        *disagreements(configs, plan.donor),
        *plan.warnings,
        *plan.notes,
        *code_warnings,
    ):
        warn(sentence)
    return Prepared(recipe, checkpoints, vocabulary, plan, code, options)


def _plan(
    recipe: Recipe, checkpoints: Mapping[ModelReference, Checkpoint], vocabulary: Vocabulary | None, options: Options
) -> Plan:
    return make_plan(
        recipe,
        registry.get(recipe.method),
        checkpoints,
        vocabulary_rows=vocabulary.size if vocabulary else None,
        truncate_embeddings=options.unsafe_truncate_embeddings,
        mix_architectures=options.allow_crimes,
    )


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


def small_files(prepared: Prepared, name: str) -> dict[str, bytes]:
    """Everything beside the weights, by file name. name: that the model card gives the result."""
    recipe, plan, vocabulary, options = prepared.recipe, prepared.plan, prepared.vocabulary, prepared.options
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
    files["config.json"] = _json(
        output_config(
            config,
            [layer for _, layer in plan.source_layers],
            dtype=_most_common_dtype(plan),
            models=[prepared.checkpoints[model].config for model, _ in plan.source_layers],
            depth=plan.depth,
            vocab_size=plan.vocab_size,
            tied=plan.tied,
        )
    )
    files.update(prepared.code)
    if options.write_model_card:
        card = model_card(name, plan.method.title, recipe.models, recipe.base_model, recipe.text)
        files["README.md"] = card.encode()
        files["mergekit_config.yml"] = recipe.text.encode()
    return files


def _most_common_dtype(plan: Plan) -> DType:
    """That of most bytes: a few tensors of a bfloat16 model may be float32."""
    sizes: Counter[DType] = Counter()
    for job in plan.jobs:
        if job.output.dtype.mergeable:
            sizes[job.output.dtype] += job.output.nbytes
    return max(sizes, key=lambda dtype: (sizes[dtype], dtype.itemsize), default=F32)


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n"
