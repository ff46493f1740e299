"""The recipe: a merge as its YAML file describes it, in the language of mergekit.

    merge_method: slerp
    base_model: google/gemma-2-2b
    models:                                   # or `slices:`, stacks of layer ranges
      - model: google/gemma-2-2b
      - model: google/gemma-2-2b-it@main
    parameters:
      t: [0, 0.5, 1]
    dtype: bfloat16

Reading checks all that can be known from the text alone. What a method makes of its parameters, and whether it exists,
is for methods.py to say; what the models hold, for plan.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from arcmerge.dtypes import BY_NAME, MERGEABLE, DType
from arcmerge.errors import ArcmergeError
from arcmerge.merging.recipe.model_reference import ModelReference, read_reference
from arcmerge.merging.recipe.parameters import NO_SETTINGS, Parameter, Settings, convert, read_settings, resolve
from arcmerge.merging.recipe.tokenizer_block import ModelToken, TokenizerRecipe, TokenRule, read_tokenizer
from arcmerge.merging.recipe.yaml_document import Findings, did_you_mean, parse, shown

__all__ = [
    "ModelReference",
    "ModelToken",
    "Recipe",
    "Slice",
    "Source",
    "TokenRule",
    "TokenizerRecipe",
    "is_text",
    "load_recipe",
    "with_parameters",
]


@dataclass(frozen=True)
class Source:
    """A model, or the layers of it from layer_range[0] to before layer_range[1]; None: all of them."""

    model: ModelReference
    layer_range: tuple[int, int] | None = None
    parameters: Settings = NO_SETTINGS


@dataclass(frozen=True)
class Slice:
    """Layers of the result that are merged from the same sources. base_model: in place of the recipe's."""

    sources: tuple[Source, ...]
    base_model: ModelReference | None = None
    parameters: Settings = NO_SETTINGS


@dataclass(frozen=True)
class Recipe:
    """A whole merge. `models:` has become one slice, to which the base model is added if it is not listed.

    dtype: what inputs are rounded to before the arithmetic; out_dtype: what the result is stored as; None: as it is.
    chat_template: a name, `auto`, or the text of a template. text: the recipe as it was written.
    warnings: what the text says without effect.
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
    text: str
    warnings: tuple[str, ...]

    @property
    def models(self) -> tuple[ModelReference, ...]:
        """Every model that weights or configuration are read from, once, in order."""
        sources = [source.model for piece in self.slices for source in piece.sources]
        bases = [self.base_model, *(piece.base_model for piece in self.slices)]
        return tuple(dict.fromkeys([*sources, *(base for base in bases if base)]))

    def value(self, parameter: Parameter, piece: Slice, source: Source | None, tensor_name: str, u: float) -> float:
        """The value of `parameter`, of its kind, for one tensor of `piece`.

        source: the input that a parameter of scope `input` or `non_base` is asked for; None for a shared one.
        tensor_name: of the tensor in that input; of the output tensor for a shared parameter.
        u: i / (n - 1) for layer i of the n in the slice, 1 if n is 1, 0 for tensors outside the layers.

        Raises ArcmergeError if the parameter is required and not set for this tensor.
        """
        levels = (piece.parameters, self.module_parameters, self.parameters)
        if source is None:
            return resolve(parameter, levels, tensor_name, u, ignored=[each.parameters for each in piece.sources])
        return resolve(parameter, (source.parameters, *levels), tensor_name, u)

    def check_parameters(self, parameters: Iterable[Parameter]) -> tuple[str, ...]:
        """Check every setting against `parameters`, all that the merge method has.

        Returns warnings for settings that have no effect. Raises ArcmergeError for values of the wrong kind.
        """
        known = {parameter.name: parameter for parameter in parameters}
        findings = Findings()
        for settings, is_source, is_base in self._blocks():
            for name, rules in settings.rules.items():
                place = f"{settings.place}.{name}"
                if name not in known:
                    findings.warning(place, self._unknown(name, known))
                    continue
                parameter = known[name]
                if is_source and parameter.scope == "shared":
                    findings.warning(
                        place, f"ignored, `{name}` holds for all inputs at once; move it to the slice or recipe"
                    )
                elif is_base and parameter.scope == "non_base":
                    findings.warning(place, f"ignored, `{self.method}` does not read `{name}` of the base model")
                for value in (value for rule in rules for value in rule.values):
                    try:
                        convert(value, parameter.kind, place)
                    except ArcmergeError as error:
                        findings.problems.extend(error.problems)
        findings.finish()
        return tuple(findings.warnings)

    def _unknown(self, name: str, known: Mapping[str, Parameter]) -> str:
        """What to say of a setting that the method does not read."""
        ours = [other for other, parameter in known.items() if parameter.extension and other.endswith(f"_{name}")]
        if ours:
            return (
                f"`{self.method}` has no such parameter, ignored as in mergekit; "
                f"arcmerge has an extension called `{ours[0]}`"
            )
        return f"`{self.method}` has no such parameter, ignored{did_you_mean(name, known)}"

    def _blocks(self) -> Iterator[tuple[Settings, bool, bool]]:
        """Every parameters block, whether it is a source's, and whether that source is the base model."""
        for piece in self.slices:
            base = piece.base_model or self.base_model
            for source in piece.sources:
                yield source.parameters, True, source.model == base
            yield piece.parameters, False, False
        yield self.module_parameters, False, False
        yield self.parameters, False, False


