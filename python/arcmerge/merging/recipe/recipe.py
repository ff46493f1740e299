"""The recipe of a merge, read from YAML in the language of mergekit.

    merge_method: slerp
    base_model: google/gemma-2-2b
    models:                                   # or `slices:`, stacks of layer ranges
      - model: google/gemma-2-2b
      - model: google/gemma-2-2b-it@main
    parameters:
      t: [0, 0.5, 1]
    dtype: bfloat16

Reading checks everything that the text alone determines. The registry of methods checks the name of the method, the
method checks its parameters, and the planner checks the models.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from arcmerge.dtypes import DType
from arcmerge.errors import ArcmergeError
from arcmerge.merging.recipe.dtype_name import read_dtype
from arcmerge.merging.recipe.model_reference import ModelReference, read_reference
from arcmerge.merging.recipe.parameters import NO_SETTINGS, Parameter, Settings, convert, read_settings, resolve
from arcmerge.merging.recipe.seed import DEFAULT_SEED, read_seed
from arcmerge.merging.recipe.tokenizer_block import TokenizerRecipe, read_tokenizer
from arcmerge.merging.recipe.yaml_document import Reader, did_you_mean, parse, shown

MergeConfig = str | Path | Mapping[str, Any]
"""A merge configuration: the path of a YAML file, YAML text, or the mapping that YAML would give."""


@dataclass(frozen=True)
class Source:
    """A model, or its layers from layer_range[0] up to but not including layer_range[1]; None for all layers."""

    model: ModelReference
    layer_range: tuple[int, int] | None = None
    parameters: Settings = NO_SETTINGS


@dataclass(frozen=True)
class Slice:
    """Layers of the result that are merged from the same sources.

    Args:
        sources: the sources.
        base_model: overrides the recipe's.
        parameters: of this slice.
        index: its place among the slices of the recipe.
    """

    sources: tuple[Source, ...]
    base_model: ModelReference | None = None
    parameters: Settings = NO_SETTINGS
    index: int = 0


@dataclass(frozen=True)
class Recipe:
    """A merge. `models:` is one slice, to which the base model is added if it is not listed.

    Args:
        method: name of the merge method.
        slices: slices of the result in order.
        module_parameters: parameters of `modules.default`.
        parameters: parameters of the recipe.
        base_model: the base model, if there is one.
        dtype: dtype that inputs are rounded to before the arithmetic; None for the stored one.
        out_dtype: dtype of the stored result; None for that of the arithmetic.
        tokenizer: the tokenizer block, if there is one.
        chat_template: "auto", the name of a template, or the text of one.
        seed: seed of the random numbers; methods that draw none do not read it.
        document: the mapping that the YAML gives.
        text: the recipe as it was written.
        warnings: sentences about parts that have no effect.
    """

    method: str
    slices: tuple[Slice, ...]
    module_parameters: Settings
    parameters: Settings
    base_model: ModelReference | None
    dtype: DType | None
    out_dtype: DType | None
    tokenizer: TokenizerRecipe | None
    chat_template: str | None
    seed: int
    document: Mapping[Any, Any] = field(repr=False)
    text: str
    warnings: tuple[str, ...]

    @property
    def models(self) -> tuple[ModelReference, ...]:
        """The models that weights or configuration are read from, in order, without duplicates."""
        sources = [source.model for slice_ in self.slices for source in slice_.sources]
        bases = [self.base_model, *(slice_.base_model for slice_ in self.slices)]
        return tuple(dict.fromkeys([*sources, *(base for base in bases if base)]))

    @cached_property
    def filters(self) -> tuple[str, ...]:
        """All texts that the values of parameters look for in the names of tensors."""
        blocks = (settings for settings, _, _ in self._blocks())
        rules = (rule for settings in blocks for rules in settings.rules.values() for rule in rules)
        return tuple(dict.fromkeys(rule.filter for rule in rules if rule.filter is not None))

    def value(self, parameter: Parameter, slice_: Slice, source: Source | None, tensor_name: str, u: float) -> Any:
        """Find the value of a parameter for one tensor of a slice.

        Args:
            parameter: the parameter.
            slice_: the slice.
            source: the input, if the scope of the parameter is "input" or "non_base"; None if it is "shared".
            tensor_name: name of the tensor in that input; of the output tensor for a shared parameter.
            u: i / (n - 1) for layer i of the n layers of the slice, 1 if n is 1, 0 for tensors outside the layers.

        Returns:
            The value, of the parameter's kind.

        Raises:
            ArcmergeError: if the parameter is required and not set for this tensor.
        """
        levels = (slice_.parameters, self.module_parameters, self.parameters)
        if source is None:
            return resolve(parameter, levels, tensor_name, u, ignored=[each.parameters for each in slice_.sources])
        return resolve(parameter, (source.parameters, *levels), tensor_name, u)

    def check_parameters(self, parameters: Iterable[Parameter]) -> tuple[str, ...]:
        """Check all values against the parameters of the merge method.

        Returns:
            Warnings about values that have no effect.

        Raises:
            ArcmergeError: for values of the wrong kind or out of range.
        """
        known = {parameter.name: parameter for parameter in parameters}
        reader = Reader()
        for settings, is_source, is_base in self._blocks():
            for name, rules in settings.rules.items():
                location = f"{settings.location}.{name}"
                if name not in known:
                    reader.warning(location, self._unknown(name, known))
                    continue
                parameter = known[name]
                if is_source and parameter.scope == "shared":
                    reader.warning(location, f"ignored, all inputs share one `{name}`; move it to the slice or recipe")
                elif is_base and parameter.scope == "non_base":
                    reader.warning(location, f"ignored, `{self.method}` does not read `{name}` of the base model")
                for value in (value for rule in rules for value in rule.values):
                    try:
                        parameter.read(value, location)
                    except ArcmergeError as error:
                        reader.extend(error)
        reader.problems.raise_if_any()
        return tuple(reader.warnings)

    def _unknown(self, name: str, known: Mapping[str, Parameter]) -> str:
        """The warning about a parameter that the method does not have."""
        ours = [other for other, parameter in known.items() if parameter.extension and other.endswith(f"_{name}")]
        if ours:
            return (
                f"`{self.method}` has no such parameter, ignored as in mergekit; "
                f"arcmerge has an extension called `{ours[0]}`"
            )
        return f"`{self.method}` has no such parameter, ignored{did_you_mean(name, known)}"

    def _blocks(self) -> Iterator[tuple[Settings, bool, bool]]:
        """All parameter blocks, each with whether it belongs to a source, and whether that source is the base model."""
        for slice_ in self.slices:
            base = slice_.base_model or self.base_model
            for source in slice_.sources:
                yield source.parameters, True, source.model == base
            yield slice_.parameters, False, False
        yield self.module_parameters, False, False
        yield self.parameters, False, False


def load_recipe(config: MergeConfig) -> Recipe:
    """Read a recipe.

    Args:
        config: path of a YAML file, YAML text, or the mapping that YAML would give. `is_text` decides whether a `str`
            is text.

    Raises:
        ArcmergeError: with one sentence for each problem.
    """
    text = _text(config)
    return _read_recipe(parse(text), text)


def recipe_of(document: Mapping[Any, Any]) -> Recipe:
    """The recipe that a mapping gives; ArcmergeError with one sentence for each problem."""
    return _read_recipe(document, _dump(document))


def with_seed(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with this seed, written into its document and its text."""
    return recipe_of({**recipe.document, "seed": seed})


