"""The steps of a merge before its arithmetic: read the recipe, open the checkpoints, plan every tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from arcmerge.checkpoint.hub import locate
from arcmerge.checkpoint.reader import Checkpoint
from arcmerge.errors import ArcmergeError
from arcmerge.merging.methods import registry
from arcmerge.merging.methods.method import Method
from arcmerge.merging.options import Options, Warn
from arcmerge.merging.output.donor_files import code_files
from arcmerge.merging.plan.agreement import disagreements
from arcmerge.merging.plan.plan import Plan, Planner
from arcmerge.merging.recipe.model_reference import ModelReference
from arcmerge.merging.recipe.recipe import MergeConfig, Recipe, load_recipe, with_seed
from arcmerge.merging.vocabulary.vocabulary import Vocabulary, build_vocabulary


@dataclass(frozen=True)
class Prepared:
    """A recipe with open checkpoints and a plan: everything that is known before a weight is read.

    Args:
        recipe: the recipe.
        checkpoints: an open checkpoint for each model of the recipe.
        vocabulary: the vocabulary of the result if the recipe matches rows by token, else None.
        plan: one job for each output tensor.
        code: Python files of the donor that are copied with the weights, by name.
        options: the options of the merge.
    """

    recipe: Recipe
    checkpoints: Mapping[ModelReference, Checkpoint]
    vocabulary: Vocabulary | None
    plan: Plan
    code: Mapping[str, bytes]
    options: Options

    def with_recipe(self, recipe: Recipe) -> Prepared:
        """The same checkpoints with a recipe that differs in its parameters only."""
        return replace(self, recipe=recipe, plan=self.plan.with_recipe(recipe))

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Raise ArcmergeError if the files of a model change or become unreadable within the block.

        Such a change is reported instead of any other error in the block, because it is its likely cause.
        """
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


def prepare(config: MergeConfig, options: Options, warn: Warn) -> Prepared:
    """Read the recipe, open its models (downloading them from the hub if needed) and plan every tensor.

    Args:
        config: path of a YAML file, YAML text, or the configuration as a mapping.
        options: options of the merge.
        warn: called with a sentence for each warning.

    Raises:
        ArcmergeError: with one sentence for each problem.
    """
    recipe = load_recipe(config)
    method = registry.get(recipe.method)
    if method.random and options.random_seed is not None:
        recipe = with_seed(recipe, options.random_seed)
    for sentence in (*recipe.warnings, *recipe.check_parameters(method.parameters)):
        warn(sentence)
    checkpoints = _open(recipe, options)
    vocabulary = _vocabulary(recipe, checkpoints, options)
    plan = _plan(recipe, method, checkpoints, vocabulary, options)
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
    recipe: Recipe,
    method: Method,
    checkpoints: Mapping[ModelReference, Checkpoint],
    vocabulary: Vocabulary | None,
    options: Options,
) -> Plan:
    return Planner(
        recipe,
        method,
        checkpoints,
        vocabulary_rows=vocabulary.size if vocabulary else None,
        truncate_embeddings=options.unsafe_truncate_embeddings,
        mix_architectures=options.allow_crimes,
    ).plan()


def _open(recipe: Recipe, options: Options) -> dict[ModelReference, Checkpoint]:
    """Open the checkpoints of all models; one ArcmergeError has the problems of all of them."""
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