def load_recipe(config: str | Path | Mapping[str, Any]) -> Recipe:
    """Read a recipe from the path of a YAML file, from YAML text, or from the mapping that YAML would give.

    config: a `str` is the path of a file that exists, or else YAML text where `is_text` says so.

    Raises ArcmergeError with every problem found, one line each.
    """
    text = _text(config)
    document = parse(text)
    findings = Findings()
    recipe = _read_recipe(document, text, findings)
    findings.finish()
    return recipe


def with_parameters(recipe: Recipe, parameters: Mapping[str, Any]) -> Recipe:
    """The recipe with these parameters for all of the model, in place of wherever it sets them.

    parameters: as under `parameters:`. Raises ArcmergeError for what a recipe may not hold.
    """

    def without(value: Any) -> Any:
        if isinstance(value, list):
            return [without(entry) for entry in value]
        if not isinstance(value, Mapping):
            return value
        kept = {key: without(entry) for key, entry in value.items()}
        if isinstance(kept.get("parameters"), Mapping):
            kept["parameters"] = {name: entry for name, entry in kept["parameters"].items() if name not in parameters}
        return kept

    document = without(parse(recipe.text))
    document["parameters"] = {**(document.get("parameters") or {}), **parameters}
    return load_recipe(document)


def _text(config: str | Path | Mapping[str, Any]) -> str:
    if isinstance(config, Mapping):
        try:
            return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)
        except yaml.representer.RepresenterError as error:
            raise ArcmergeError(f"a recipe may hold only what YAML can, got {shown(error.args[-1])}") from error
    if isinstance(config, str) and is_text(config):
        return config
    try:
        return Path(config).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArcmergeError(f"the recipe '{config}' must be UTF-8 text: {error}") from error
    except (OSError, ValueError) as error:  # the latter for what no file can be called
        cause = error.strerror if isinstance(error, OSError) else error
        raise ArcmergeError(f"the recipe '{config}' cannot be read: {cause}") from error


def is_text(config: str) -> bool:
    """Whether a `str` is a recipe and not the path of one: it has lines, or a recipe's keys on its only line."""
    return "\n" in config or (_KEY.search(config) is not None and not Path(config).exists())


def _plain(value: Any) -> Any:
    """`value` in YAML's own types, for tuples, paths, and the numbers and arrays of numpy and torch."""
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.tolist() if hasattr(value, "tolist") and not isinstance(value, type) else value


def _read_recipe(document: Mapping[Any, Any], text: str, findings: Findings) -> Recipe:
    entries = findings.mapping(document, "recipe", known=_RECIPE_KEYS, unused=("name",))
    base_model = _read_base_model(entries, "base_model", findings)
    module, place = _read_module(entries, findings)
    return Recipe(
        method=findings.text(
            entries.get("merge_method"), "merge_method", "the name of a merge method, as `merge_method: slerp`"
        ),
        slices=_read_slices(module, place, base_model, findings),
        module_parameters=read_settings(module.get("parameters"), f"{place}parameters", findings)
        if place
        else NO_SETTINGS,
        parameters=read_settings(entries.get("parameters"), "parameters", findings),
        base_model=base_model,
        dtype=_read_dtype(entries.get("dtype"), "dtype", findings),
        out_dtype=_read_dtype(entries.get("out_dtype"), "out_dtype", findings),
        tokenizer=read_tokenizer(entries.get("tokenizer_source"), entries.get("tokenizer"), findings),
        chat_template=_read_chat_template(entries.get("chat_template"), findings),
        text=text,
        warnings=tuple(findings.warnings),
    )


_RECIPE_KEYS = (
    *("merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype"),
    *("tokenizer_source", "tokenizer", "chat_template"),
)
# A key of a recipe where one line may have it: first, or within the braces of a mapping.
_KEY = re.compile(rf"(?:^(?:---)?|[{{,])\s*[\"']?(?:{'|'.join(_RECIPE_KEYS)})[\"']?\s*:(?=\s|$|[\"'\[{{])")