def _dump(document: Mapping[Any, Any]) -> str:
    try:
        return yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    except yaml.representer.RepresenterError as error:
        raise ArcmergeError(f"'recipe' must have values of YAML's types only, got {shown(error.args[-1])}") from error


def _text(config: MergeConfig) -> str:
    if isinstance(config, Mapping):
        return _dump(plain(config))
    if isinstance(config, str) and is_text(config):
        return config
    try:
        return Path(config).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArcmergeError(f"'{config}' must be UTF-8 text to be read as a recipe, got {error}") from error
    except (OSError, ValueError) as error:  # ValueError: for text that is not a valid path
        cause = error.strerror if isinstance(error, OSError) else error
        raise ArcmergeError(f"'{config}' must be a file that can be read as a recipe, got {cause}") from error


def is_text(config: str) -> bool:
    """Whether a `str` is a recipe and not a path: it has several lines, or a key of recipes on its only line."""
    return "\n" in config or (_KEY.search(config) is not None and not Path(config).exists())


def plain(value: Any) -> Any:
    """`value` in YAML's types: converts tuples, paths, and numbers and arrays of numpy and torch."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, type) else value


def _read_recipe(document: Mapping[Any, Any], text: str) -> Recipe:
    """Read a document that YAML gave. Raises ArcmergeError with one sentence for each problem."""
    reader = Reader()
    entries = reader.mapping(document, "recipe", known=_RECIPE_KEYS, unused=("name",))
    base_model = _read_base_model(entries, "base_model", reader)
    module, location = _read_module(entries, reader)
    recipe = Recipe(
        method=reader.text(
            entries.get("merge_method"), "merge_method", "the name of a merge method, such as `merge_method: slerp`"
        ),
        slices=_read_slices(module, location, base_model, reader),
        module_parameters=read_settings(module.get("parameters"), f"{location}parameters", reader)
        if location
        else NO_SETTINGS,
        parameters=read_settings(entries.get("parameters"), "parameters", reader),
        base_model=base_model,
        dtype=read_dtype(entries.get("dtype"), "dtype", reader),
        out_dtype=read_dtype(entries.get("out_dtype"), "out_dtype", reader),
        tokenizer=read_tokenizer(entries.get("tokenizer_source"), entries.get("tokenizer"), reader),
        chat_template=_read_chat_template(entries.get("chat_template"), reader),
        seed=_read_seed(entries.get("seed"), reader),
        document=document,
        text=text,
        warnings=tuple(reader.warnings),
    )
    reader.problems.raise_if_any()
    return recipe


_RECIPE_KEYS = (
    *("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template", "seed"),
)
# A key of a recipe at the start of a line or within the braces of a mapping.
_KEY = re.compile(rf"(?:^(?:---)?|[{{,])\s*[\"']?(?:{'|'.join(_RECIPE_KEYS)})[\"']?\s*:(?=\s|$|[\"'\[{{])")


def _read_module(entries: Mapping[str, Any], reader: Reader) -> tuple[Mapping[str, Any], str]:
    """The mapping that has `models` or `slices`, and the prefix of the locations of its entries."""
    _exactly_one(entries, ("models", "slices", "modules"), "recipe", reader)
    modules = entries.get("modules")
    if modules is None:
        return entries, ""
    if not isinstance(modules, Mapping) or list(modules) != ["default"]:
        got = shown(list(modules) if isinstance(modules, Mapping) else modules)
        reader.problem("modules", f"must have the module `default` only, as decoder-only language models do, got {got}")
        return {}, ""
    module = reader.mapping(modules["default"], "modules.default", known=("models", "slices", "parameters"))
    if isinstance(modules["default"], Mapping):
        _exactly_one(module, ("models", "slices"), "modules.default", reader)
    return module, "modules.default."


def _exactly_one(entries: Mapping[str, Any], choices: Sequence[str], location: str, reader: Reader) -> None:
    given = [key for key in choices if entries.get(key) is not None]
    if len(given) != 1:
        reader.problem(
            location,
            f"must have exactly one of {', '.join(choices)}, got {' and '.join(given) if given else 'none'}",
        )


def _read_slices(
    module: Mapping[str, Any], location: str, base_model: ModelReference | None, reader: Reader
) -> tuple[Slice, ...]:
    if module.get("models") is not None:
        return (_read_models(module["models"], f"{location}models", base_model, reader),)
    if module.get("slices") is None:
        return ()
    slices = reader.mappings(
        module["slices"],
        f"{location}slices",
        "slices, such as `- sources: [...]`",
        known=("sources", "base_model", "parameters"),
        unused=("residual_weight",),
    )
    return tuple(_read_slice(entries, here, index, reader) for index, (here, entries) in enumerate(slices))


def _read_models(value: Any, location: str, base_model: ModelReference | None, reader: Reader) -> Slice:
    models = reader.mappings(value, location, "models, such as `- model: ...`", known=("model", "parameters"))
    sources = [_read_source(entries, here, None, reader) for here, entries in models]
    if base_model and base_model not in [source.model for source in sources]:
        sources.append(Source(base_model, None, Settings("the parameters of the base model listed under models")))
    return Slice(tuple(sources))


def _read_slice(entries: Mapping[str, Any], location: str, index: int, reader: Reader) -> Slice:
    sources = []
    for here, source in reader.mappings(
        entries.get("sources"),
        f"{location}.sources",
        "sources, such as `- {model: ..., layer_range: ...}`",
        known=("model", "layer_range", "parameters"),
    ):
        layer_range = _read_layer_range(source.get("layer_range"), f"{here}.layer_range", reader)
        sources.append(_read_source(source, here, layer_range, reader))
    return Slice(
        sources=tuple(sources),
        base_model=_read_base_model(entries, f"{location}.base_model", reader),
        parameters=read_settings(entries.get("parameters"), f"{location}.parameters", reader),
        index=index,
    )


def _read_source(
    entries: Mapping[str, Any], location: str, layer_range: tuple[int, int] | None, reader: Reader
) -> Source:
    return Source(
        model=read_reference(entries.get("model"), f"{location}.model", reader),
        layer_range=layer_range,
        parameters=read_settings(entries.get("parameters"), f"{location}.parameters", reader),
    )


def _read_base_model(entries: Mapping[str, Any], location: str, reader: Reader) -> ModelReference | None:
    value = entries.get("base_model")
    return None if value is None else read_reference(value, location, reader)


def _read_layer_range(value: Any, location: str, reader: Reader) -> tuple[int, int]:
    try:
        start, end = (int(convert(layer, int, location)) for layer in value)
    except (ArcmergeError, TypeError, ValueError):
        start, end = -1, -1
    if not 0 <= start <= end:
        reader.problem(
            location,
            f"must be [first, last + 1], two whole numbers of 0 or more in ascending order, got {shown(value)}",
        )
        return (0, 0)
    return start, end


def _read_chat_template(value: Any, reader: Reader) -> str | None:
    if value is None:
        return None
    return reader.text(value, "chat_template", "`auto`, the name of a chat template, or the text of one")


def _read_seed(value: Any, reader: Reader) -> int:
    try:
        return read_seed(value, "seed")
    except ArcmergeError as error:
        reader.extend(error)
        return DEFAULT_SEED