def _read_module(entries: Mapping[str, Any], findings: Findings) -> tuple[Mapping[str, Any], str]:
    """The mapping that holds `models` or `slices`, and what to put before the names of its entries."""
    _exactly_one(entries, ("models", "slices", "modules"), "recipe", findings)
    modules = entries.get("modules")
    if modules is None:
        return entries, ""
    if not isinstance(modules, Mapping) or list(modules) != ["default"]:
        got = shown(list(modules) if isinstance(modules, Mapping) else modules)
        findings.problem(
            "modules", f"must hold the one module `default`, all that a decoder-only language model has, got {got}"
        )
        return {}, ""
    module = findings.mapping(modules["default"], "modules.default", known=("models", "slices", "parameters"))
    if isinstance(modules["default"], Mapping):
        _exactly_one(module, ("models", "slices"), "modules.default", findings)
    return module, "modules.default."


def _exactly_one(entries: Mapping[str, Any], choices: Sequence[str], place: str, findings: Findings) -> None:
    given = [key for key in choices if entries.get(key) is not None]
    if len(given) != 1:
        findings.problem(
            place,
            f"must have exactly one of {', '.join(choices)}, got {' and '.join(given) if given else 'none of them'}",
        )


def _read_slices(
    module: Mapping[str, Any], place: str, base_model: ModelReference | None, findings: Findings
) -> tuple[Slice, ...]:
    if module.get("models") is not None:
        return (_read_models(module["models"], f"{place}models", base_model, findings),)
    if module.get("slices") is None:
        return ()
    slices = findings.mappings(
        module["slices"],
        f"{place}slices",
        "slices, as `- sources: [...]`",
        known=("sources", "base_model", "parameters"),
        unused=("residual_weight",),
    )
    return tuple(_read_slice(entries, here, findings) for here, entries in slices)


def _read_models(value: Any, place: str, base_model: ModelReference | None, findings: Findings) -> Slice:
    models = findings.mappings(value, place, "models, as `- model: ...`", known=("model", "parameters"))
    sources = [_read_source(entries, here, None, findings) for here, entries in models]
    if base_model and base_model not in [source.model for source in sources]:
        sources.append(Source(base_model, None, Settings("parameters of the base model listed under models")))
    return Slice(tuple(sources))


def _read_slice(entries: Mapping[str, Any], place: str, findings: Findings) -> Slice:
    sources = []
    for here, source in findings.mappings(
        entries.get("sources"),
        f"{place}.sources",
        "sources, as `- {model: ..., layer_range: ...}`",
        known=("model", "layer_range", "parameters"),
    ):
        layer_range = _read_layer_range(source.get("layer_range"), f"{here}.layer_range", findings)
        sources.append(_read_source(source, here, layer_range, findings))
    return Slice(
        sources=tuple(sources),
        base_model=_read_base_model(entries, f"{place}.base_model", findings),
        parameters=read_settings(entries.get("parameters"), f"{place}.parameters", findings),
    )


def _read_source(
    entries: Mapping[str, Any], place: str, layer_range: tuple[int, int] | None, findings: Findings
) -> Source:
    return Source(
        model=read_reference(entries.get("model"), f"{place}.model", findings),
        layer_range=layer_range,
        parameters=read_settings(entries.get("parameters"), f"{place}.parameters", findings),
    )


def _read_base_model(entries: Mapping[str, Any], place: str, findings: Findings) -> ModelReference | None:
    value = entries.get("base_model")
    return None if value is None else read_reference(value, place, findings)


def _read_layer_range(value: Any, place: str, findings: Findings) -> tuple[int, int]:
    try:
        start, end = (int(convert(layer, int, place)) for layer in value)
    except (ArcmergeError, TypeError, ValueError):
        start, end = -1, -1
    if not 0 <= start <= end:
        findings.problem(
            place,
            "must be [first, last + 1], two whole numbers from 0 up of which the second is not the smaller, "
            f"got {shown(value)}",
        )
        return (0, 0)
    return start, end


def _read_dtype(value: Any, place: str, findings: Findings) -> DType | None:
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    dtype = BY_NAME.get(name)
    if dtype in MERGEABLE:
        return dtype
    names = ", ".join(dtype.name for dtype in MERGEABLE)
    meant = _DTYPE_NICKNAMES.get(name.lower())
    hint = f"; write `{meant}`" if meant else did_you_mean(name, [dtype.name for dtype in MERGEABLE])
    findings.problem(place, f"must be one of {names}, got {shown(value)}{hint}")
    return None


_DTYPE_NICKNAMES = {
    "bf16": "bfloat16",
    **dict.fromkeys(("fp16", "f16", "half"), "float16"),
    **dict.fromkeys(("fp32", "f32", "float", "float64", "fp64", "f64", "double"), "float32"),
}


def _read_chat_template(value: Any, findings: Findings) -> str | None:
    if value is None:
        return None
    return findings.text(value, "chat_template", "`auto`, the name of a template, or the text of one")
